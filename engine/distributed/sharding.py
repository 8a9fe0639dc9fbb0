"""ShardSpec: how a parameter is sharded, declared once where the parameter is created.

Goal: one typed record that initialisation, gradient reduction, clipping, checkpoints, Hugging Face conversion and
memory estimates all use. Invariants:

* A *canonical tensor* is unfused and global: `layers.3.attention.q.weight` of shape [num_heads * head_dim, hidden].
  A fused parameter (q|k|v, gate|up) is several chunks, each a canonical tensor, concatenated along `dim`.
* `pieces(ctx)` lists, for one rank, the rectangle of each canonical tensor that it holds and its position in the local
  parameter. No other code computes an offset.
* A chunk with fewer parts than there are tensor ranks is replicated: rank r holds part r * parts // ranks.
* The last part may be short (a vocabulary that the tensor degree does not divide); the local rows beyond it are
  padding: zero weight, zero gradient, in no checkpoint.
* Replicas start bitwise equal and receive equal gradients. If each replica computes only part of the gradient (KV heads
  shared by ranks, QK-norms, tied embeddings), `sum_over` names the axis over which the parts are summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from engine.distributed.context import ParallelContext
from engine.distributed.rng import generator


@dataclass(frozen=True)
class Chunk:
    """One canonical tensor inside a parameter.

    name: canonical name. size: global length along the spec's `dim`. parts: number of parts it is sharded into over the
    tensor axis. sum_over: axes whose ranks each compute only a part of the gradient of the same values.
    """

    name: str
    size: int
    parts: int = 1
    sum_over: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """The rectangle of one canonical tensor that one rank holds.

    offset, shape: in the canonical tensor. start: offset in the local parameter, along `dim`.
    counted: True on exactly one of the ranks that hold these values: the one that counts them in norms and saves them.
    """

    name: str
    global_shape: tuple[int, ...]
    dim: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    sum_over: tuple[str, ...]
    counted: bool

    def of(self, local: Tensor) -> Tensor:
        """The piece as a view of the local parameter (or of a tensor of the same shape)."""
        return local.narrow(self.dim, self.start, self.shape[self.dim])

    def flat_range(self) -> tuple[int, int]:
        """The piece's row-major range [begin, end) of elements in the local parameter.

        It is a single range, because a piece is either whole rows or the whole parameter.
        """
        assert self.dim == 0 or self.start == 0
        width = math.prod(self.shape[1:]) if self.dim == 0 else 1
        begin = self.start * width
        return begin, begin + math.prod(self.shape)

    def rectangles(self, begin: int, end: int) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
        """The part of elements [begin, end) of the local parameter that is in the piece, as rectangles of its tensor.

        Each is (offset, shape, first element). There are at most three: the end of a row, whole rows, the start of a
        row.
        """
        first, last = self.flat_range()
        low, high, width = max(begin, first) - first, min(end, last) - first, math.prod(self.shape[1:])
        if low >= high:
            return []
        whole = (-(-low // width) * width, high // width * width)  # from the first whole row to after the last
        cuts = [low, *whole, high] if whole[0] <= whole[1] else [low, high]
        found = []
        for a, b in pairwise(cuts):
            if a < b:
                row, column = divmod(a, width)
                shape = ((b - a) // width, *self.shape[1:]) if (b - a) % width == 0 else (1, b - a)
                within = (row, column) if len(self.shape) == 2 else (row,)
                found.append((tuple(o + w for o, w in zip(self.offset, within)), shape, first + a))
        return found

    def cut(self, canonical: Tensor) -> Tensor:
        """The piece as a view of the whole canonical tensor."""
        for dim, (offset, length) in enumerate(zip(self.offset, self.shape)):
            canonical = canonical.narrow(dim, offset, length)
        return canonical


@dataclass(frozen=True)
class ShardSpec:
    """Sharding, initial values and weight decay of one parameter.

    chunks: canonical tensors along `dim`. other: length of the other dim of a matrix, None for a vector. init_std:
    standard deviation of the normal initial values, None for `init_value` everywhere. decay: whether weight decay
    applies (not to norms and biases).
    """

    chunks: tuple[Chunk, ...]
    dim: int = 0
    other: int | None = None
    init_std: float | None = None
    init_value: float = 1.0
    decay: bool = True

    def _shape(self, length: int) -> tuple[int, ...]:
        if self.other is None:
            return (length,)
        return (length, self.other) if self.dim == 0 else (self.other, length)

    def local_shape(self) -> tuple[int, ...]:
        """Shape of the parameter on every rank (padding included)."""
        return self._shape(sum(-(-c.size // c.parts) for c in self.chunks))

    def pieces(self, ctx: ParallelContext) -> list[Piece]:
        """The pieces that this rank holds, one per chunk, in local order."""
        pieces, start = [], 0
        for chunk in self.chunks:
            length = -(-chunk.size // chunk.parts)
            replicas = ctx.tensor.size // chunk.parts
            begin = ctx.tensor.rank // replicas * length
            shape = self._shape(max(0, min(length, chunk.size - begin)))
            offset = tuple(min(begin, chunk.size) if d == self.dim else 0 for d in range(len(shape)))
            counted = ctx.tensor.rank % replicas == 0 and (
                "tied_stages" not in chunk.sum_over or ctx.tied_stages.rank == 0
            )
            pieces.append(
                Piece(chunk.name, self._shape(chunk.size), self.dim, offset, shape, start, chunk.sum_over, counted)
            )
            start += length
        return pieces


class Parameter(nn.Parameter):
    """A parameter with its ShardSpec, and with the destination of its gradient.

    main_grad: a view into a flat gradient bucket (set by GradBuckets) to which the gradient of every microbatch is
    added; while it is None, gradients are ordinary autograd gradients in `.grad`. on_grad: called after each addition,
    so that the bucket knows when it is complete. deferred: while it is a list, matmuls append their weight gradients to
    it (ops.linear.WeightGrad) instead of computing them.
    """

    spec: ShardSpec
    main_grad: Tensor | None
    on_grad: Callable[[], None] | None
    deferred: list[Any] | None

    def __new__(cls, data: Tensor, spec: ShardSpec) -> Parameter:
        self = super().__new__(cls, data, True)
        self.spec = spec
        self.main_grad = None
        self.on_grad = None
        self.deferred = None
        return self

    def __init__(self, data: Tensor, spec: ShardSpec) -> None:
        super().__init__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Parameter:
        raise TypeError("a sharded Parameter is not copied: build the module again from its config")

    @property
    def name(self) -> str:
        """The canonical names of its chunks, for messages: `layers.0.attention.q.weight+...k.weight`."""
        return "+".join(c.name for c in self.spec.chunks)


def new_parameter(spec: ShardSpec, ctx: ParallelContext) -> Parameter:
    """An uninitialised parameter of the spec's local shape, in the context's dtype and device."""
    return Parameter(torch.empty(spec.local_shape(), dtype=ctx.dtype, device=ctx.device), spec)


def parameters(module: nn.Module) -> list[Parameter]:
    """The module's parameters, each once, in module order; every one of them carries a spec."""
    found = list(module.parameters())
    for p in found:
        assert isinstance(p, Parameter), "every parameter of a parallel model is a sharding.Parameter"
    return found  # type: ignore[return-value]


def initialise_(params: Iterable[Parameter], ctx: ParallelContext, seed: int) -> None:
    """Initialise parameters in place, with values that do not depend on layout, device or dtype.

    Each canonical tensor is drawn whole in float32 from (seed, name), and each rank keeps its piece. Peak extra memory:
    one canonical tensor.
    """
    with torch.no_grad():
        for p in params:
            p.zero_()
            for piece in p.spec.pieces(ctx):
                whole = torch.empty(piece.global_shape, dtype=torch.float32)
                if p.spec.init_std is None:
                    whole.fill_(p.spec.init_value)
                else:
                    whole.normal_(0.0, p.spec.init_std, generator=generator(seed, "init", piece.name))
                piece.of(p).copy_(piece.cut(whole))
