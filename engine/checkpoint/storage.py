"""The few file operations that checkpoints are made of, behind one interface.

Everything that saving, committing, cleaning up, finding and loading does to a disk goes through a `Storage`. `DISK` is
the real one. Tests put in one that records, and so can make every state that a crash or a power cut may leave; a layer
that encrypts files can be put between in the same way: bytes pass through `Writer.write` and `StoredFile.read_into`
only.

Durability, as POSIX has it: what was written to a file is safe after its `sync`, a name (of a new file or folder, or
after a rename) after `sync_folder` of the folder it is in; without them any part of it may be missing after a crash.
"""

from __future__ import annotations

import errno
import os
import stat as stat_module
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import xxhash

FILE_MODE, FOLDER_MODE = 0o640, 0o750
_MANY = 64 << 20  # bytes a single call may write; Linux caps it at 2 GiB
_PIECE = 256 << 10  # bytes read and shown at a time: a core's own cache still has them when they are digested


@dataclass(frozen=True)
class Status:
    """What a name stands for, not following links. kind: "file", "folder" or "other"; size in bytes of a file."""

    kind: str
    size: int


class Writer(Protocol):
    """A new file, written from beginning to end."""

    def write(self, data: memoryview) -> None:
        """Append bytes."""

    def sync(self) -> None:
        """Make everything written durable."""

    def close(self) -> None:
        """Give the handle back."""


class Hasher(Protocol):
    """A digest in the making."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Take in the next bytes."""

    def hexdigest(self) -> str:
        """The digest of all bytes taken in, hexadecimal."""


def unseen(piece: memoryview) -> None:
    """For reads that nobody watches."""


class StoredFile(Protocol):
    """A file to read from; any number of threads may. size: in bytes."""

    size: int

    def read_into(self, offset: int, into: memoryview, seen: Callable[[memoryview], None] = unseen) -> None:
        """Fill `into` from byte `offset` on; OSError (EIO) where the file ends before.

        seen: shown the filled pieces of `into` one after another, each right after it was filled.
        """

    def close(self) -> None:
        """Give the handle back."""


class Storage(Protocol):
    """See the module text. All that touch the disk raise OSError with the path in `filename`.

    digest_name: the kind of digest that `digest` gives.
    """

    digest_name: str

    def digest(self, data: bytes | bytearray | memoryview) -> str:
        """The digest by which bytes are recognised, hexadecimal."""

    def hasher(self) -> Hasher:
        """The same digest of bytes that come in pieces."""

    def make_folder(self, path: Path) -> None:
        """Make one folder, with FOLDER_MODE; FileExistsError where the name is taken."""

    def create(self, path: Path, size: int) -> Writer:
        """Start a file of `size` bytes, with FILE_MODE; room for it is reserved. An old file is replaced."""

    def open(self, path: Path, *, fresh: bool = False) -> StoredFile:
        """Open a regular file (no link) for reading; fresh: from the device, not from memory, where possible."""

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or folder another name; nothing of that name may be there (an empty folder may)."""

    def unlink(self, path: Path) -> None:
        """Delete a file or link."""

    def remove_folder(self, path: Path) -> None:
        """Delete an empty folder."""

    def list(self, path: Path) -> list[str]:
        """Names in a folder, sorted."""

    def stat(self, path: Path) -> Status | None:
        """What is there; None for nothing."""

    def free_bytes(self, path: Path) -> int:
        """Bytes that can still be written below a folder that exists."""


# What a failed open or read then says is of this process (open files, rights, memory), not of the file.
OF_THE_PROCESS = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An OSError of an open file knows no name: add it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


class _DiskWriter:
    def __init__(self, path: Path, size: int):
        self._path, self._end = path, 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(path, flags, FILE_MODE)
        if size:
            with _naming(path):
                try:
                    os.posix_fallocate(self._fd, 0, size)
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                        os.close(self._fd)
                        raise

    def write(self, data: memoryview) -> None:
        with _naming(self._path):
            while data:
                done = os.pwrite(self._fd, data[:_MANY], self._end)
                self._end += done
                data = data[done:]

    def sync(self) -> None:
        with _naming(self._path):
            os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class _DiskFile:
    def __init__(self, path: Path, fresh: bool):
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        facts = os.fstat(self._fd)
        if not stat_module.S_ISREG(facts.st_mode):
            os.close(self._fd)
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        self.size = facts.st_size
        if fresh:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def read_into(self, offset: int, into: memoryview, seen: Callable[[memoryview], None] = unseen) -> None:
        with _naming(self._path):
            while into:
                done = os.preadv(self._fd, [into[:_PIECE]], offset)
                if done == 0:
                    raise OSError(errno.EIO, f"ends at byte {offset}, {len(into)} more were expected")
                seen(into[:done])
                offset += done
                into = into[done:]

    def close(self) -> None:
        os.close(self._fd)


class Disk:
    """The real file system. XXH3-128 finds damage; it is no protection against an attacker (engine.checkpoint.seal)."""

    digest_name = "xxh3_128"

    def digest(self, data: bytes | bytearray | memoryview) -> str:
        return xxhash.xxh3_128_hexdigest(data)  # releases the interpreter's lock on large data

    def hasher(self) -> Hasher:
        return xxhash.xxh3_128()

    def make_folder(self, path: Path) -> None:
        os.mkdir(path, FOLDER_MODE)

    def create(self, path: Path, size: int) -> Writer:
        return _DiskWriter(path, size)

    def open(self, path: Path, *, fresh: bool = False) -> StoredFile:
        return _DiskFile(path, fresh)

    def sync_folder(self, path: Path) -> None:
        with _naming(path):
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        os.rmdir(path)

    def list(self, path: Path) -> list[str]:
        return sorted(os.listdir(path))

    def stat(self, path: Path) -> Status | None:
        try:
            facts = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        kind = "file" if stat_module.S_ISREG(facts.st_mode) else "other"
        return Status("folder" if stat_module.S_ISDIR(facts.st_mode) else kind, facts.st_size)

    def free_bytes(self, path: Path) -> int:
        facts = os.statvfs(path)
        return facts.f_bavail * facts.f_frsize


DISK = Disk()


def make_folders(storage: Storage, path: Path) -> None:
    """Make a folder and those above it, as far as they are not there, durable but for the last one's name.

    Several ranks may do so at once.
    """
    if storage.stat(path) is not None:
        return
    make_folders(storage, path.parent)
    with suppress(FileExistsError):
        storage.make_folder(path)
    storage.sync_folder(path.parent)


def read_file(storage: Storage, path: Path) -> bytes:
    """All bytes of a small file."""
    source = storage.open(path)
    try:
        data = bytearray(source.size)
        source.read_into(0, memoryview(data))
    finally:
        source.close()
    return bytes(data)


def write_file(storage: Storage, path: Path, data: bytes) -> None:
    """Write a small file and make its content durable (its name is, once the folder is synced)."""
    writer = storage.create(path, len(data))
    try:
        writer.write(memoryview(data))
        writer.sync()
    finally:
        writer.close()


def remove_tree(storage: Storage, folder: Path) -> None:
    """Delete a folder of files and folders, or the link that is there instead of one.

    What another process deletes meanwhile is gone as well.
    """
    if (there := storage.stat(folder)) is not None and there.kind != "folder":
        storage.unlink(folder)
        return
    for name in storage.list(folder):
        status = storage.stat(folder / name)
        if status is not None and status.kind == "folder":
            remove_tree(storage, folder / name)
            continue
        with suppress(FileNotFoundError):
            storage.unlink(folder / name)
    with suppress(FileNotFoundError):
        storage.remove_folder(folder)
