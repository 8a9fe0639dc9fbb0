"""Collectives and messages between CPU processes of one host over memory that they share (csrc/shared/channel.h).

A segment is an anonymous file (memfd): it is in no folder, uses no space of /dev/shm, and disappears with the last
process that maps it, even if that is killed. The first rank of a group creates it. The others open it through /proc by
that rank's process id and verify a random number in it: success proves that they are on one host. If any rank of a
group cannot, the group uses gloo.

A waiting rank polls its peers ten times a second and raises if one has exited or made no progress for timeout_s.
"""

from __future__ import annotations

import os
import secrets
import select
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.distributed.board import Gather
from engine.distributed.board import namespace as _namespace
from engine.util import extension

RING, PAIR_RING = 16 << 20, 4 << 20  # bytes of a rank's ring for collectives, and of its ring for messages to one peer
_MAX_RING_BYTES = 1 << 30  # of all rings of a group, for each of the two kinds; only pages that were used take memory
_PAGE = 4096
_INTERFACE = 0  # version of csrc/shared/module.cpp, incremented when a signature changes
_POLL_S = 0.1
_REASON_BYTES = 256  # bytes of a reason that are sent to the other ranks
_GROUP, _SENT, _RECEIVED = range(3)
_ALL_REDUCE, _ALL_GATHER, _REDUCE_SCATTER = 1, 2, 3
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
_DTYPE_CODES = {dtype: number for number, dtype in enumerate(_DTYPES)}
_OP_CODES = {"sum": 0, "max": 1, "min": 2}


def load() -> tuple[Any, str]:
    """(engine._shared, "") or (None, the reason why it cannot be used)."""
    module, why = extension.load("engine._shared", f"interface {_INTERFACE}")
    if module is None:
        return None, why
    if missing := [name for name in ("memfd_create", "pidfd_open") if not hasattr(os, name)]:
        return None, f"engine._shared cannot be used: this Python was built without os.{missing[0]}"
    return module, ""


@dataclass(frozen=True)
class Work:
    """A started operation: the `number`-th of its queue. into: (target, result) if the result must be copied."""

    link: Link
    queue: int
    peer: int
    number: int
    into: tuple[Tensor, Tensor] | None = None

    def wait(self) -> None:
        """Return when it is complete. ConnectionError if a peer has exited, TimeoutError after `timeout_s`."""
        self.link.finish(self)
        if self.into is not None:
            target, result = self.into
            target.copy_(result)


class Link:
    """One rank's end of a group's segment. Peers are given by their position on the axis."""

    def __init__(self, channel: Any, ranks: tuple[int, ...], pids: Sequence[int], timeout_s: float):
        self.channel, self.ranks, self.pids, self.timeout_s = channel, ranks, tuple(pids), timeout_s
        self._exits = select.poll()  # a pidfd becomes readable when its process has ended
        self._position: dict[int, int] = {}
        for position, pid in enumerate(pids):
            if pid != os.getpid():
                descriptor = os.pidfd_open(pid)
                self._position[descriptor] = position
                self._exits.register(descriptor, select.POLLIN)
        self._tensors_in_use: dict[tuple[int, int], deque[tuple[int, Tensor, Tensor]]] = {}

    def __del__(self) -> None:
        for descriptor in self._position:
            with suppress(OSError):
                os.close(descriptor)

    def all_reduce(self, x: Tensor, op: str) -> Work:
        """Reduce x in place."""
        flat = x.contiguous()
        number = self._start(_ALL_REDUCE, flat, flat, flat.numel(), op)
        return Work(self, _GROUP, 0, number, None if flat.data_ptr() == x.data_ptr() else (x, flat))

    def all_gather(self, out: Tensor, x: Tensor) -> Work:
        """Gather every rank's contiguous x into out [ranks * ...]; x may be its part of out."""
        return Work(self, _GROUP, 0, self._start(_ALL_GATHER, x, out, x.numel() * x.element_size()))

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Work:
        """Sum all contiguous x and write this rank's part to out."""
        return Work(self, _GROUP, 0, self._start(_REDUCE_SCATTER, x, out, out.numel()))

    def send(self, x: Tensor, peer: int) -> Work:
        """Send contiguous x to the peer at a position."""
        number = self.channel.send(x.data_ptr(), x.numel() * x.element_size(), peer)
        return Work(self, _SENT, peer, self._keep_tensors(_SENT, peer, number, x, x))

    def receive(self, x: Tensor, peer: int) -> Work:
        """Receive contiguous x from the peer at a position."""
        number = self.channel.receive(x.data_ptr(), x.numel() * x.element_size(), peer)
        return Work(self, _RECEIVED, peer, self._keep_tensors(_RECEIVED, peer, number, x, x))

    def _start(self, kind: int, source: Tensor, out: Tensor, total: int, op: str = "sum") -> int:
        dtype = torch.uint8 if kind == _ALL_GATHER else source.dtype
        if (dtype_code := _DTYPE_CODES.get(dtype)) is None:
            raise TypeError(f"tensors of {dtype} are not reduced; supported are {', '.join(map(str, _DTYPES))}")
        number = self.channel.start(kind, dtype_code, _OP_CODES[op], source.data_ptr(), out.data_ptr(), total)
        return self._keep_tensors(_GROUP, 0, number, source, out)

    def _keep_tensors(self, queue: int, peer: int, number: int, source: Tensor, out: Tensor) -> int:
        """Keep the tensors of an operation alive until it is complete, even if the caller never waits for it."""
        held = self._tensors_in_use.setdefault((queue, peer), deque())
        held.append((number, source, out))
        completed = self.channel.completed(queue, peer)
        while held and held[0][0] <= completed:
            held.popleft()
        return number

    def finish(self, work: Work) -> None:
        """Wait for an operation; raises as `Work.wait`."""
        deadline = time.monotonic() + self.timeout_s
        while not self.channel.wait(work.queue, work.peer, work.number, _POLL_S):
            self._check_for_exited_ranks(work)
            if time.monotonic() > deadline:
                raise TimeoutError(f"Timed out waiting {self.timeout_s:g} s in shared memory")  # board.py: for whom

    def _check_for_exited_ranks(self, work: Work) -> None:
        ended = {self._position[descriptor] for descriptor, _ in self._exits.poll(0)}
        if not ended or self.channel.wait(work.queue, work.peer, work.number, 0.0):  # it may have done its part before
            return
        for position in self.channel.missing(work.queue, work.peer):
            if position in ended:
                pid = self.pids[position]
                raise ConnectionError(f"Connection lost: the process of rank {self.ranks[position]} ({pid}) has ended")


def connect(
    members: Mapping[str, tuple[int, ...]], rank: int, world: int, gather: Gather, timeout_s: float
) -> tuple[dict[tuple[int, ...], Link], str]:
    """Create shared-memory links for this rank's groups; returns (links, reason why some group has none). Collective.

    Links are keyed by the ranks of their group. The reason is the same text on all ranks, empty if every group of every
    rank has a link. members: name -> group, with the same names on every rank; the groups of one name are disjoint.
    gather: all-gathers a list of integers of the same length on all ranks.
    """
    module, why = load()
    names = list(members)
    firsts = {ranks: index for index, ranks in reversed(list(enumerate(members.values())))}
    wanted = {ranks: index for ranks, index in firsts.items() if len(ranks) > 1}
    files: dict[int, int] = {}
    channels: dict[tuple[int, ...], Any] = {}
    token = secrets.randbits(48)

    def channel(file: int, ranks: tuple[int, ...], number: int) -> Any:
        ring, pair_ring = sizes(len(ranks))
        make, spin = ranks[0] == rank, world <= len(os.sched_getaffinity(0))
        return module.Channel(file, number, ranks.index(rank), len(ranks), ring, pair_ring, make, spin)

    try:
        for ranks, index in wanted.items():
            if module is not None and ranks[0] == rank:
                try:
                    files[index] = os.memfd_create(f"engine-{names[index]}")
                    channels[ranks] = channel(files[index], ranks, token + index)
                except (OSError, RuntimeError) as error:
                    why = f"no segment of shared memory: {error}"
        rows = gather([os.getpid(), _namespace(), token, *(files.get(index, -1) for index in range(len(names)))])
        for ranks, index in wanted.items():
            pid, space, number, *theirs = rows[ranks[0]]
            if module is None or ranks[0] == rank or theirs[index] < 0:
                continue
            try:
                if space != _namespace():
                    raise FileNotFoundError("another host, or another PID or network namespace")
                file = os.open(f"/proc/{pid}/fd/{theirs[index]}", os.O_RDWR | os.O_CLOEXEC)
                try:
                    channels[ranks] = channel(file, ranks, number + index)
                finally:
                    os.close(file)
            except (OSError, RuntimeError) as error:
                why = f"rank {rank} cannot open the memory of rank {ranks[0]}: {error}"
        links: dict[tuple[int, ...], Link] = {}
        for ranks, made in channels.items():
            try:
                links[ranks] = Link(made, ranks, [rows[r][0] for r in ranks], timeout_s)
            except OSError as error:  # without pidfds a rank could not detect that another has exited
                why = f"rank {rank} cannot watch the other processes: {error}"
        flags = [int(len(ranks) == 1 or ranks in links) for ranks in members.values()]
        good = gather([*flags, *why.encode()[:_REASON_BYTES].ljust(_REASON_BYTES)])
    finally:
        for file in files.values():
            os.close(file)
    shared = {r: link for r, link in links.items() if all(good[other][wanted[r]] for other in r)}
    reasons = (bytes(row[len(flags) :]).decode(errors="replace").strip() for row in good)
    return shared, next(filter(None, reasons), "")


def sizes(ranks: int) -> tuple[int, int]:
    """(bytes of a ring for collectives, bytes of a ring for messages) in a group of `ranks` ranks."""
    ring = min(RING, max(_MAX_RING_BYTES // ranks // _PAGE, 16) * _PAGE)
    return ring, min(PAIR_RING, max(_MAX_RING_BYTES // ranks**2 // _PAGE, 16) * _PAGE)
