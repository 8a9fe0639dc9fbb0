"""Grouped-query self-attention with heads sharded across the tensor axis (shape legend in layers.py)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.batch import AttentionDropout, Sequence
from engine.config.schema import Config, LayerConfig
from engine.distributed.context import ParallelContext
from engine.model.build import layers_of
from engine.model.layer_specs import AttentionSpecs
from engine.model.layers import Build, ColumnLinear, Norm, RowLinear, ShardedRMSNorm
from engine.ops.attention import AttentionCase, attention_case, select_core, select_implementation
from engine.ops.linear import RecomputeRecipe
from engine.ops.recompute import recompute
from engine.ops.rope import rope, split_and_rope


def attention_names(cfg: Config, ctx: ParallelContext) -> tuple[str, ...]:
    """The attention implementations that the layers use on this rank, each once. ConfigError if one cannot run."""
    documents, dropout = cfg.data.separate_documents, cfg.train.attention_dropout
    cases = dict.fromkeys(_case(layer, ctx, documents, dropout) for layer in layers_of(cfg.model))
    return tuple(dict.fromkeys(select_implementation(cfg.train.attention, case) for case in cases))


def _case(layer: LayerConfig, ctx: ParallelContext, documents: bool, dropout: float) -> AttentionCase:
    """What a layer's attention has to compute. documents: with document masking. dropout: of attention weights."""
    how: dict[str, Any] = {"documents": documents, "window": layer.window, "dropout": dropout > 0}
    return attention_case(ctx.device, ctx.dtype, layer.model.head_dim, **how)


class Attention(nn.Module):
    """Self-attention: fused q|k|v projection, QK-norms if configured, RoPE, attention core, output projection.

    [s, b, h] -> [s, b, h].
    """

    def __init__(self, layer: LayerConfig, build: Build, name: str):
        super().__init__()
        cfg, ctx, backends, specs = layer.model, build.ctx, build.backends, AttentionSpecs.of(layer, build.tensor, name)
        t = ctx.tensor.size
        self.n, self.m, self.d = cfg.num_heads // t, max(1, cfg.num_kv_heads // t), cfg.head_dim
        self.qkv, self.out = ColumnLinear(specs.qkv, build), RowLinear(specs.out, build)
        p = build.attention_dropout
        case = _case(layer, ctx, backends.documents, p)
        self.dropout = AttentionDropout(p, f"{name}.weights", cfg.num_heads, ctx.tensor.rank * self.n)
        self.window, self.attend = layer.window, select_core(backends.attention, case)
        self.rope, self.split_and_rope = backends.fuse(rope), backends.fuse(split_and_rope)
        self.head_norms = self.projection_norms = None
        if cfg.qk_norm and cfg.qk_norm_span == "head":
            self.head_norms = nn.ModuleList(Norm(norm, cfg, build) for norm in specs.qk_norms)
        elif cfg.qk_norm:
            self.projection_norms = nn.ModuleList(ShardedRMSNorm(norm.weight, cfg, ctx) for norm in specs.qk_norms)

    def forward(
        self, x: Tensor, rope_table: Tensor, sequence: Sequence, recipe: RecomputeRecipe | None = None
    ) -> Tensor:
        """x [s, b, h] -> [s, b, h]. rope_table: cos and sin of the sequence's positions, from ops.rope.

        recipe: recompute x in the backward instead of saving it; the attention core is then recomputed too.
        """
        sequence = sequence.with_window(self.window).with_dropout(self.dropout)
        fused, core = self.qkv(x, recipe), partial(self._core, sequence=sequence)
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
