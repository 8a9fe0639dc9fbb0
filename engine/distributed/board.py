"""Heartbeats of ranks that others on the same host can read, to name the rank that a timed-out collective waits for.

Each rank publishes two times in an anonymous page of memory (memfd), by CLOCK_MONOTONIC, which all processes of a host
share:

    beat    written by a thread every half second: an old value means that the process does not run (stopped, swapping)
    since   when the rank last started (negative) or ended (positive) a wait for others in a collective or message

Others find the page through /proc by process id, and verify a random number in it. No torch; no messages between ranks.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

_BEAT_S = 0.5
_PAGE = struct.Struct("ddQ")  # beat, since, the random number

Gather = Callable[[list[int]], list[list[int]]]


class Waitable(Protocol):
    """An operation in progress: a dist.Work, or the Work of a shared-memory link."""

    def wait(self) -> Any:
        """Return when the operation is complete."""


@dataclass
class PeerStatus:
    """Status of the other ranks, as seen from one rank.

    behind: rank -> why it does not take part. ended: ranks whose process is gone. waiting: ranks that wait for others.
    unknown: ranks on other hosts.
    """

    behind: dict[int, str] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)


class Board:
    """This rank's page, and where those of the others are. rows: per rank [process id, host, file, random number]."""

    def __init__(self, file: int, rank: int, rows: list[list[int]]):
        self._rank, self._rows = rank, rows
        self._times = memoryview(mmap.mmap(file, mmap.PAGESIZE)).cast("d")
        self._times[0] = self._times[1] = time.monotonic()

    def start_heartbeat(self) -> None:
        """Start the thread that publishes that this process runs."""

        def work() -> None:
            while True:
                self._times[0] = time.monotonic()
                time.sleep(_BEAT_S)

        threading.Thread(target=work, name="beat", daemon=True).start()

    def wait(self, work: Waitable) -> None:
        """Wait for an operation with other ranks, and publish the time of the wait."""
        self._times[1] = -time.monotonic()
        try:
            work.wait()
        finally:
            self._times[1] = time.monotonic()

    def peer_status(self, patience_s: float) -> PeerStatus:
        """Status of the other ranks. A rank is behind if it has not run, or not waited for others, for `patience_s`."""
        peers, now = PeerStatus(), time.monotonic()
        for rank, (pid, host, file, number) in enumerate(self._rows):
            if rank == self._rank:
                continue
            if host != self._rows[self._rank][1] or file < 0:
                peers.unknown.append(rank)
                continue
            try:
                beat, since, found = _PAGE.unpack(Path(f"/proc/{pid}/fd/{file}").read_bytes()[: _PAGE.size])
            except (OSError, struct.error):
                found = -1
            if found != number:
                peers.ended.append(rank)
            elif now - beat > patience_s:
                peers.behind[rank] = f"its process ({pid}) has not run for {now - beat:.0f} s (stopped? out of memory?)"
            elif since > 0 and now - since > patience_s:
                peers.behind[rank] = f"it runs (process {pid}), but has been busy alone for {now - since:.0f} s"
            else:
                peers.waiting.append(rank)
        return peers


def connect(rank: int, gather: Gather) -> Board | None:
    """Create this rank's board; None if this Python or system has no memfd. Collective.

    gather: all-gathers a list of integers.
    """
    file, number = -1, secrets.randbits(48)
    with suppress(OSError, AttributeError):  # not every Python has memfd_create
        file = os.memfd_create("engine-board")
        os.ftruncate(file, mmap.PAGESIZE)
        os.pwrite(file, struct.pack("Q", number), _PAGE.size - 8)
    rows = gather([os.getpid(), _host(), file, number])
    return None if file < 0 else Board(file, rank, rows)


def namespace() -> int:
    """Id of this process's PID and network namespaces; ranks in different namespaces count as different hosts."""
    processes, network = (os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("pid", "net"))
    return processes * 1_000_003 + network


def _host() -> int:
    """Id that processes share if they see each other in /proc: of one boot of one machine, and one namespace."""
    start = 0
    with suppress(OSError):
        start = int(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").partition("-")[0], 16)
    return (start * 1_000_003 + namespace()) % 2**62
