"""The rank grid: parallel degrees -> coordinates of every rank -> groups of every axis. Integers only.

The grid is [pipeline, data, context, tensor] with tensor fastest, so that the ranks that communicate most are
neighbours on one machine. It needs neither torch nor processes: planning 4,096 ranks costs nothing.

AXES says what each axis splits. What a rank reads and counts, over which ranks gradients are summed, memory estimates
and texts follow from it: no other module lists the axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import NamedTuple

from engine.errors import LayoutError


class Splits(StrEnum):
    """What the ranks of an axis divide. LAYERS: into stages. SAMPLES: of the global batch. POSITIONS: of each sample.

    WEIGHTS: of a stage; such ranks compute with the same tokens and have the same losses. Weights are replicated across
    axes of samples and positions, and their gradients summed, except those whose ShardSpec says otherwise.
    """

    LAYERS = "layers"
    SAMPLES = "samples"
    POSITIONS = "positions"
    WEIGHTS = "weights"


# The axes of the grid, slowest to fastest; those of layers and samples first. Each is a degree of Layout and of the
# config's section `parallel`.
AXES = {
    "pipeline": Splits.LAYERS,
    "data": Splits.SAMPLES,
    "context": Splits.POSITIONS,
    "tensor": Splits.WEIGHTS,
}
_ALWAYS_SHOWN = ("tensor", "pipeline", "data")


def axes_that_split(*what: Splits) -> tuple[str, ...]:
    """The axes of the grid that split one of these, slowest first."""
    return tuple(axis for axis, splits in AXES.items() if splits in what)


def describe(degrees: Mapping[str, int]) -> str:
    """Degrees as text, such as "tensor 2 x pipeline 1 x data 4"; further axes only if their degree is above 1."""
    return " x ".join(f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1 or axis in _ALWAYS_SHOWN)


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
        degrees = self.degrees
        for axis, degree in degrees.items():
            if degree < 1:
                raise LayoutError("distributed.degree-below-one", f"parallel.{axis} = {degree}: a degree is at least 1")
        product = math.prod(degrees.values())
        if product != self.world:
            terms = " x ".join(f"{axis} {degrees[axis]}" for axis in AXES)
            raise LayoutError(
                "distributed.degrees-do-not-fit",
                f"{terms} = {product} ranks, but there are {self.world}: choose degrees whose product is {self.world}",
            )

    @property
    def degrees(self) -> dict[str, int]:
        """Axis of the grid -> number of ranks along it, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name in AXES}

    def ways(self, *what: Splits) -> int:
        """Into how many parts these are split: the product of the degrees of their axes."""
        return math.prod(getattr(self, axis) for axis in axes_that_split(*what))

    def coords(self, rank: int) -> dict[str, int]:
        """The grid position of a rank: its index along each axis, slowest first."""
        if not 0 <= rank < self.world:
            raise LayoutError("distributed.no-such-rank", f"rank {rank} is outside 0..{self.world - 1}")
        at = dict.fromkeys(AXES, 0)
        for axis in reversed(AXES):
            rank, at[axis] = divmod(rank, getattr(self, axis))
        return at

    def rank(self, coords: Mapping[str, int]) -> int:
        """The rank at a grid position, the inverse of `coords`; 0 along axes that are not given."""
        rank = 0
        for axis in AXES:
            rank = rank * getattr(self, axis) + coords.get(axis, 0)
        return rank

    def block(self, axes: Iterable[str], rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` along these axes only; the last axis is the fastest."""
        axes, at = tuple(axes), self.coords(rank)
        places = itertools.product(*(range(getattr(self, axis)) for axis in axes))
        return tuple(self.rank(at | dict(zip(axes, place))) for place in places)

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` along `axis` only, in axis order."""
        return self.block((axis,), rank)

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """All groups of an axis; they partition the ranks."""
        return tuple(self.group(axis, r) for r in range(self.world) if self.coords(r)[axis] == 0)

    def tensor_replicas(self, rank: int, parts: int) -> tuple[int, ...]:
        """The tensor ranks that hold the same part as `rank` of a tensor sharded into `parts` over the tensor axis.

        parts divides the tensor degree t. Part i is held by the contiguous ranks [i * t / parts, (i + 1) * t / parts).
        """
        replicas = self.tensor // parts
        first = self.coords(rank)["tensor"] // replicas * replicas
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
        samples, positions = axes_that_split(Splits.SAMPLES), axes_that_split(Splits.POSITIONS)
        return {
            "world": tuple(range(self.world)),
            **{axis: self.group(axis, rank) for axis in self.degrees},
            "samples": self.block(samples, rank),
            "positions": self.block(positions, rank),
            "data_context": self.block((*samples, *positions), rank),
            "same_tokens": self.block(axes_that_split(Splits.WEIGHTS), rank),
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
        """The grid as text: one line for the ranks that have the same layers and samples."""
        lines, inner = [], axes_that_split(Splits.POSITIONS, Splits.WEIGHTS)
        for rank in range(self.world):
            at, ranks = self.coords(rank), self.block(inner, rank)
            if rank == ranks[0]:
                place = "  ".join(f"{axis} {at[axis]:>3}" for axis in AXES if axis not in inner)
                lines.append(f"{place}  ranks {ranks[0]}..{ranks[-1]}")
        return "\n".join(lines)

    def formula(self) -> str:
        """How a rank follows from its grid position, as text, for layouts whose table would be too long."""
        slowest, *others = AXES
        text = slowest
        for axis in others:
            text = f"{text if text == slowest else f'({text})'} * {axis[0].upper()} + {axis}"
        return f"rank = {text}, " + ", ".join(f"{axis[0].upper()} = {getattr(self, axis)}" for axis in others)
