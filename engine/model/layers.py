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

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.batch import MicroBatch, Sequence
from engine.config.schema import ModelConfig
from engine.distributed.collectives import all_gather, reduce_partial_sums
from engine.distributed.context import ParallelContext
from engine.distributed.sharding import Parameter, new_parameter
from engine.distributed.specs import ShardSpec
from engine.model.build import StageShape
from engine.model.declarations import NO_RECOMPUTE, RecomputePolicy
from engine.model.layer_specs import WeightSpecs
from engine.ops.embedding import embedding
from engine.ops.linear import RecomputeRecipe, linear
from engine.ops.loss import VocabSlice, linear_cross_entropy
from engine.ops.matmul import PLAIN_MATMUL, MatmulBackend
from engine.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm, sharded_rms_norm
from engine.part import Boundary, Output


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


DEFAULT_BACKENDS = ComputeBackends()


@dataclass(frozen=True)
class Build:
    """What the modules of a stage are built with, in addition to their own settings and specs.

    recompute: mode of the block that is being built (RecomputePolicy.mode_of). z_loss: coefficient of the z-loss.
    dropout, attention_dropout: probabilities, as in TrainConfig.
    """

    ctx: ParallelContext
    policy: RecomputePolicy = NO_RECOMPUTE
    backends: ComputeBackends = DEFAULT_BACKENDS
    recompute: str = "none"
    z_loss: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0

    @property
    def tensor(self) -> int:
        """Number of tensor ranks, across which the declarations shard."""
        return self.ctx.tensor.size

    def of_block(self, index: int) -> Build:
        """For the block at position `index` of its stage."""
        return replace(self, recompute=self.policy.mode_of(index))

    def parameters(self, specs: WeightSpecs) -> tuple[Parameter, Parameter | None]:
        """New, uninitialised parameters of a linear layer or a norm: (weight, bias or None)."""
        bias = None if specs.bias is None else new_parameter(specs.bias, self.ctx)
        return new_parameter(specs.weight, self.ctx), bias


class ModelPart(nn.Module, ABC):
    """The part of a model in one pipeline stage. A model type's class is derived from it (engine.model.build).

    layers: its blocks by their number in the whole model. sums: the names of the sums of its outputs (engine.part).
    """

    layers: nn.ModuleDict
    sums: tuple[str, ...] = ()

    def __init__(self, cfg: ModelConfig, ctx: ParallelContext, shape: StageShape):
        super().__init__()
        self.cfg, self.ctx, self.shape = cfg, ctx, shape

    def use(self, cfg: ModelConfig) -> None:
        """Compute with other RoPE settings from now on; nothing else of `cfg` may differ."""
        self.cfg = cfg

    @abstractmethod
    def boundary(self, batch: MicroBatch) -> Boundary:
        """The tensors that it takes from the stage before, as in `engine.part.Part`."""

    @abstractmethod
    def forward(self, inputs: tuple[Tensor, ...], batch: MicroBatch) -> Output:
        """Run on the tensors of `boundary` and on a micro-batch, as in `engine.part.Part`."""

    @abstractmethod
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits: tokens [b, s] -> [b, s, vocab_size]. Only for a model whose stages are all on this pipeline rank."""


class ColumnLinear(nn.Module):
    """Column-parallel linear: [s, b, h] -> [s, b, local out], weight rows (output features) and bias sharded.

    Under sequence parallelism the input is this rank's part of the sequence; it is gathered, and the output covers the
    whole sequence.
    """

    def __init__(self, specs: WeightSpecs, build: Build):
        super().__init__()
        ctx, self.matmul = build.ctx, build.backends.matmul
        self.replicated, self.sequence, self.keep_gathered = ctx.replicated, ctx.sequence, build.policy.keep_gathered
        self.weight, self.bias = build.parameters(specs)

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

    def __init__(self, specs: WeightSpecs, build: Build):
        super().__init__()
        ctx, self.matmul = build.ctx, build.backends.matmul
        self.replicated, self.sequence, self.self_axis = ctx.replicated, ctx.sequence, ctx.self_axis
        self.weight, self.bias = build.parameters(specs)

    def forward(self, x: Tensor, recipe: RecomputeRecipe | None = None) -> Tensor:
        """recipe: recompute x in the backward instead of saving it."""
        partial_sums = linear(x, self.weight, self.self_axis, self.self_axis, recipe=recipe, matmul=self.matmul)
        out = reduce_partial_sums(partial_sums, self.replicated, self.sequence)
        return out if self.bias is None else out + self.bias


class Norm(nn.Module):
    """RMSNorm or LayerNorm (cfg.norm) over the last dim; weight and bias are replicated across tensor ranks."""

    def __init__(self, specs: WeightSpecs, cfg: ModelConfig, build: Build):
        super().__init__()
        self.weight, self.bias = build.parameters(specs)
        fuse, eps = build.backends.fuse, cfg.norm_eps
        rms: dict[str, float] = {"eps": eps, "offset": float(cfg.norm_offset)}
        self.function: Callable[..., Tensor] = partial(fuse(rms_norm), **rms)
        self.add_norm_function: Callable[..., tuple[Tensor, Tensor]] = partial(fuse(add_rms_norm), **rms)
        if cfg.norm == "layernorm":
            self.function = partial(fuse(layer_norm), eps=eps)
            self.add_norm_function = partial(fuse(add_layer_norm), eps=eps)

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
    """RMSNorm over a whole projection (QK-norm of OLMo 2), features sharded across the tensor axis."""

    def __init__(self, spec: ShardSpec, cfg: ModelConfig, ctx: ParallelContext):
        super().__init__()
        ((cut,),) = (chunk.cuts for chunk in spec.chunks)
        self.axis, self.replicas, self.eps = ctx.tensor, ctx.tensor.size // cut.parts, cfg.norm_eps
        self.weight = new_parameter(spec, ctx)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., local features] -> the same shape."""
        return sharded_rms_norm(x, self.weight, self.eps, self.axis, self.replicas)


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

    def __init__(self, spec: ShardSpec, ctx: ParallelContext):
        super().__init__()
        self.sequence, self.weight = ctx.sequence, new_parameter(spec, ctx)

    def forward(self, x: Tensor, sequence: Sequence) -> Tensor:
        """Add the position embeddings to x [s, b, h]. sequence: the whole one, of all ranks."""
        positions = sequence.positions.t().chunk(self.sequence.size)[self.sequence.rank]
        return x + embedding(self.weight, positions.contiguous(), 0)


class VocabHead(nn.Module):
    """Vocabulary-parallel output projection, fused with the cross entropy loss and the z-loss of that coefficient."""

    def __init__(self, weight: Parameter, ctx: ParallelContext, z_loss: float = 0.0):
        super().__init__()
        self.z_loss = z_loss
        self.replicated, self.sequence, self.weight = ctx.replicated, ctx.sequence, weight
        piece = weight.spec.pieces(ctx)[0]
        self.vocab_slice = VocabSlice(piece.offset[0], piece.shape[0], ctx.tensor)
        self.vocab_size = piece.global_shape[0]

    def forward(self, x: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """x [s, b, h] -> float64 [b], each sample's sum of token losses (nats) times weights, and the z-loss, a scalar.

        The z-loss is the sum of coefficient * shares * (log Z)^2; None if the coefficient is 0.
        """
        shares = batch.weights if batch.shares is None else batch.shares
        weights, z_weights = batch.weights.t(), shares.t() * self.z_loss if self.z_loss else None
        of_ranks = self.vocab_slice, self.replicated, self.sequence
        losses, z_losses = linear_cross_entropy(x, self.weight, batch.labels.t(), weights, *of_ranks, z_weights)
        of_samples = losses.t().contiguous()  # summed by rows, so in an order that does not depend on b
        return of_samples.sum(1, dtype=torch.float64), None if z_losses is None else z_losses.sum()

    def logits(self, x: Tensor) -> Tensor:
        """x [s, b, h] -> logits [s, b, vocab_size], gathered on every tensor rank; without autograd."""
        with torch.no_grad():
            local = all_gather(x, self.sequence) @ self.weight.t()
            return all_gather(local, self.vocab_slice.axis, dim=-1)[..., : self.vocab_size]
