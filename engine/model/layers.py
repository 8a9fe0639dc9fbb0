"""Tensor- and sequence-parallel layers. Each takes a context and a canonical name, and defines its weight's ShardSpec.

Shape legend (all files of the model):
    s  sequence     b  micro-batch     h  hidden     t  ranks of the tensor axis
    n  local query heads (num_heads / t)     m  local KV heads     d  head_dim
    f  local inner width (ffn_size / t)      v  local vocabulary (vocab_size / t, rounded up)
Without sequence parallelism, activations between blocks are [s, b, h], replicated across the axis `ctx.replicated`.
With it they are [s / t, b, h], sharded across `ctx.sequence`; below, s means either. In both cases the tensor ranks
form one of the two axes and the other axis has size 1, where every collective is the identity. So layers call the
collectives of both axes and never branch on the mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.batch import Sequence
from engine.config.schema import ModelConfig
from engine.distributed.collectives import all_gather, reduce_partial_sums
from engine.distributed.context import ParallelContext
from engine.distributed.sharding import Parameter, new_parameter
from engine.distributed.specs import Chunk, Cut, Role, ShardSpec
from engine.ops.embedding import embedding
from engine.ops.linear import RecomputeRecipe, linear
from engine.ops.loss import VocabSlice, linear_cross_entropy
from engine.ops.matmul import PLAIN_MATMUL, MatmulBackend
from engine.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm, sharded_rms_norm


@dataclass(frozen=True)
class RecomputePolicy:
    """Activation recomputation: which activations a block saves for the backward (docs/training.md has the bytes).

    recompute: "none"; "selective" recomputes norms, activation functions and the attention core; "full" recomputes the
    whole block from its input. layers: recompute in this many blocks of a stage, the first ones; 0: in all.
    keep_gathered: under sequence parallelism, save the gathered input of column-parallel matmuls, not the local shard.
    """

    recompute: str = "none"
    layers: int = 0
    keep_gathered: bool = False

    def mode_of(self, index: int) -> str:
        """The recompute mode of the block at position `index` of its stage: "none", "selective" or "full"."""
        return self.recompute if not self.layers or index < self.layers else "none"


def _identity(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


@dataclass(frozen=True)
class ComputeBackends:
    """The implementations that a block computes with.

    attention: implementation name (ops.attention) or "auto", by which each layer chooses its core. documents: with
    document masking. matmul: matmuls of the linear layers. fuse: wrapper for the functions between matmuls, attention
    and collectives: the identity or torch.compile.
    """

    attention: str = "auto"
    documents: bool = False
    matmul: MatmulBackend = PLAIN_MATMUL
    fuse: Callable[[Callable[..., Any]], Callable[..., Any]] = _identity


def bias_of(chunk: Chunk) -> Chunk:
    """The bias chunk of a weight chunk: named `...bias`, sharded and summed the same way as its rows."""
    return replace(chunk, name=chunk.name.removesuffix("weight") + "bias", shape=chunk.shape[:1])


class ColumnLinear(nn.Module):
    """Column-parallel linear: [s, b, h] -> [s, b, local out], weight rows (output features) and bias sharded.

    chunks: the canonical tensors that are fused into the weight, such as q, k and v. Under sequence parallelism the
    input is this rank's part of the sequence; it is gathered, and the output covers the whole sequence.
    """

    def __init__(
        self,
        chunks: tuple[Chunk, ...],
        init_std: float,
        ctx: ParallelContext,
        keep_gathered: bool,
        matmul: MatmulBackend,
        bias: bool = False,
    ):
        super().__init__()
        self.replicated, self.sequence, self.keep_gathered = ctx.replicated, ctx.sequence, keep_gathered
        self.matmul = matmul
        self.weight = new_parameter(ShardSpec(chunks, init_std=init_std), ctx)
        self.bias: Parameter | None = None
        if bias:
            self.bias = new_parameter(ShardSpec(tuple(map(bias_of, chunks)), init_value=0.0, role=Role.VECTOR), ctx)

    def forward(self, x: Tensor, recipe: RecomputeRecipe | None = None) -> Tensor:
        """recipe: recompute x in the backward instead of saving it."""
        return linear(
            x,
            self.weight,
            self.replicated,
            self.sequence,
            bias=self.bias,
            keep_gathered=self.keep_gathered,
            recipe=recipe,
            matmul=self.matmul,
        )


class RowLinear(nn.Module):
    """Row-parallel linear: [s, b, local in] -> [s, b, h], weight columns (input features) sharded, outputs summed.

    Under sequence parallelism the sum is reduce-scattered, and the output is this rank's part of the sequence. The bias
    is replicated and added once, after the sum.
    """

    def __init__(
        self,
        name: str,
        in_size: int,
        out_size: int,
        init_std: float,
        ctx: ParallelContext,
        matmul: MatmulBackend,
        bias: bool = False,
    ):
        super().__init__()
        self.replicated, self.sequence, self.self_axis = ctx.replicated, ctx.sequence, ctx.self_axis
        self.matmul = matmul
        chunk = Chunk(name, (out_size, in_size), (Cut(1, ctx.tensor.size),))
        self.weight = new_parameter(ShardSpec((chunk,), init_std=init_std), ctx)
        self.bias: Parameter | None = None
        if bias:
            whole = bias_of(Chunk(name, (out_size,), sum_over=("sequence",)))
            self.bias = new_parameter(ShardSpec((whole,), init_value=0.0, role=Role.VECTOR), ctx)

    def forward(self, x: Tensor, recipe: RecomputeRecipe | None = None) -> Tensor:
        """recipe: recompute x in the backward instead of saving it."""
        partial_sums = linear(x, self.weight, self.self_axis, self.self_axis, recipe=recipe, matmul=self.matmul)
        out = reduce_partial_sums(partial_sums, self.replicated, self.sequence)
        return out if self.bias is None else out + self.bias


class Norm(nn.Module):
    """RMSNorm or LayerNorm (cfg.norm) over the last dim; weight and bias are replicated across tensor ranks.

    sum_over: the axis whose ranks each compute only a part of the weight's gradient. "sequence" where a rank normalises
    its part of the sequence, "tensor" where it normalises its local heads (QK-norms).
    """

    def __init__(
        self,
        name: str,
        size: int,
        cfg: ModelConfig,
        ctx: ParallelContext,
        backends: ComputeBackends = ComputeBackends(),
        sum_over: str = "sequence",
    ):
        super().__init__()
        chunk = Chunk(f"{name}.weight", (size,), sum_over=(sum_over,))
        offset = float(cfg.norm_offset)
        self.weight = new_parameter(ShardSpec((chunk,), init_value=1.0 - offset, role=Role.VECTOR), ctx)
        self.bias: Parameter | None = None
        rms: dict[str, float] = {"eps": cfg.norm_eps, "offset": offset}
        self.function: Callable[..., Tensor] = partial(backends.fuse(rms_norm), **rms)
        self.add_norm_function: Callable[..., tuple[Tensor, Tensor]] = partial(backends.fuse(add_rms_norm), **rms)
        if cfg.norm == "layernorm":
            self.bias = new_parameter(ShardSpec((bias_of(chunk),), init_value=0.0, role=Role.VECTOR), ctx)
            self.function = partial(backends.fuse(layer_norm), eps=cfg.norm_eps)
            self.add_norm_function = partial(backends.fuse(add_layer_norm), eps=cfg.norm_eps)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x [..., size] -> the same shape. With a residual: the sum x + residual and the norm of the sum, fused."""
        if residual is None:
            return self.function(*self._inputs(x))
        return self.add_norm_function(*self._inputs(x, residual))

    def _inputs(self, *x: Tensor) -> tuple[Tensor, ...]:
        return (*x, self.weight) if self.bias is None else (*x, self.weight, self.bias)

    def recipe(self, x: Tensor) -> RecomputeRecipe:
        """A recipe that recomputes `self(x)` from x, which the norm saves for its own backward anyway."""
        return RecomputeRecipe(self.function, self._inputs(x))


class ShardedRMSNorm(nn.Module):
    """RMSNorm over a whole projection (QK-norm of OLMo 2), features sharded across the tensor axis as in `chunk`."""

    def __init__(self, chunk: Chunk, cfg: ModelConfig, ctx: ParallelContext):
        super().__init__()
        (cut,) = chunk.cuts
        self.axis, self.replicas, self.eps = ctx.tensor, ctx.tensor.size // cut.parts, cfg.norm_eps
        self.weight = new_parameter(ShardSpec((chunk,), role=Role.VECTOR), ctx)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., local features] -> the same shape."""
        return sharded_rms_norm(x, self.weight, self.eps, self.axis, self.replicas)


def vocab_weight(name: str, role: Role, cfg: ModelConfig, ctx: ParallelContext) -> Parameter:
    """This rank's slice [v, h] of an embedding or head matrix.

    With cfg.tie_embeddings the first and last pipeline stage hold replicas under one canonical name, and their
    gradients are summed.
    """
    shape, tied = (cfg.vocab_size, cfg.hidden_size), ("tied_stages",) if cfg.tie_embeddings else ()
    chunk = Chunk(name, shape, (Cut(0, ctx.tensor.size),), tied)
    return new_parameter(ShardSpec((chunk,), init_std=cfg.init_std, role=role), ctx)


class VocabEmbedding(nn.Module):
    """Vocabulary-parallel token embedding: tokens [b, s] -> [s, b, h], times `scale`."""

    def __init__(self, weight: Parameter, ctx: ParallelContext, scale: float = 1.0):
        super().__init__()
        self.replicated, self.sequence, self.weight = ctx.replicated, ctx.sequence, weight
        self.start = weight.spec.pieces(ctx)[0].offset[0]
        self.scale = torch.tensor(scale, dtype=ctx.dtype).item()  # as in Gemma: rounded to the weights' dtype

    def forward(self, tokens: Tensor) -> Tensor:
        x = reduce_partial_sums(
            embedding(self.weight, tokens.t().contiguous(), self.start), self.replicated, self.sequence
        )
        return x if self.scale == 1 else x * self.scale


class PositionEmbedding(nn.Module):
    """Learned absolute position embedding; each rank looks up the positions of its part of the sequence."""

    def __init__(self, name: str, cfg: ModelConfig, ctx: ParallelContext):
        super().__init__()
        self.sequence = ctx.sequence
        chunk = Chunk(name, (cfg.max_seq_len, cfg.hidden_size), sum_over=("sequence",))
        self.weight = new_parameter(ShardSpec((chunk,), init_std=cfg.init_std, role=Role.EMBEDDING), ctx)

    def forward(self, x: Tensor, sequence: Sequence) -> Tensor:
        """Add the position embeddings to x [s, b, h]. sequence: the whole one, of all ranks."""
        positions = sequence.positions.t().chunk(self.sequence.size)[self.sequence.rank]
        return x + embedding(self.weight, positions.contiguous(), 0)


class VocabHead(nn.Module):
    """Vocabulary-parallel output projection, fused with the cross entropy loss."""

    def __init__(self, weight: Parameter, ctx: ParallelContext):
        super().__init__()
        self.replicated, self.sequence, self.weight = ctx.replicated, ctx.sequence, weight
        piece = weight.spec.pieces(ctx)[0]
        self.vocab_slice = VocabSlice(piece.offset[0], piece.shape[0], ctx.tensor)
        self.vocab_size = piece.global_shape[0]

    def forward(self, x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """x [s, b, h], labels and weights [b, s] -> [b], each sample's sum of token losses (nats) times weights."""
        targets, weights = labels.t(), weights.t()
        axes = self.replicated, self.sequence
        return linear_cross_entropy(x, self.weight, targets, weights, self.vocab_slice, *axes).sum(0)

    def logits(self, x: Tensor) -> Tensor:
        """x [s, b, h] -> logits [s, b, vocab_size], gathered on every tensor rank; without autograd."""
        with torch.no_grad():
            local = all_gather(x, self.sequence) @ self.weight.t()
            return all_gather(local, self.vocab_slice.axis, dim=-1)[..., : self.vocab_size]
