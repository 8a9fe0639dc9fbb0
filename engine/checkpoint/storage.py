"""The file operations that checkpoints need, behind one interface (`Storage`).

Saving, committing, cleaning up, finding and loading touch the disk only through a `Storage`. `DISK` is the real one.
Tests use one that records operations, and reproduce every state that a crash or power failure can leave. Encryption is
a layer of the same kind (engine.checkpoint.seal): bytes pass only through `Writer.write` and `StoredFile.read_into`.

Durability as in POSIX: file contents are safe after `sync` of the file; a name (new file, new folder, rename) is safe
after `sync_folder` of the folder that contains it. Without these, any part may be missing after a crash.
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
_MAX_CALL_BYTES = 64 << 20  # bytes a single call may write; Linux caps it at 2 GiB
_PIECE_BYTES = (
    256 << 10
)  # bytes read and passed on at a time: they are still in the core's cache when they are digested


@dataclass(frozen=True)
class Status:
    """Type and size of a directory entry; links are not followed. kind: "file", "folder" or "other". size: in bytes."""

    kind: str
    size: int


class Writer(Protocol):
    """A new file, written sequentially."""

    def write(self, data: memoryview) -> None:
        """Append bytes."""

    def sync(self) -> None:
        """Make everything written durable."""

    def close(self) -> None:
        """Close the file handle."""


class Hasher(Protocol):
    """Incremental digest."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Add the next bytes."""

    def hexdigest(self) -> str:
        """Hexadecimal digest of all bytes added so far."""


def ignore_piece(piece: memoryview) -> None:
    """Default callback of reads: does nothing."""


class StoredFile(Protocol):
    """A file open for reading, by any number of threads. size: in bytes."""

    size: int

    def read_into(self, offset: int, into: memoryview, on_piece: Callable[[memoryview], None] = ignore_piece) -> None:
        """Fill `into`, starting at byte `offset`. Raises OSError (EIO) if the file is too short.

        on_piece: called with each filled piece of `into`, in order, right after the piece was read.
        """

    def close(self) -> None:
        """Close the file handle."""


class Storage(Protocol):
    """File operations and digests; see the module docstring. Disk errors are OSErrors with the path in `filename`.

    digest_name: the algorithm of `digest`.
    """

    digest_name: str

    def digest(self, data: bytes | bytearray | memoryview) -> str:
        """Hexadecimal digest of `data`."""

    def hasher(self) -> Hasher:
        """The same digest, computed incrementally."""

    def make_folder(self, path: Path) -> None:
        """Create one folder with FOLDER_MODE. Raises FileExistsError if the name is taken."""

    def create(self, path: Path, size: int) -> Writer:
        """Create a file of `size` bytes with FILE_MODE, reserving its space. Replaces an existing file."""

    def open(self, path: Path, *, uncached: bool = False) -> StoredFile:
        """Open a regular file (not a link) for reading. uncached: bypass the page cache where possible."""

    def sync_folder(self, path: Path) -> None:
        """Make the directory entries of a folder durable."""

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file or folder. The new name must be free, or an empty folder."""

    def unlink(self, path: Path) -> None:
        """Delete a file or link."""

    def remove_folder(self, path: Path) -> None:
        """Delete an empty folder."""

    def list(self, path: Path) -> list[str]:
        """Sorted names in a folder."""

    def stat(self, path: Path) -> Status | None:
        """Status of the entry at `path`; None if there is none."""

    def free_bytes(self, path: Path) -> int:
        """Bytes that can still be written below an existing folder."""


# These errors are about this process (open files, permissions, memory), not about the file.
PROCESS_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM)


@contextmanager
def _with_path(path: Path) -> Iterator[None]:
    """Add the path to OSErrors from open file handles, which lack it."""
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
            with _with_path(path):
                try:
                    os.posix_fallocate(self._fd, 0, size)
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                        os.close(self._fd)
                        raise

    def write(self, data: memoryview) -> None:
        with _with_path(self._path):
            while data:
                done = os.pwrite(self._fd, data[:_MAX_CALL_BYTES], self._end)
                self._end += done
                data = data[done:]

    def sync(self) -> None:
        with _with_path(self._path):
            os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class _DiskFile:
    def __init__(self, path: Path, uncached: bool):
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        info = os.fstat(self._fd)
        if not stat_module.S_ISREG(info.st_mode):
            os.close(self._fd)
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        self.size = info.st_size
        if uncached:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def read_into(self, offset: int, into: memoryview, on_piece: Callable[[memoryview], None] = ignore_piece) -> None:
        with _with_path(self._path):
            while into:
                done = os.preadv(self._fd, [into[:_PIECE_BYTES]], offset)
                if done == 0:
                    raise OSError(errno.EIO, f"ends at byte {offset}, {len(into)} more were expected")
                on_piece(into[:done])
                offset += done
                into = into[done:]

    def close(self) -> None:
        os.close(self._fd)


class Disk:
    """The real file system. XXH3-128 detects corruption, not attackers (for those: engine.checkpoint.seal)."""

    digest_name = "xxh3_128"

    def digest(self, data: bytes | bytearray | memoryview) -> str:
        return xxhash.xxh3_128_hexdigest(data)  # releases the GIL on large data

    def hasher(self) -> Hasher:
        return xxhash.xxh3_128()

    def make_folder(self, path: Path) -> None:
        os.mkdir(path, FOLDER_MODE)

    def create(self, path: Path, size: int) -> Writer:
        return _DiskWriter(path, size)

    def open(self, path: Path, *, uncached: bool = False) -> StoredFile:
        return _DiskFile(path, uncached)

    def sync_folder(self, path: Path) -> None:
        with _with_path(path):
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
            info = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        kind = "file" if stat_module.S_ISREG(info.st_mode) else "other"
        return Status("folder" if stat_module.S_ISDIR(info.st_mode) else kind, info.st_size)

    def free_bytes(self, path: Path) -> int:
        info = os.statvfs(path)
        return info.f_bavail * info.f_frsize


DISK = Disk()


def make_folders(storage: Storage, path: Path) -> None:
    """Create a folder and its missing parents. All are durable except the name of the last one.

    Several ranks may do this at once.
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
    """Write a small file and make its content durable (its name becomes durable when the folder is synced)."""
    writer = storage.create(path, len(data))
    try:
        writer.write(memoryview(data))
        writer.sync()
    finally:
        writer.close()


def remove_tree(storage: Storage, folder: Path) -> None:
    """Delete a folder recursively; a link or file at that path is only unlinked.

    Entries that another process deletes in the meantime are skipped.
    """
    if (status := storage.stat(folder)) is not None and status.kind != "folder":
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
