"""The decoder-only Transformer: embedding, blocks, final norm, head.

A pipeline stage is the same class with a range of the blocks. Blocks are keyed by their layer number in the whole
model, so canonical parameter names do not depend on the layout.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from engine.batch import Sequence
from engine.config.derived import Derived
from engine.config.schema import Config, LayerConfig, ModelConfig
from engine.distributed.context import ParallelContext, make_context
from engine.distributed.layout import Layout
from engine.distributed.sharding import Parameter, parameters
from engine.distributed.specs import Role, ShardSpec
from engine.model.attention import Attention
from engine.model.feed_forward import MLP
from engine.model.layers import (
    ComputeBackends,
    Norm,
    PositionEmbedding,
    RecomputePolicy,
    VocabEmbedding,
    VocabHead,
    vocab_weight,
)
from engine.model.residual import BRANCHES, Branch, in_parallel, in_sequence
from engine.ops.compile import compiled
from engine.ops.fp8 import Fp8
from engine.ops.matmul import PLAIN_MATMUL
from engine.ops.recompute import recompute
from engine.ops.rope import RopeScaling, rope_at, rope_table

EMBED = "embed.weight"
HEAD = "head.weight"
POSITIONS = "positions.weight"
FINAL_NORM = "norm"
NO_RECOMPUTE, DEFAULT_BACKENDS = RecomputePolicy(), ComputeBackends()


@dataclass(frozen=True)
class StageShape:
    """The part of the model in one stage: `layers`; if first, the embedding; if last, the final norm and the head."""

    layers: range
    first: bool
    last: bool


def stage_shapes(counts: Collection[int]) -> list[StageShape]:
    """The stages of a pipeline, in order, given the number of blocks of each."""
    shapes, begin = [], 0
    for stage, count in enumerate(counts):
        shapes.append(StageShape(range(begin, begin + count), stage == 0, stage == len(counts) - 1))
        begin += count
    return shapes


class Block(nn.Module):
    """One Transformer block, [s, b, h] -> [s, b, h]: x = x + attention(norm(x)), then x = x + mlp(norm(x)).

    cfg.norm_position and cfg.parallel_residual select another residual form (engine.model.residual).
    recompute: "none", "selective" or "full" (RecomputePolicy).
    """

    def __init__(
        self,
        layer: LayerConfig,
        ctx: ParallelContext,
        policy: RecomputePolicy,
        recompute: str,
        backends: ComputeBackends,
    ):
        super().__init__()
        cfg, name, keep = layer.model, f"layers.{layer.index}", policy.keep_gathered
        self.recompute = recompute
        out_std = cfg.init_std / (2 * cfg.num_layers) ** 0.5  # GPT-2: residual sums keep their variance with depth
        self.residual = in_parallel if cfg.parallel_residual else in_sequence
        form = BRANCHES[cfg.norm_position]

        def branch(sublayer: str, module: nn.Module) -> Branch:
            names = (f"{name}.{sublayer}_{norm}" for norm in form.norm_names)
            norms = tuple(Norm(norm, cfg.hidden_size, cfg, ctx, backends) for norm in names)
            return form(norms, module, recompute == "selective")

        self.attention = branch("attention", Attention(layer, ctx, f"{name}.attention", out_std, keep, backends))
        self.mlp = branch("mlp", MLP(cfg, ctx, f"{name}.mlp", out_std, keep, backends))

    def forward(self, x: Tensor, rope_table: Tensor, sequence: Sequence) -> Tensor:
        """x [s, b, h] -> [s, b, h]. rope_table, sequence: as for Attention."""
        compute = partial(self._compute, sequence=sequence)
        if self.recompute == "full":
            return recompute(compute, x, rope_table, params=self.parameters())
        return compute(x, rope_table)

    def _compute(self, x: Tensor, rope_table: Tensor, sequence: Sequence) -> Tensor:
        return self.residual(self.attention, self.mlp, x, rope_table, sequence)


class Transformer(nn.Module):
    """The model of one pipeline stage: the first takes tokens, the last returns losses or logits.

    policy: activation recomputation. tied: the embedding matrix, if another stage on this rank already holds it.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        ctx: ParallelContext,
        shape: StageShape,
        policy: RecomputePolicy = NO_RECOMPUTE,
        tied: Parameter | None = None,
        backends: ComputeBackends = DEFAULT_BACKENDS,
    ):
        super().__init__()
        self.cfg, self.ctx, self.shape = cfg, ctx, shape
        weight = tied
        if shape.first:
            weight = vocab_weight(EMBED, Role.EMBEDDING, cfg, ctx)
            self.embed = VocabEmbedding(weight, ctx, cfg.hidden_size**0.5 if cfg.scale_embeddings else 1.0)
            self.positions = PositionEmbedding(POSITIONS, cfg, ctx) if cfg.positions == "learned" else None
        blocks = (Block(cfg.layer(n), ctx, policy, policy.mode_of(i), backends) for i, n in enumerate(shape.layers))
        self.layers = nn.ModuleDict(dict(zip(map(str, shape.layers), blocks)))
        if shape.last:
            self.norm = Norm(FINAL_NORM, cfg.hidden_size, cfg, ctx, backends)
            if not cfg.tie_embeddings:
                weight = vocab_weight(HEAD, Role.HEAD, cfg, ctx)
            elif weight is None:  # the embedding is on another rank: hold a replica under its name
                weight = vocab_weight(EMBED, Role.EMBEDDING, cfg, ctx)
            self.head = VocabHead(weight, ctx)
        self.rope: Tensor = torch.empty(2, 0, cfg.rotary_dim // 2)

    def _rope_for(self, seq_len: int) -> Tensor:
        if self.rope.shape[1] < seq_len:
            cfg, ctx = self.cfg, self.ctx
            self.rope = rope_table(seq_len, cfg.rotary_dim, cfg.rope_theta, ctx.device, ctx.dtype, rope_scaling_of(cfg))
        return self.rope

    def hidden(self, x: Tensor, sequence: Sequence) -> Tensor:
        """Hidden states: tokens [b, s] on the first stage, else [s, b, h] -> [s, b, h] (normalised on the last stage).

        sequence: the whole one, of all ranks that shard it.
        """
        if self.shape.first:
            x = self.embed(x)
            if self.positions is not None:
                x = self.positions(x, sequence)
        table = rope_at(self._rope_for(sequence.positions.shape[1]), sequence.positions)
        sequence = sequence.for_one_forward()
        for block in self.layers.values():
            x = block(x, table, sequence)
        return self.norm(x) if self.shape.last else x

    def forward(self, x: Tensor, labels: Tensor, weights: Tensor, sequence: Sequence) -> Tensor:
        """Hidden states [s, b, h]; on the last stage [b], each sample's weighted sum of token losses in nats.

        x as for `hidden`; labels int64 [b, s]; weights float [b, s], of each token's loss. The training objective is
        the sum over the samples. Every factor of it, such as 1 / tokens or a loss scale, has to be in the weights,
        because gradients are computed in the forward (ops.loss).
        """
        x = self.hidden(x, sequence)
        return self.head(x, labels, weights) if self.shape.last else x

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits: tokens [b, s] -> [b, s, vocab_size]. Only for a model whose stages are all on this pipeline rank."""
        sequence = Sequence.of_rows(tokens.shape[1], device=tokens.device)
        return self.head.logits(self.hidden(tokens, sequence)).transpose(0, 1)


def rope_scaling_of(cfg: ModelConfig) -> RopeScaling:
    """The RoPE scaling of a model config."""
    return RopeScaling(
        cfg.rope_scaling,
        cfg.rope_factor,
        cfg.rope_original_seq_len,
        cfg.rope_low_freq_factor,
        cfg.rope_high_freq_factor,
        cfg.rope_beta_fast,
        cfg.rope_beta_slow,
        cfg.rope_attention_factor,
    )


def compute_backends(cfg: Config) -> ComputeBackends:
    """The backends selected by train.attention, train.fp8, train.compile and data.separate_documents."""
    train = cfg.train
    matmul = PLAIN_MATMUL if train.fp8 == "none" else Fp8(rowwise=train.fp8 == "rowwise", compile=train.compile)
    backends = ComputeBackends(train.attention, cfg.data.separate_documents, matmul)
    return replace(backends, fuse=compiled) if train.compile else backends


def build_stages(
    cfg: Config, ctx: ParallelContext, derived: Derived
) -> Iterator[tuple[int, Transformer, list[Parameter]]]:
    """Build the pipeline stages of this rank, in ascending order: (stage number, model, its parameters).

    derived: derived from cfg. A parameter is listed only with the first stage that uses it, so a tied embedding is held
    once if the first and the last stage are both on this rank.
    """
    policy = RecomputePolicy(cfg.train.recompute, cfg.train.recompute_layers, cfg.parallel.keep_gathered)
    backends = compute_backends(cfg)
    shapes, tied, listed = stage_shapes(derived.layers), None, set()
    for number in derived.first_plan.stages_of(ctx.pipeline.rank):
        model = Transformer(cfg.model, ctx, shapes[number], policy, tied, backends)
        if cfg.model.tie_embeddings and shapes[number].first:
            tied = model.embed.weight
        params = [p for p in parameters(model) if id(p) not in listed]
        listed |= {id(p) for p in params}
        yield number, model, params


def parameter_specs(cfg: ModelConfig) -> list[ShardSpec]:
    """The specs of all parameters of a model without sharding, in canonical order. Allocates no memory."""
    ctx = make_context(Layout(), 0, dtype=torch.float32, device="meta")
    return [p.spec for p in parameters(Transformer(cfg, ctx, StageShape(range(cfg.num_layers), True, True)))]


def tensor_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> global shape of every tensor of a model, in canonical order. Allocates no memory."""
    return {chunk.name: chunk.shape for spec in parameter_specs(cfg) for chunk in spec.chunks}


def num_parameters(cfg: ModelConfig) -> int:
    """The number of parameters of the whole model; tied ones count once."""
    return sum(math.prod(shape) for shape in tensor_shapes(cfg).values())
