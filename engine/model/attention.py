"""Grouped-query self-attention, heads cut over the tensor axis (shape legend in layers.py)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from engine.config import ModelConfig
from engine.context import ParallelContext
from engine.model.layers import ColumnLinear, RMSNorm, RowLinear
from engine.ops.attention import causal_attention
from engine.ops.linear import Remake
from engine.ops.recompute import recompute
from engine.ops.rope import rope, split_and_rope
from engine.sharding import Chunk


class Attention(nn.Module):
    """One fused q|k|v projection, RoPE, causal attention, output projection.

    With fewer KV heads than tensor ranks, the ranks that share a head hold copies of it, and each sees the gradient
    of its own query heads only: the k and v chunks are summed over the `kv` axis.
    """

    def __init__(self, cfg: ModelConfig, ctx: ParallelContext, name: str, out_std: float, keep_gathered: bool):
        super().__init__()
        t, d, h = ctx.tensor.size, cfg.head_dim, cfg.hidden_size
        kv_parts = min(cfg.num_kv_heads, t)
        self.n, self.m, self.d = cfg.num_heads // t, cfg.num_kv_heads // kv_parts, d
        chunks = (
            Chunk(f"{name}.q.weight", cfg.num_heads * d, parts=t),
            Chunk(f"{name}.k.weight", cfg.num_kv_heads * d, parts=kv_parts, sum_over=("kv",)),
            Chunk(f"{name}.v.weight", cfg.num_kv_heads * d, parts=kv_parts, sum_over=("kv",)),
        )
        self.qkv = ColumnLinear(chunks, h, cfg.init_std, ctx, keep_gathered)
        self.out = RowLinear(f"{name}.out.weight", cfg.num_heads * d, h, out_std, ctx)
        self.norms: nn.ModuleList | None = None
        if cfg.qk_norm:
            self.norms = nn.ModuleList(
                RMSNorm(f"{name}.{part}_norm.weight", d, cfg.norm_eps, ctx, sum_over="tensor") for part in "qk"
            )

    def forward(
        self, x: Tensor, rope_table: Tensor, mask: Tensor | None = None, remake: Remake | None = None
    ) -> Tensor:
        """x [s, b, h] -> [s, b, h]. mask: of ops.attention.

        remake: how to get x again instead of keeping it; the core is then recomputed.
        """
        fused, core = self.qkv(x, remake), partial(self._core, mask=mask)
        return self.out(recompute(core, fused, rope_table) if remake else core(fused, rope_table))

    def _core(self, fused: Tensor, rope_table: Tensor, mask: Tensor | None) -> Tensor:
        """q|k|v [s, b, (n + 2 m) d] -> [s, b, n d]."""
        s, b, _ = fused.shape
        if self.norms is None:
            q, k, v = split_and_rope(fused, rope_table, self.n, self.m)
        else:
            heads = fused.view(s, b, self.n + 2 * self.m, self.d).permute(1, 2, 0, 3)
            q, k, v = heads.split([self.n, self.m, self.m], dim=1)
            q, k = rope(self.norms[0](q), rope_table), rope(self.norms[1](k), rope_table)
        return causal_attention(q, k, v, mask)
