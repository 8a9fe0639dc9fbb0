"""Gated or plain MLP with its inner width sharded across the tensor axis (shape legend in layers.py)."""

from __future__ import annotations

from torch import Tensor, nn

from engine.config.schema import ModelConfig
from engine.distributed.context import ParallelContext
from engine.distributed.specs import Chunk, Cut
from engine.model.layers import ColumnLinear, ComputeBackends, RowLinear
from engine.ops.activation import activation
from engine.ops.linear import RecomputeRecipe


class MLP(nn.Module):
    """Fused gate|up projection (plain MLP: up only), activation, down projection: [s, b, h] -> [s, b, h]."""

    def __init__(
        self,
        cfg: ModelConfig,
        ctx: ParallelContext,
        name: str,
        out_std: float,
        keep_gathered: bool,
        backends: ComputeBackends,
    ):
        super().__init__()
        parts = ("gate", "up") if cfg.gated_mlp else ("up",)
        shape, rows = (cfg.ffn_size, cfg.hidden_size), Cut(0, ctx.tensor.size)
        chunks = tuple(Chunk(f"{name}.{part}.weight", shape, (rows,)) for part in parts)
        matmul, bias = backends.matmul, cfg.mlp_bias
        self.up = ColumnLinear(chunks, cfg.init_std, ctx, keep_gathered, matmul, bias)
        self.down = RowLinear(f"{name}.down.weight", cfg.ffn_size, cfg.hidden_size, out_std, ctx, matmul, bias)
        self.activation = backends.fuse(activation(cfg.activation, cfg.gated_mlp))

    def forward(self, x: Tensor, recipe: RecomputeRecipe | None = None) -> Tensor:
        """recipe: recompute x in the backward instead of saving it; the activation is then recomputed too."""
        fused = self.up(x, recipe)
        return self.down(self.activation(fused), RecomputeRecipe(self.activation, (fused,)) if recipe else None)
