"""ShardSpec: how a parameter is sharded, declared once where the parameter is created. Needs no torch.

Goal: one typed record that initialisation, gradient reduction, the optimizer, clipping, checkpoints, Hugging Face
conversion and memory estimates all use. Invariants:

* A *canonical tensor* is unfused and global: `layers.3.attention.q.weight` of shape [num_heads * head_dim, hidden].
  A fused parameter (q|k|v, gate|up) is several chunks, each a canonical tensor. Each chunk is one contiguous run of the
  flat parameter, and says itself along which dims and axes it is cut.
* `pieces(grid)` lists, for one rank, the rectangle of each canonical tensor that it holds and its run of the local
  parameter. No other code computes an offset.
* A chunk with fewer parts than its axis has ranks is replicated: rank r holds part r * parts // ranks.
* The last part along dim 0 may be short (a vocabulary that the tensor degree does not divide); the local rows beyond it
  are padding: zero weight, zero gradient, in no checkpoint.
* Replicas start bitwise equal and receive equal gradients. If each replica computes only part of the gradient (KV heads
  shared by ranks, QK-norms, tied embeddings), `sum_over` names the axes over which the parts are summed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from engine.distributed.layout import Splits, axes_that_split


class AxisView(Protocol):
    """An axis as seen from one rank: its size, the rank's position in it, and all its ranks."""

    @property
    def size(self) -> int: ...

    @property
    def rank(self) -> int: ...

    @property
    def ranks(self) -> tuple[int, ...]: ...


class Grid(Protocol):
    """One rank's place in the mesh: a ParallelContext, or a Place where no processes exist."""

    def axis(self, name: str) -> AxisView:
        """The axis of that name."""


class Role(StrEnum):
    """What a parameter is for: optimizer groups, weight decay and update rules select by it.

    MATRIX: weight of a linear layer. EMBEDDING: a table whose rows are looked up, also if it is tied to the head.
    HEAD: the output projection. VECTOR: norms and biases.
    """

    MATRIX = "matrix"
    EMBEDDING = "embedding"
    HEAD = "head"
    VECTOR = "vector"


@dataclass(frozen=True)
class Cut:
    """One dim of a canonical tensor, cut into `parts` equal parts across an axis of the mesh."""

    dim: int
    parts: int
    axis: str = "tensor"


@dataclass(frozen=True)
class Chunk:
    """One canonical tensor inside a parameter: a contiguous run of it.

    name, shape: of the canonical tensor. cuts: at most one per axis and dim. sum_over: axes whose ranks each compute
    only a part of the gradient of the same values.
    """

    name: str
    shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()
    sum_over: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert len({c.dim for c in self.cuts}) == len({c.axis for c in self.cuts}) == len(self.cuts), self
        uneven = [c for c in self.cuts if c.dim > 0 and self.shape[c.dim] % c.parts]
        assert not uneven, f"{self.name}: only dim 0 can be padded, {uneven}"  # a piece is a contiguous run

    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part that a rank holds, with padding."""
        parts = {cut.dim: cut.parts for cut in self.cuts}
        return tuple(-(-length // parts.get(dim, 1)) for dim, length in enumerate(self.shape))


@dataclass(frozen=True)
class Piece:
    """The rectangle of one canonical tensor that one rank holds.

    offset, shape: in the canonical tensor. begin, end: the elements [begin, end) of the local parameter, row-major.
    counted: True on one group of replicas (ShardSpec.replicas) among all ranks that hold these values. Each rank of
    that group counts the range that it owns in norms and saves it.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    begin: int
    end: int
    sum_over: tuple[str, ...]
    counted: bool

    def rectangles(self, begin: int, end: int) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
        """The part of elements [begin, end) of the local parameter that is in the piece, as rectangles of its tensor.

        Each is (offset, shape, first element). A matrix has at most three: the end of a row, whole rows, the start of a
        row.
        """
        low, high = max(begin, self.begin) - self.begin, min(end, self.end) - self.begin
        found, first = [], self.begin + low
        for offset, shape in _rectangles(self.shape, low, high):
            found.append((tuple(o + w for o, w in zip(self.offset, offset)), shape, first))
            first += math.prod(shape)
        return found


def _rectangles(shape: tuple[int, ...], low: int, high: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The row-major elements [low, high) of an array of this shape as (offset, shape) of rectangles, in order."""
    if low >= high:
        return []
    if len(shape) == 1:
        return [((low,), (high - low,))]
    width = math.prod(shape[1:])
    first, last = -(-low // width), high // width  # whole rows [first, last)

    def within(row: int, a: int, b: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        return [((row, *offset), (1, *extent)) for offset, extent in _rectangles(shape[1:], a, b)]

    if first > last:
        return within(last, low - last * width, high - last * width)
    head = within(first - 1, low - (first - 1) * width, width) if low < first * width else []
    whole = [((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))] if first < last else []
    return head + whole + within(last, 0, high - last * width)


@dataclass(frozen=True)
class ShardSpec:
    """Sharding, initial values, role and replicas of one parameter.

    chunks: canonical tensors, concatenated along dim 0; their local shapes are equal in the other dims. init_std:
    standard deviation of the normal initial values, None for `init_value` everywhere. trainable: False for a frozen
    parameter, which has no gradient and no optimizer state. replicas: the axis whose ranks hold the same values and
    divide the work on them: gradients are summed over it, and ZeRO-1 shards over it.
    """

    chunks: tuple[Chunk, ...]
    init_std: float | None = None
    init_value: float = 1.0
    role: Role = Role.MATRIX
    trainable: bool = True
    replicas: str = "data_context"

    def local_shape(self) -> tuple[int, ...]:
        """Shape of the parameter on every rank (padding included)."""
        shapes = [chunk.local_shape() for chunk in self.chunks]
        assert len({shape[1:] for shape in shapes}) == 1, f"chunks of different widths: {self.chunks}"
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def pieces(self, grid: Grid) -> list[Piece]:
        """The pieces that this rank holds, one per chunk, in local order."""
        pieces, start = [], 0
        for chunk in self.chunks:
            local = chunk.local_shape()
            offset, shape = [0] * len(local), list(local)
            for cut in chunk.cuts:
                axis, length = grid.axis(cut.axis), local[cut.dim]
                begin = min(axis.rank * cut.parts // axis.size * length, chunk.shape[cut.dim])
                offset[cut.dim], shape[cut.dim] = begin, min(length, chunk.shape[cut.dim] - begin)
            counted = self._counts(chunk, grid)
            where, held = tuple(offset), tuple(shape)
            end = start + math.prod(held)
            pieces.append(Piece(chunk.name, chunk.shape, where, held, start, end, chunk.sum_over, counted))
            start += math.prod(local)
        return pieces

    def _counts(self, chunk: Chunk, grid: Grid) -> bool:
        """Whether this rank's replicas have, along every axis, the first of the ranks that hold this part."""
        parts, replicas = {cut.axis: cut.parts for cut in chunk.cuts}, grid.axis(self.replicas).ranks
        cut = [grid.axis(name).ranks for name in parts]
        for name in axes_that_split(Splits.SAMPLES, Splits.POSITIONS, Splits.WEIGHTS):
            if not any(all(rank in ranks for rank in grid.axis(name).ranks) for ranks in cut):
                parts[name] = 1
        first = True
        for name, n in parts.items():
            axis = grid.axis(name)
            same = axis.size // n  # ranks with the same part
            first = first and axis.ranks[axis.rank // same * same] in replicas
        return first and ("tied_stages" not in chunk.sum_over or grid.axis("tied_stages").rank == 0)


def tensor_names(specs: Iterable[ShardSpec]) -> list[str]:
    """The canonical names of the tensors of these parameters, each once (tied ones have two parameters)."""
    return list(dict.fromkeys(chunk.name for spec in specs for chunk in spec.chunks))
