"""Parallel layers. Each takes the context and its canonical name, and states its ShardSpec where it makes its weight.

Shape legend (all files of the model):
    s  sequence     b  micro-batch     h  hidden     t  ranks of the tensor axis
    n  local query heads (num_heads / t)     m  local KV heads     d  head_dim
    f  local inner width (ffn_size / t)      v  local vocabulary (vocab_size / t, rounded up)
Activations between blocks are [s, b, h], the same on every tensor rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.comm import all_gather, reduce_from
from engine.context import ParallelContext
from engine.ops.embedding import embedding
from engine.ops.linear import linear
from engine.ops.loss import cross_entropy
from engine.ops.norm import rms_norm
from engine.sharding import Chunk, Parameter, ShardSpec, new_parameter


class ColumnLinear(nn.Module):
    """[..., h] -> [..., local out]: rows of the weight (output features) are cut over the tensor axis."""

    def __init__(self, chunks: tuple[Chunk, ...], in_size: int, init_std: float, ctx: ParallelContext):
        super().__init__()
        self.axis = ctx.tensor
        self.weight = new_parameter(ShardSpec(chunks, dim=0, other=in_size, init_std=init_std), ctx)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, reduce_input_grad=self.axis)


class RowLinear(nn.Module):
    """[..., local in] -> [..., h]: columns of the weight (input features) are cut; partial outputs are summed."""

    def __init__(self, name: str, in_size: int, out_size: int, init_std: float, ctx: ParallelContext):
        super().__init__()
        self.axis, self.alone = ctx.tensor, ctx.alone
        chunk = Chunk(name, in_size, parts=ctx.tensor.size)
        self.weight = new_parameter(ShardSpec((chunk,), dim=1, other=out_size, init_std=init_std), ctx)

    def forward(self, x: Tensor) -> Tensor:
        return reduce_from(linear(x, self.weight, reduce_input_grad=self.alone), self.axis)


class RMSNorm(nn.Module):
    """RMSNorm over the last dim; the weight is whole on every tensor rank.

    sum_over names the axis whose ranks each see only part of the weight's gradient ("tensor" for the QK-norms: a rank
    normalises only its own heads).
    """

    def __init__(self, name: str, size: int, eps: float, ctx: ParallelContext, sum_over: tuple[str, ...] = ()):
        super().__init__()
        self.eps = eps
        self.weight = new_parameter(ShardSpec((Chunk(name, size, sum_over=sum_over),), decay=False), ctx)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def vocab_weight(name: str, vocab_size: int, hidden: int, std: float, tied: bool, ctx: ParallelContext) -> Parameter:
    """A [v, h] slice of an embedding or head matrix. Tied ones live on both pipeline ends under one canonical name."""
    chunk = Chunk(name, vocab_size, parts=ctx.tensor.size, sum_over=("ends",) if tied else ())
    return new_parameter(ShardSpec((chunk,), dim=0, other=hidden, init_std=std), ctx)


class VocabEmbedding(nn.Module):
    """tokens [b, s] -> [s, b, h]; each tensor rank looks up its slice of the vocabulary."""

    def __init__(self, weight: Parameter, ctx: ParallelContext):
        super().__init__()
        self.axis, self.weight = ctx.tensor, weight
        self.start = weight.spec.pieces(ctx)[0].offset[0]

    def forward(self, tokens: Tensor) -> Tensor:
        return reduce_from(embedding(self.weight, tokens.t().contiguous(), self.start), self.axis)


class VocabHead(nn.Module):
    """Output projection and loss over the sliced vocabulary."""

    def __init__(self, weight: Parameter, ctx: ParallelContext):
        super().__init__()
        self.axis, self.weight = ctx.tensor, weight
        piece = weight.spec.pieces(ctx)[0]
        self.start, self.valid, self.vocab_size = piece.offset[0], piece.shape[0], piece.global_shape[0]

    def loss(self, x: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """x [s, b, h], labels and mask [b, s] -> the sum of the counted tokens' losses in nats (a scalar)."""
        logits = linear(x, self.weight, reduce_input_grad=self.axis)
        losses = cross_entropy(
            logits.view(-1, logits.shape[-1]), labels.t().reshape(-1), self.start, self.valid, self.axis
        )
        return (losses * mask.t().reshape(-1)).sum()

    def logits(self, x: Tensor) -> Tensor:
        """x [s, b, h] -> logits over the whole vocabulary [s, b, vocab_size], on every tensor rank; no gradient."""
        with torch.no_grad():
            local = x @ self.weight.t()
            return all_gather(local, self.axis, dim=-1)[..., : self.vocab_size]
