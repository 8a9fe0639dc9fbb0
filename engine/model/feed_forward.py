"""MLP, gated or plain, inner width cut over the tensor axis (shape legend in layers.py)."""

from __future__ import annotations

from torch import Tensor, nn

from engine.config.schema import ModelConfig
from engine.distributed.context import ParallelContext
from engine.distributed.sharding import Chunk
from engine.model.layers import ColumnLinear, Means, RowLinear
from engine.ops.activation import activation
from engine.ops.linear import Remake


class MLP(nn.Module):
    """One fused gate|up projection (or up alone), activation, down projection: [s, b, h] -> [s, b, h]."""

    def __init__(
        self, cfg: ModelConfig, ctx: ParallelContext, name: str, out_std: float, keep_gathered: bool, means: Means
    ):
        super().__init__()
        parts = ("gate", "up") if cfg.gated_mlp else ("up",)
        chunks = tuple(Chunk(f"{name}.{part}.weight", cfg.ffn_size, parts=ctx.tensor.size) for part in parts)
        products, bias = means.products, cfg.mlp_bias
        self.up = ColumnLinear(chunks, cfg.hidden_size, cfg.init_std, ctx, keep_gathered, products, bias)
        self.down = RowLinear(f"{name}.down.weight", cfg.ffn_size, cfg.hidden_size, out_std, ctx, products, bias)
        self.activation = means.fuse(activation(cfg.activation, cfg.gated_mlp))

    def forward(self, x: Tensor, remake: Remake | None = None) -> Tensor:
        """remake: how to get x again instead of keeping it; the activation is then made again too."""
        fused = self.up(x, remake)
        return self.down(self.activation(fused), Remake(self.activation, (fused,)) if remake else None)
