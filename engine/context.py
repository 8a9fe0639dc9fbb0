"""Axis and ParallelContext: what a rank knows about its place, passed as an argument and never reached for.

`ParallelContext` is frozen and has no default: code that forgets to pass it fails at once instead of falling back to a
global. Two contexts can live in one process (the tests use that).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.layout import Layout


@dataclass(frozen=True)
class Axis:
    """One direction of the mesh as seen from one rank. `group` is None when there is nothing to talk to (size 1).

    traffic: bytes this rank has sent, by (axis name, collective); the axes of a context share one counter.
    """

    name: str
    size: int
    rank: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    traffic: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float), compare=False, repr=False)


@dataclass(frozen=True)
class ParallelContext:
    """A rank's place in the grid, and where and in what dtype its parameters live.

    tensor, pipeline, data, context: the axes of the grid. kv: the tensor ranks that hold the same KV heads.
    sequence: the tensor ranks that cut the sequence among them outside the matrices; copies: those that hold the same
    activations there. One of the two is the tensor axis and the other this rank alone, so code takes both and asks for
    neither. ends: the ranks of first and last stage (tied embeddings). world: all ranks. alone: this rank.
    """

    layout: Layout
    rank: int
    tensor: Axis
    pipeline: Axis
    data: Axis
    context: Axis
    kv: Axis
    sequence: Axis
    copies: Axis
    ends: Axis
    world: Axis
    alone: Axis
    device: torch.device
    dtype: torch.dtype

    def axis(self, name: str) -> Axis:
        """The axis of that name (ShardSpecs name axes, because they are written before any process exists)."""
        found = getattr(self, name)
        assert isinstance(found, Axis), name
        return found


def make_context(
    layout: Layout,
    rank: int,
    *,
    num_kv_heads: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    connect: bool = False,
    timeout_s: float = 600.0,
) -> ParallelContext:
    """The context of one rank. With `connect`, process groups are created (collective: every rank calls it).

    Without `connect` the axes carry no groups: good for counting and for dry runs of any world size, and it is the
    whole truth when the world is one rank. Every rank creates the axes in the same order and each axis partitions
    the ranks, so the local synchronisation of `new_group` cannot deadlock.
    """
    made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
    members = {
        "world": tuple(range(layout.world)),
        **{axis: layout.group(axis, rank) for axis in ("tensor", "data", "context", "pipeline")},
        "kv": layout.replica_group(rank, num_kv_heads),
        "sequence": layout.group("tensor", rank) if layout.sequence else (rank,),
        "copies": (rank,) if layout.sequence else layout.group("tensor", rank),
        "ends": layout.ends_group(rank),
        "alone": (rank,),
    }
    axes: dict[str, Axis] = {}
    traffic: dict[tuple[str, str], float] = defaultdict(float)
    for name, ranks in members.items():
        if connect and len(ranks) > 1 and ranks not in made:
            whole = len(ranks) == layout.world
            made[ranks] = (
                dist.group.WORLD
                if whole
                else dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s), use_local_synchronization=True)
            )
        shown = "tensor" if name in ("sequence", "copies") else name
        axes[name] = Axis(shown, len(ranks), ranks.index(rank), ranks, made.get(ranks), traffic)
    return ParallelContext(layout=layout, rank=rank, device=torch.device(device), dtype=dtype, **axes)
