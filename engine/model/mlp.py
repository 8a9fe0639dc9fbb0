"""SwiGLU MLP, inner width cut over the tensor axis (shape legend in layers.py)."""

from __future__ import annotations

from torch import Tensor, nn

from engine.config import ModelConfig
from engine.context import ParallelContext
from engine.model.layers import ColumnLinear, RowLinear
from engine.ops.linear import Remake
from engine.ops.swiglu import swiglu
from engine.sharding import Chunk


class MLP(nn.Module):
    """One fused gate|up projection, silu(gate) * up, down projection: [s, b, h] -> [s, b, h]."""

    def __init__(self, cfg: ModelConfig, ctx: ParallelContext, name: str, out_std: float, keep_gathered: bool):
        super().__init__()
        t = ctx.tensor.size
        gate, up = (Chunk(f"{name}.{part}.weight", cfg.ffn_size, parts=t) for part in ("gate", "up"))
        self.gate_up = ColumnLinear((gate, up), cfg.hidden_size, cfg.init_std, ctx, keep_gathered)
        self.down = RowLinear(f"{name}.down.weight", cfg.ffn_size, cfg.hidden_size, out_std, ctx)

    def forward(self, x: Tensor, remake: Remake | None = None) -> Tensor:
        """remake: how to get x again instead of keeping it; the product is then made again too."""
        fused = self.gate_up(x, remake)
        return self.down(swiglu(fused), Remake(swiglu, (fused,)) if remake else None)
