"""Parallel layers. Each takes the context and its canonical name, and states its ShardSpec where it makes its weight.

Shape legend (all files of the model):
    s  sequence     b  micro-batch     h  hidden     t  ranks of the tensor axis
    n  local query heads (num_heads / t)     m  local KV heads     d  head_dim
    f  local inner width (ffn_size / t)      v  local vocabulary (vocab_size / t, rounded up)
Activations between blocks are [s, b, h] on the axis `ctx.replicated`: the same on every tensor rank. Under sequence
parallelism they are [s / t, b, h], a part on each rank of `ctx.sequence`; s below stands for either. One of the two
axes has one rank, where every collective is the identity, so no layer asks which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.batch import Documents
from engine.config.schema import ModelConfig
from engine.distributed.collectives import all_gather, reduce_partial_sums
from engine.distributed.context import ParallelContext
from engine.distributed.sharding import Chunk, Parameter, ShardSpec, new_parameter
from engine.ops.embedding import embedding
from engine.ops.linear import RecomputeRecipe, linear
from engine.ops.loss import VocabSlice, linear_cross_entropy
from engine.ops.matmul import PLAIN_MATMUL, MatmulBackend
from engine.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm, sharded_rms_norm


@dataclass(frozen=True)
class RecomputePolicy:
    """What a block keeps for its backward (docs/training.md has the bytes).

    recompute: "none"; "selective": norms, activations and attention core are computed again; "full": the block is,
    from its input. layers: in how many blocks of a stage, from its first; 0: all. keep_gathered: the inputs of
    column-parallel products, whole instead of a part of the sequence each.
    """

    recompute: str = "none"
    layers: int = 0
    keep_gathered: bool = False

    def of(self, index: int) -> str:
        """What the block number `index` of a stage recomputes."""
        return self.recompute if not self.layers or index < self.layers else "none"


def _as_it_is(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


@dataclass(frozen=True)
class ComputeBackends:
    """What a block computes with. attention: of ops.attention. products: of its matrices.

    fuse: what is done to each function between products, attention and collectives before it is used.
    """

    attention: str = "auto"
    matmul: MatmulBackend = PLAIN_MATMUL
    fuse: Callable[[Callable[..., Any]], Callable[..., Any]] = _as_it_is


def bias_of(chunk: Chunk) -> Chunk:
    """The bias that belongs to a chunk of output features, cut and summed as they are."""
    return replace(chunk, name=chunk.name.removesuffix("weight") + "bias")


class ColumnLinear(nn.Module):
    """[s, b, h] -> [s, b, local out]: rows of the weight (output features) are cut over the tensor axis, and the bias.

    Takes a part of the sequence where it is cut, gives all of it.
    """

    def __init__(
        self,
        chunks: tuple[Chunk, ...],
        in_size: int,
        init_std: float,
        ctx: ParallelContext,
        keep_gathered: bool,
        matmul: MatmulBackend,
        bias: bool = False,
    ):
        super().__init__()
        self.replicated, self.sequence, self.keep_gathered = ctx.replicated, ctx.sequence, keep_gathered
        self.matmul = matmul
        self.weight = new_parameter(ShardSpec(chunks, dim=0, other=in_size, init_std=init_std), ctx)
        self.bias: Parameter | None = None
        if bias:
            self.bias = new_parameter(ShardSpec(tuple(map(bias_of, chunks)), init_value=0.0, decay=False), ctx)

    def forward(self, x: Tensor, recipe: RecomputeRecipe | None = None) -> Tensor:
        """recipe: recomputes x instead of saving it."""
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
    """[s, b, local in] -> [s, b, h]: columns of the weight (input features) are cut; partial outputs are summed.

    Gives a part of the sequence where it is cut. The bias is whole on every tensor rank and added once, to the sum.
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
        self.replicated, self.sequence, self.self_axis, self.matmul = (
            ctx.replicated,
            ctx.sequence,
            ctx.self_axis,
            matmul,
        )
        chunk = Chunk(name, in_size, parts=ctx.tensor.size)
        self.weight = new_parameter(ShardSpec((chunk,), dim=1, other=out_size, init_std=init_std), ctx)
        self.bias: Parameter | None = None
        if bias:
            whole = bias_of(Chunk(name, out_size, sum_over=("sequence",)))
            self.bias = new_parameter(ShardSpec((whole,), init_value=0.0, decay=False), ctx)

    def forward(self, x: Tensor, recipe: RecomputeRecipe | None = None) -> Tensor:
        """recipe: recomputes x instead of saving it."""
        partial_sums = linear(x, self.weight, self.self_axis, self.self_axis, recipe=recipe, matmul=self.matmul)
        out = reduce_partial_sums(partial_sums, self.replicated, self.sequence)
        return out if self.bias is None else out + self.bias


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dim, as the config says; weight and bias are whole on every tensor rank.

    sum_over names the axis whose ranks each see only part of the weight's gradient: "sequence" where a rank normalises
    its part of the sequence, "tensor" where it normalises its own heads (QK-norms).
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
        chunk = Chunk(f"{name}.weight", size, sum_over=(sum_over,))
        offset = float(cfg.norm_offset)
        self.weight = new_parameter(ShardSpec((chunk,), init_value=1.0 - offset, decay=False), ctx)
        self.bias: Parameter | None = None
        rms: dict[str, float] = {"eps": cfg.norm_eps, "offset": offset}
        self.function: Callable[..., Tensor] = partial(backends.fuse(rms_norm), **rms)
        self.after_sum: Callable[..., tuple[Tensor, Tensor]] = partial(backends.fuse(add_rms_norm), **rms)
        if cfg.norm == "layernorm":
            self.bias = new_parameter(ShardSpec((bias_of(chunk),), init_value=0.0, decay=False), ctx)
            self.function = partial(backends.fuse(layer_norm), eps=cfg.norm_eps)
            self.after_sum = partial(backends.fuse(add_layer_norm), eps=cfg.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(*self._inputs(x))

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x + residual, and the norm of it."""
        return self.after_sum(*self._inputs(x, residual))

    def _inputs(self, *x: Tensor) -> tuple[Tensor, ...]:
        return (*x, self.weight) if self.bias is None else (*x, self.weight, self.bias)

    def recipe(self, x: Tensor) -> RecomputeRecipe:
        """How to get `self(x)` again from x, which the norm keeps anyway."""
        return RecomputeRecipe(self.function, self._inputs(x))


class ShardedRMSNorm(nn.Module):
    """RMSNorm over a whole projection whose features are cut over the tensor axis, as `chunk` says."""

    def __init__(self, chunk: Chunk, cfg: ModelConfig, ctx: ParallelContext):
        super().__init__()
        self.axis, self.replicas, self.eps = ctx.tensor, ctx.tensor.size // chunk.parts, cfg.norm_eps
        self.weight = new_parameter(ShardSpec((chunk,), decay=False), ctx)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., local features] -> the same shape."""
        return sharded_rms_norm(x, self.weight, self.eps, self.axis, self.replicas)


def vocab_weight(name: str, vocab_size: int, hidden: int, std: float, tied: bool, ctx: ParallelContext) -> Parameter:
    """A [v, h] slice of an embedding or head matrix. Tied ones live on both pipeline ends under one canonical name."""
    chunk = Chunk(name, vocab_size, parts=ctx.tensor.size, sum_over=("tied_stages",) if tied else ())
    return new_parameter(ShardSpec((chunk,), dim=0, other=hidden, init_std=std), ctx)


class VocabEmbedding(nn.Module):
    """tokens [b, s] -> [s, b, h] times `scale`; each tensor rank looks up its slice of the vocabulary."""

    def __init__(self, weight: Parameter, ctx: ParallelContext, scale: float = 1.0):
        super().__init__()
        self.replicated, self.sequence, self.weight = ctx.replicated, ctx.sequence, weight
        self.start = weight.spec.pieces(ctx)[0].offset[0]
        self.scale = torch.tensor(scale, dtype=ctx.dtype).item()  # Gemma: rounded as the weights are

    def forward(self, tokens: Tensor) -> Tensor:
        x = reduce_partial_sums(
            embedding(self.weight, tokens.t().contiguous(), self.start), self.replicated, self.sequence
        )
        return x if self.scale == 1 else x * self.scale


class PositionEmbedding(nn.Module):
    """A learned vector for each position; a rank looks up those of its part of the sequence."""

    def __init__(self, name: str, cfg: ModelConfig, ctx: ParallelContext):
        super().__init__()
        self.sequence = ctx.sequence
        chunk = Chunk(name, cfg.max_seq_len, sum_over=("sequence",))
        self.weight = new_parameter(ShardSpec((chunk,), dim=0, other=cfg.hidden_size, init_std=cfg.init_std), ctx)

    def forward(self, x: Tensor, documents: Documents | None) -> Tensor:
        """Add them to x [s, b, h]. documents, of the whole sequence: positions start again in each."""
        if documents is None:
            positions = torch.arange(x.shape[0] * self.sequence.size, device=x.device)[None]
        else:
            positions = documents.positions
        position = positions.t().chunk(self.sequence.size)[self.sequence.rank]
        return x + embedding(self.weight, position.contiguous(), 0)


class VocabHead(nn.Module):
    """Output projection and loss over the sliced vocabulary."""

    def __init__(self, weight: Parameter, ctx: ParallelContext):
        super().__init__()
        self.replicated, self.sequence, self.weight = ctx.replicated, ctx.sequence, weight
        piece = weight.spec.pieces(ctx)[0]
        self.part, self.vocab_size = VocabSlice(piece.offset[0], piece.shape[0], ctx.tensor), piece.global_shape[0]

    def forward(self, x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """x [s, b, h], labels and weights [b, s] -> each sample's weighted sum of its tokens' losses in nats [b]."""
        targets, weights = labels.t(), weights.t()
        return linear_cross_entropy(x, self.weight, targets, weights, self.part, self.replicated, self.sequence).sum(0)

    def logits(self, x: Tensor) -> Tensor:
        """x [s, b, h] -> logits over the whole vocabulary [s, b, vocab_size], on every tensor rank; no gradient."""
        with torch.no_grad():
            local = all_gather(x, self.sequence) @ self.weight.t()
            return all_gather(local, self.part.axis, dim=-1)[..., : self.vocab_size]
