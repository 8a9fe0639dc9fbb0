"""What a rank is doing, where the other ranks of its host can read it: to say who is behind when one waits in vain.

Each rank has two times in a page of memory without a name (memfd), by CLOCK_MONOTONIC, which a host has one of:

    beat    a thread writes it every half second: an old one is of a process that does not run (stopped, swapping)
    since   when the rank last began (negative) or ended (positive) to wait for others in a collective or message

Others find the page through /proc by process id and a random number in it. No torch; nothing is sent to any rank.
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
    """What was started: dist.Work, or that of a link."""

    def wait(self) -> Any:
        """Return when it is done."""


@dataclass
class PeerStatus:
    """The ranks as one of them sees the others. behind: rank -> what it does instead; unknown: on other hosts."""

    behind: dict[int, str] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)


class Board:
    """This rank's page, and where those of the others are. rows: of each rank process id, host, file, random number."""

    def __init__(self, file: int, rank: int, rows: list[list[int]]):
        self._rank, self._rows = rank, rows
        self._times = memoryview(mmap.mmap(file, mmap.PAGESIZE)).cast("d")
        self._times[0] = self._times[1] = time.monotonic()

    def start_heartbeat(self) -> None:
        """Have a thread say from now on that this process runs."""

        def work() -> None:
            while True:
                self._times[0] = time.monotonic()
                time.sleep(_BEAT_S)

        threading.Thread(target=work, name="beat", daemon=True).start()

    def wait(self, work: Waitable) -> None:
        """Wait for what was started with others."""
        self._times[1] = -time.monotonic()
        try:
            work.wait()
        finally:
            self._times[1] = time.monotonic()

    def peer_status(self, patience_s: float) -> PeerStatus:
        """What the other ranks do. Behind is who has not run, or has waited for nobody, for `patience_s`."""
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
    """This rank's board; None where it can have none. Collective. gather: every rank's list of integers."""
    file, number = -1, secrets.randbits(48)
    with suppress(OSError, AttributeError):  # not every Python has memfd_create
        file = os.memfd_create("engine-board")
        os.ftruncate(file, mmap.PAGESIZE)
        os.pwrite(file, struct.pack("Q", number), _PAGE.size - 8)
    rows = gather([os.getpid(), _host(), file, number])
    return None if file < 0 else Board(file, rank, rows)


def namespace() -> int:
    """A number for the space of this process's id and for its network: who was put on another is another host."""
    processes, network = (os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("pid", "net"))
    return processes * 1_000_003 + network


def _host() -> int:
    """The same number for the processes that see each other in /proc: one start of one machine, and one namespace."""
    start = 0
    with suppress(OSError):
        start = int(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").partition("-")[0], 16)
    return (start * 1_000_003 + namespace()) % 2**62
