"""In-memory disk that records every operation and generates every state that a crash may leave.

The model is POSIX at its weakest (Pillai et al. 2014, "All file systems are not created equal"): after a crash, the
content of a file is durable only if the file was synced before, and a name (new, renamed, deleted) only if its folder
was synced. Every other operation may be complete, torn or lost, in any combination that a file system can produce: an
operation whose folder or file was lost is lost too.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from engine.checkpoint.storage import DISK, Status, ignore_piece


@dataclass(frozen=True)
class Op:
    """One operation. kind: mkdir, create, write, sync, sync_folder, rename, unlink, rmdir. file: number of a file."""

    kind: str
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
    """Implements Storage. tree: path -> a File, or None for a folder. log: operations since `log` was emptied.

    before: called before each operation that changes the disk; it may raise.
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

    # -- states after a crash ------------------------------------------------------------------------------------------

    def apply(self, op: Op, size: int | None = None) -> None:
        """Apply an operation if it is possible. size: apply only the first `size` bytes of a write."""
        tree, parent = self.tree, str(Path(op.path).parent)
        if op.kind == "write":
            for file in tree.values():
                if file is not None and file.number == op.file:
                    data = op.data[:size]
                    file.data[op.at : op.at + len(data)] = data
        elif parent not in tree:
            return
        elif op.kind == "mkdir":
            tree.setdefault(op.path, None)
        elif op.kind == "create":
            tree[op.path] = File(op.file, bytearray(op.at))
        elif op.kind == "rename" and op.path in tree and not self._below(op.to):
            for path in [op.path, *self._below(op.path)]:
                tree[op.to + path[len(op.path) :]] = tree.pop(path)
        elif op.kind == "unlink" or (op.kind == "rmdir" and not self._below(op.path)):
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

    def open(self, path: Path, *, uncached: bool = False) -> _MemorySource:
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

    def read_into(self, offset: int, into: memoryview, on_piece: Callable[[memoryview], None] = ignore_piece) -> None:
        if offset + len(into) > len(self._file.data):
            raise error(errno.EIO, self._path)
        into[:] = self._file.data[offset : offset + len(into)]
        on_piece(into)

    def close(self) -> None:
        pass


def certain(log: list[Op]) -> list[bool]:
    """For each operation of the log, whether it is durable after a crash at its end."""
    durable = [False] * len(log)
    for i, op in enumerate(log):
        if op.kind == "sync":
            durable[: i + 1] = [d or (o.kind == "write" and o.file == op.file) for d, o in zip(durable, log[: i + 1])]
        elif op.kind == "sync_folder":
            for k, o in enumerate(log[:i]):
                names = o.kind in ("mkdir", "create", "rename", "unlink", "rmdir")
                durable[k] |= names and _folder_then(o.to or o.path, log[k + 1 : i]) == op.path
    return durable


def _folder_then(path: str, later: list[Op]) -> str:
    """The folder of a name after later renames of its folders."""
    for op in later:
        if op.kind == "rename" and path.startswith(op.path + "/"):
            path = op.to + path[len(op.path) :]
    return str(Path(path).parent)


def crash_states(
    before: MemoryDisk, log: list[Op], rng: random.Random, samples: int
) -> Iterator[tuple[int, MemoryDisk]]:
    """(number of operations done, disk) for every prefix of the log.

    Per prefix: nothing lost; everything lost that can be; lost from a certain operation on; and `samples` random
    combinations with writes torn anywhere.
    """
    written = {op.file for op in log if op.kind == "create"}
    for done in range(len(log) + 1):
        prefix, durable = log[:done], certain(log[:done])
        open_ops = [i for i in range(done) if not durable[i] and not prefix[i].kind.startswith("sync")]
        choices = [set(open_ops), set()]
        choices += [{i for i in open_ops if i < cut} for cut in open_ops[1:4]]
        choices += [{i for i in open_ops if rng.random() < rng.choice((0.2, 0.5, 0.8))} for _ in range(samples)]
        for number, kept in enumerate(choices):
            disk = before.copy()
            for i, op in enumerate(prefix):
                if durable[i]:
                    disk.apply(op)
                elif i in kept:
                    torn = number > 1 and op.kind == "write" and rng.random() < 0.4
                    disk.apply(op, rng.randrange(len(op.data) + 1) if torn and op.data else None)
            synced = {op.file for op in prefix if op.kind == "sync"}
            for file in disk.tree.values():
                if number > 1 and file is not None and file.number in written - synced and rng.random() < 0.3:
                    del file.data[rng.randrange(len(file.data) + 1) :]  # its size is as uncertain as its content
            yield done, disk
