"""The rank grid: parallel degrees -> coordinates of every rank -> groups of every axis. Integers only.

The grid is [pipeline, data, context, tensor] with tensor fastest, so that the ranks that communicate most are
neighbours on one machine. It needs neither torch nor processes: planning 4,096 ranks costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from engine.errors import LayoutError

AXES = ("pipeline", "data", "context", "tensor")  # slowest to fastest


class AxisPlace(NamedTuple):
    """An axis as seen from one rank: its size, the rank's position in it, and all its ranks."""

    size: int
    rank: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """One rank's place in a layout without processes, enough for ShardSpec.pieces."""

    layout: Layout
    index: int

    def axis(self, name: str) -> AxisPlace:
        """The axis of that name, of the grid or derived (Layout.axes)."""
        ranks = self.layout.axes(self.index)[name]
        return AxisPlace(len(ranks), ranks.index(self.index), ranks)


class Coords(NamedTuple):
    """Coordinates of one rank in the grid."""

    pipeline: int
    data: int
    context: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism. Raises LayoutError unless their product is `world`, the number of ranks.

    sequence: sequence parallelism over the tensor axis (activations outside the matrices are sharded along s).
    tail: the pipeline rank that holds the last stage; -1: the last one.
    """

    world: int = 1
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    sequence: bool = False
    tail: int = -1

    def __post_init__(self) -> None:
        degrees = {axis: getattr(self, axis) for axis in AXES}
        for axis, degree in degrees.items():
            if degree < 1:
                raise LayoutError("distributed.degree-below-one", f"parallel.{axis} = {degree}: a degree is at least 1")
        product = self.pipeline * self.data * self.context * self.tensor
        if product != self.world:
            terms = " x ".join(f"{axis} {degree}" for axis, degree in degrees.items())
            raise LayoutError(
                "distributed.degrees-do-not-fit",
                f"{terms} = {product} ranks, but there are {self.world}: choose degrees whose product is {self.world}",
            )

    def coords(self, rank: int) -> Coords:
        """The grid position of a rank."""
        if not 0 <= rank < self.world:
            raise LayoutError("distributed.no-such-rank", f"rank {rank} is outside 0..{self.world - 1}")
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return Coords(pipeline, data, context, tensor)

    def rank(self, coords: Coords) -> int:
        """The rank at a grid position: the inverse of `coords`."""
        row = (coords.pipeline * self.data + coords.data) * self.context + coords.context
        return row * self.tensor + coords.tensor

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` along `axis` only, in axis order."""
        at = self.coords(rank)
        return tuple(self.rank(at._replace(**{axis: i})) for i in range(getattr(self, axis)))

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """All groups of an axis; they partition the ranks."""
        return tuple(self.group(axis, r) for r in range(self.world) if getattr(self.coords(r), axis) == 0)

    def tensor_replicas(self, rank: int, parts: int) -> tuple[int, ...]:
        """The tensor ranks that hold the same part as `rank` of a tensor sharded into `parts` over the tensor axis.

        parts divides the tensor degree t. Part i is held by the contiguous ranks [i * t / parts, (i + 1) * t / parts).
        """
        replicas = self.tensor // parts
        first = self.coords(rank).tensor // replicas * replicas
        return self.group("tensor", rank)[first : first + replicas]

    def tied_stages_group(self, rank: int) -> tuple[int, ...]:
        """The ranks of this rank's pipeline that hold the first and the last stage (both have the tied embedding).

        For any other rank, and if one rank holds both stages, the group is only that rank.
        """
        column = self.group("pipeline", rank)
        holders = (column[0], column[self.tail])
        return tuple(dict.fromkeys(holders)) if rank in holders else (rank,)

    def axes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The ranks of every axis of this rank: those of the grid and the derived ones, see ParallelContext.

        "tensor/P", for each divisor P of the tensor degree: `tensor_replicas(rank, P)`.
        """
        sequence = self.group("tensor", rank) if self.sequence else (rank,)
        at = self.coords(rank)
        data_context = [at._replace(data=d, context=c) for d in range(self.data) for c in range(self.context)]
        return {
            "world": tuple(range(self.world)),
            **{axis: self.group(axis, rank) for axis in ("tensor", "data", "context", "pipeline")},
            "data_context": tuple(map(self.rank, data_context)),
            "sequence": sequence,
            "replicated": (rank,) if self.sequence else self.group("tensor", rank),
            "tied_stages": self.tied_stages_group(rank),
            "self_axis": (rank,),
            **{
                f"tensor/{parts}": self.tensor_replicas(rank, parts)
                for parts in range(1, self.tensor + 1)
                if self.tensor % parts == 0
            },
        }

    def table(self) -> str:
        """The grid as text, one line per pipeline rank and data rank."""
        lines = []
        for pp in range(self.pipeline):
            for dp in range(self.data):
                ranks = [self.rank(Coords(pp, dp, cp, tp)) for cp in range(self.context) for tp in range(self.tensor)]
                lines.append(f"pipeline {pp:>3}  data {dp:>3}  ranks {ranks[0]}..{ranks[-1]}")
        return "\n".join(lines)
