"""A disk in memory that records what is done to it and makes every state that a crash may leave.

The model is POSIX at its weakest (Pillai et al. 2014, "All file systems are not created equal"): of what was done
before the crash, the content written to a file is certain only after its sync, and a name (new, renamed, deleted) only
after a sync of the folder it is in. Everything else is there, torn, or not there, in any combination that a file system
can be in: an operation whose folder or file is not there has not happened either.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from engine.checkpoint.storage import DISK, Status, unseen


@dataclass(frozen=True)
class Op:
    """One operation. what: mkdir, create, write, sync, sync_folder, rename, unlink, rmdir. file: number of a file."""

    what: str
    path: str
    to: str = ""
    file: int = 0
    at: int = 0
    data: bytes = b""


@dataclass
class File:
    number: int
    data: bytearray = field(default_factory=bytearray)


def error(number: int, path: Path | str) -> OSError:
    return OSError(number, os.strerror(number), str(path))


class MemoryDisk:
    """Implements Storage. tree: path -> a File, or None for a folder. log: what was done since `log` was emptied.

    before: called with each operation that changes the disk, ahead of it; it may raise.
    """

    digest_name, digest, hasher = DISK.digest_name, staticmethod(DISK.digest), staticmethod(DISK.hasher)

    def __init__(self) -> None:
        self.tree: dict[str, File | None] = {"/": None}
        self.log: list[Op] = []
        self.before: Callable[[Op], None] = lambda op: None
        self.free = 1 << 40
        self._files = 0

    def copy(self) -> MemoryDisk:
        other = MemoryDisk()
        other.tree = {p: None if f is None else File(f.number, bytearray(f.data)) for p, f in self.tree.items()}
        other._files = self._files
        return other

    # -- what a crash leaves -------------------------------------------------------------------------------------------

    def apply(self, op: Op, size: int | None = None) -> None:
        """Do an operation if it is possible; size: only so many bytes of a write."""
        tree, parent = self.tree, str(Path(op.path).parent)
        if op.what == "write":
            for file in tree.values():
                if file is not None and file.number == op.file:
                    data = op.data[:size]
                    file.data[op.at : op.at + len(data)] = data
        elif parent not in tree:
            return
        elif op.what == "mkdir":
            tree.setdefault(op.path, None)
        elif op.what == "create":
            tree[op.path] = File(op.file, bytearray(op.at))
        elif op.what == "rename" and op.path in tree and not self._below(op.to):
            for path in [op.path, *self._below(op.path)]:
                tree[op.to + path[len(op.path) :]] = tree.pop(path)
        elif op.what == "unlink" or (op.what == "rmdir" and not self._below(op.path)):
            tree.pop(op.path, None)

    def _below(self, folder: str) -> list[str]:
        return [path for path in self.tree if path.startswith(folder + "/")]

    # -- Storage -------------------------------------------------------------------------------------------------------

    def _do(self, op: Op) -> None:
        self.before(op)
        self.log.append(op)
        self.apply(op)

    def _must(self, path: Path) -> File | None:
        if str(path) not in self.tree:
            raise error(errno.ENOENT, path)
        return self.tree[str(path)]

    def make_folder(self, path: Path) -> None:
        self._must(path.parent)
        if str(path) in self.tree:
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        self._do(Op("mkdir", str(path)))

    def create(self, path: Path, size: int) -> _MemoryWriter:
        self._must(path.parent)
        self._files += 1
        self._do(Op("create", str(path), file=self._files, at=size))
        return _MemoryWriter(self, str(path), self._files)

    def open(self, path: Path, *, fresh: bool = False) -> _MemorySource:
        file = self._must(path)
        if file is None:
            raise error(errno.EISDIR, path)
        return _MemorySource(path, file)

    def sync_folder(self, path: Path) -> None:
        self._must(path)
        self._do(Op("sync_folder", str(path)))

    def rename(self, old: Path, new: Path) -> None:
        self._must(old)
        if self._below(str(new)):
            raise error(errno.ENOTEMPTY, new)
        self._do(Op("rename", str(old), to=str(new)))

    def unlink(self, path: Path) -> None:
        self._must(path)
        self._do(Op("unlink", str(path)))

    def remove_folder(self, path: Path) -> None:
        self._must(path)
        if self._below(str(path)):
            raise error(errno.ENOTEMPTY, path)
        self._do(Op("rmdir", str(path)))

    def list(self, path: Path) -> list[str]:
        self._must(path)
        return sorted(p[len(str(path)) + 1 :] for p in self._below(str(path)) if "/" not in p[len(str(path)) + 1 :])

    def stat(self, path: Path) -> Status | None:
        if str(path) not in self.tree:
            return None
        file = self.tree[str(path)]
        return Status("folder", 0) if file is None else Status("file", len(file.data))

    def free_bytes(self, path: Path) -> int:
        return self.free


class _MemoryWriter:
    def __init__(self, disk: MemoryDisk, path: str, number: int):
        self._disk, self._path, self._number, self._end = disk, path, number, 0

    def write(self, data: memoryview) -> None:
        self._disk._do(Op("write", self._path, file=self._number, at=self._end, data=bytes(data)))
        self._end += len(data)

    def sync(self) -> None:
        self._disk._do(Op("sync", self._path, file=self._number))

    def close(self) -> None:
        pass


class _MemorySource:
    def __init__(self, path: Path, file: File):
        self._path, self._file, self.size = path, file, len(file.data)

    def read_into(self, offset: int, into: memoryview, seen: Callable[[memoryview], None] = unseen) -> None:
        if offset + len(into) > len(self._file.data):
            raise error(errno.EIO, self._path)
        into[:] = self._file.data[offset : offset + len(into)]
        seen(into)

    def close(self) -> None:
        pass


def certain(log: list[Op]) -> list[bool]:
    """Which of the operations, all of them done before a crash, are durable."""
    durable = [False] * len(log)
    for i, op in enumerate(log):
        if op.what == "sync":
            durable[: i + 1] = [d or (o.what == "write" and o.file == op.file) for d, o in zip(durable, log[: i + 1])]
        elif op.what == "sync_folder":
            for k, o in enumerate(log[:i]):
                names = o.what in ("mkdir", "create", "rename", "unlink", "rmdir")
                durable[k] |= names and _folder_then(o.to or o.path, log[k + 1 : i]) == op.path
    return durable


def _folder_then(path: str, later: list[Op]) -> str:
    """The folder that a name is in, after its folder may have been renamed."""
    for op in later:
        if op.what == "rename" and path.startswith(op.path + "/"):
            path = op.to + path[len(op.path) :]
    return str(Path(path).parent)


def crash_states(
    before: MemoryDisk, log: list[Op], rng: random.Random, samples: int
) -> Iterator[tuple[int, MemoryDisk]]:
    """(number of operations done, disk) for every prefix of the log: nothing lost; all lost that can be; only names in
    order lost; and `samples` times any combination, writes torn anywhere."""
    written = {op.file for op in log if op.what == "create"}
    for done in range(len(log) + 1):
        prefix, durable = log[:done], certain(log[:done])
        open_ops = [i for i in range(done) if not durable[i] and not prefix[i].what.startswith("sync")]
        choices = [set(open_ops), set()]
        choices += [{i for i in open_ops if i < cut} for cut in open_ops[1:4]]
        choices += [{i for i in open_ops if rng.random() < rng.choice((0.2, 0.5, 0.8))} for _ in range(samples)]
        for number, kept in enumerate(choices):
            disk = before.copy()
            for i, op in enumerate(prefix):
                if durable[i]:
                    disk.apply(op)
                elif i in kept:
                    torn = number > 1 and op.what == "write" and rng.random() < 0.4
                    disk.apply(op, rng.randrange(len(op.data) + 1) if torn and op.data else None)
            synced = {op.file for op in prefix if op.what == "sync"}
            for file in disk.tree.values():
                if number > 1 and file is not None and file.number in written - synced and rng.random() < 0.3:
                    del file.data[rng.randrange(len(file.data) + 1) :]  # its size is as uncertain as its content
            yield done, disk
