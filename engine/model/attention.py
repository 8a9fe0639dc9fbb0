"""Grouped-query self-attention with heads sharded across the tensor axis (shape legend in layers.py)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from engine.batch import Sequence
from engine.config.schema import Config, LayerConfig
from engine.distributed.context import ParallelContext
from engine.distributed.specs import Chunk, Cut
from engine.model.layers import ColumnLinear, ComputeBackends, Norm, RowLinear, ShardedRMSNorm
from engine.ops.attention import attention_case, select_core, select_implementation
from engine.ops.linear import RecomputeRecipe
from engine.ops.recompute import recompute
from engine.ops.rope import rope, split_and_rope


def attention_names(cfg: Config, ctx: ParallelContext) -> tuple[str, ...]:
    """The attention implementations that the layers use on this rank, each once. ConfigError if one cannot run."""
    cases = (
        attention_case(ctx.device, ctx.dtype, cfg.model.head_dim, documents=cfg.data.separate_documents, window=window)
        for window in dict.fromkeys(cfg.model.layer(i).window for i in range(cfg.model.num_layers))
    )
    return tuple(dict.fromkeys(select_implementation(cfg.train.attention, case) for case in cases))


class Attention(nn.Module):
    """Self-attention: fused q|k|v projection, QK-norms if configured, RoPE, attention core, output projection.

    With fewer KV heads than tensor ranks, the ranks that share a KV head hold replicas of its weights. Each replica
    gets only the gradient of its local query heads, so the k and v chunks are summed over these ranks.
    """

    def __init__(
        self,
        layer: LayerConfig,
        ctx: ParallelContext,
        name: str,
        out_std: float,
        keep_gathered: bool,
        backends: ComputeBackends,
    ):
        super().__init__()
        cfg = layer.model
        t, d, h, matmul = ctx.tensor.size, cfg.head_dim, cfg.hidden_size, backends.matmul
        kv_parts = min(cfg.num_kv_heads, t)
        self.n, self.m, self.d = cfg.num_heads // t, cfg.num_kv_heads // kv_parts, d
        kv = (cfg.num_kv_heads * d, h), (Cut(0, kv_parts),), (f"tensor/{kv_parts}",)
        chunks = (
            Chunk(f"{name}.q.weight", (cfg.num_heads * d, h), (Cut(0, t),)),
            Chunk(f"{name}.k.weight", *kv),
            Chunk(f"{name}.v.weight", *kv),
        )
        self.qkv = ColumnLinear(chunks, cfg.init_std, ctx, keep_gathered, matmul, cfg.qkv_bias)
        bias = cfg.attention_out_bias
        self.out = RowLinear(f"{name}.out.weight", cfg.num_heads * d, h, out_std, ctx, matmul, bias)
        case = attention_case(ctx.device, ctx.dtype, d, documents=backends.documents, window=layer.window)
        self.window, self.attend = layer.window, select_core(backends.attention, case)
        self.rope, self.split_and_rope = backends.fuse(rope), backends.fuse(split_and_rope)
        self.head_norms = self.projection_norms = None
        if cfg.qk_norm and cfg.qk_norm_span == "head":
            self.head_norms = nn.ModuleList(
                Norm(f"{name}.{part}_norm", d, cfg, ctx, backends, sum_over="tensor") for part in "qk"
            )
        elif cfg.qk_norm:
            self.projection_norms = nn.ModuleList(
                ShardedRMSNorm(replace(chunk, name=f"{name}.{part}_norm.weight", shape=chunk.shape[:1]), cfg, ctx)
                for part, chunk in zip("qk", chunks)
            )

    def forward(
        self, x: Tensor, rope_table: Tensor, sequence: Sequence, recipe: RecomputeRecipe | None = None
    ) -> Tensor:
        """x [s, b, h] -> [s, b, h]. rope_table: cos and sin of the sequence's positions, from ops.rope.

        recipe: recompute x in the backward instead of saving it; the attention core is then recomputed too.
        """
        fused, core = self.qkv(x, recipe), partial(self._core, sequence=sequence.with_window(self.window))
        if recipe is None:
            return self.out(core(fused, rope_table))
        norms = [m for m in (self.head_norms, self.projection_norms) if m is not None]
        return self.out(recompute(core, fused, rope_table, params=[p for m in norms for p in m.parameters()]))

    def _core(self, fused: Tensor, rope_table: Tensor, sequence: Sequence) -> Tensor:
        """QK-norms, RoPE and attention: q|k|v [s, b, (n + 2 m) d] -> [s, b, n d]."""
        s, b, _ = fused.shape
        if self.projection_norms is not None:
            fused = self._norm_projections(fused)
        if self.head_norms is None:
            q, k, v = self.split_and_rope(fused, rope_table, self.n, self.m)
        else:
            heads = fused.view(s, b, self.n + 2 * self.m, self.d).permute(1, 2, 0, 3)
            q, k, v = heads.split([self.n, self.m, self.m], dim=1)
            q, k = (self.rope(norm(x), rope_table) for norm, x in zip(self.head_norms, (q, k)))
        return self.attend(q, k, v, sequence)

    def _norm_projections(self, fused: Tensor) -> Tensor:
        assert self.projection_norms is not None
        q, k, v = fused.split([self.n * self.d, self.m * self.d, self.m * self.d], dim=-1)
        return torch.cat((self.projection_norms[0](q), self.projection_norms[1](k), v), dim=-1)
