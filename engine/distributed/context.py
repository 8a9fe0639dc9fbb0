"""Axis and ParallelContext: a rank's place in the mesh, always passed as an argument, never a global.

`ParallelContext` is frozen and has no default: code that forgets to pass it fails at once instead of falling back to a
global. Two contexts can live in one process (the tests use that).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.distributed.board import Board, Gather
from engine.distributed.board import connect as connect_board
from engine.distributed.layout import Layout
from engine.distributed.shared_memory import Link
from engine.distributed.shared_memory import connect as connect_shared
from engine.errors import ConfigError, FieldError

# Name under which an axis counts its traffic, for axes that are another one's ranks or a part of them.
_SHOWN = {
    "sequence": "tensor",
    "replicated": "tensor",
    "same_tokens": "tensor",
    "data_context": "data",
    "samples": "data",
    "positions": "context",
}


@dataclass(frozen=True)
class Axis:
    """One direction of the mesh as seen from one rank. group: None for size 1, or in a context without processes.

    link: shared memory with the other ranks; if there is one, collectives and messages use it instead of the group.
    board: where this rank publishes that it waits, the same on all axes; on CPUs only.
    traffic: bytes this rank has sent, by (axis name, collective); the axes of a context share one counter.
    """

    name: str
    size: int
    rank: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    traffic: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float), compare=False, repr=False)
    link: Link | None = field(default=None, compare=False, repr=False)
    board: Board | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class ParallelContext:
    """A rank's place in the grid, and the device and dtype of its parameters.

    tensor, pipeline, data, context: the axes of the grid. samples, positions, same_tokens: the ranks that split the
    samples of a global batch, the positions of each sample, and the weights of a stage (layout.AXES). data_context:
    those of samples and positions together, which hold the same weights. sequence: the tensor ranks over which
    activations outside the matrices are sharded along the sequence (sequence parallelism); replicated: those that hold
    the same activations there. One of the two is the tensor axis, the other only this rank, so code applies collectives
    of both without branching. tied_stages: the ranks of the first and last stage (tied embeddings). world: all ranks.
    self_axis: only this rank. others: axes of the grid without a field, and "tensor/P", the tensor ranks that hold the
    same part of a tensor sharded into P parts (KV heads that ranks share).
    """

    layout: Layout
    rank: int
    tensor: Axis
    pipeline: Axis
    data: Axis
    context: Axis
    samples: Axis
    positions: Axis
    data_context: Axis
    same_tokens: Axis
    sequence: Axis
    replicated: Axis
    tied_stages: Axis
    world: Axis
    self_axis: Axis
    others: Mapping[str, Axis]
    device: torch.device
    dtype: torch.dtype

    def axis(self, name: str) -> Axis:
        """The axis of that name (a ShardSpec names axes, because it is created before any process group exists)."""
        found = self.others.get(name) or getattr(self, name)
        assert isinstance(found, Axis), name
        return found

    def describe_transports(self) -> str:
        """Transport of each axis in words, such as "shared memory (tensor), gloo (world)"; no axes if all use one."""
        network = "NCCL" if self.device.type == "cuda" else "gloo"
        ways: dict[str, list[str]] = {}
        for name in (*self.layout.degrees, "world"):
            if (axis := self.axis(name)).size > 1:
                ways.setdefault("shared memory" if axis.link else network, []).append(name)
        return ", ".join(f"{way} ({', '.join(names)})" if len(ways) > 1 else way for way, names in ways.items())


def make_context(
    layout: Layout,
    rank: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    connect: bool = False,
    timeout_s: float = 600.0,
    transport: str = "auto",
) -> ParallelContext:
    """The context of one rank. With `connect`, process groups are created (collective: every rank calls it).

    Without `connect` the axes have no groups: enough for memory estimates and dry runs of any world size, and for a
    world of one rank. Every rank creates the axes in the same order and each axis partitions the ranks, so the local
    synchronisation of `new_group` cannot deadlock.

    transport: for ranks on CPUs. auto: shared memory on axes whose ranks are on one host, else gloo; gloo: gloo only;
    shared: ConfigError on every rank if any axis cannot use shared memory.
    """
    made: dict[tuple[tuple[int, ...], bool], dist.ProcessGroup | None] = {}
    members = layout.axes(rank)
    # NCCL runs the operations of a group in order. On GPUs, an axis with all ranks gets a separate group; else each
    # small agreement of the world would wait until that axis has gathered all weights.
    on_gpu = torch.device(device).type == "cuda"
    groups = {name: (ranks, on_gpu and name == "world") for name, ranks in members.items()}
    axes: dict[str, Axis] = {}
    traffic: dict[tuple[str, str], float] = defaultdict(float)
    for name, ranks in members.items():
        if connect and len(ranks) > 1 and groups[name] not in made:
            made[groups[name]] = (
                dist.group.WORLD
                if name == "world"
                else dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s), use_local_synchronization=True)
            )
    if on_gpu and made:
        _connect_nccl(list(made.values()), torch.device(device))
    links = _connect_shared(members, rank, layout.world, torch.device(device), timeout_s, transport) if made else {}
    board = connect_board(rank, _gather(layout.world)) if made and not on_gpu else None
    for name, ranks in members.items():
        shown = "tensor_parts" if "/" in name else _SHOWN.get(name, name)
        group, link = made.get(groups[name]), links.get(ranks)
        axes[name] = Axis(shown, len(ranks), ranks.index(rank), ranks, group, traffic, link, board)
    named = {field.name for field in fields(ParallelContext)}
    others = {name: axes.pop(name) for name in members if name not in named}
    return ParallelContext(layout=layout, rank=rank, others=others, device=torch.device(device), dtype=dtype, **axes)


def _connect_nccl(groups: list[dist.ProcessGroup | None], device: torch.device) -> None:
    """Make NCCL connect every group now, at the same point on all ranks.

    NCCL connects a group in its first call, which blocks the host until all ranks of the group make it. In the middle
    of a step this could deadlock with ranks that wait for others; and a batch of messages, which involves only two
    ranks of a group, must not be the first call.
    """
    for group in groups:
        dist.all_reduce(torch.zeros(1, device=device), group=group)


def _gather(world: int) -> Gather:
    def gather(mine: list[int]) -> list[list[int]]:
        rows = [torch.empty(len(mine), dtype=torch.int64) for _ in range(world)]
        dist.all_gather(rows, torch.tensor(mine))
        return [row.tolist() for row in rows]

    return gather


def _connect_shared(
    members: dict[str, tuple[int, ...]],
    rank: int,
    world: int,
    device: torch.device,
    timeout_s: float,
    transport: str,
) -> dict[tuple[int, ...], Link]:
    """Shared-memory links of this rank's groups, for those that can have one. Collective over the world."""
    if transport == "gloo":
        return {}
    links: dict[tuple[int, ...], Link] = {}
    why = f"the ranks are on {device.type}"
    if device.type == "cpu":
        links, why = connect_shared(members, rank, world, _gather(world), timeout_s)
    if why and transport == "shared":
        fix = "Use auto, which falls back to gloo."
        raise ConfigError([FieldError("distributed.no-shared-memory", "parallel.transport", "shared", why, fix)])
    return links
