"""Atomic and durable writes (a crash or power cut leaves the old content or the new), bounded reads, and locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from engine.errors import DataError

MAX_JSON_BYTES = 1 << 30  # of a file that the engine has written; files from elsewhere have smaller limits
SEALED = b"TRDSEAL1"  # first bytes of an encrypted file (engine.checkpoint.seal)


def sync_file(file: IO[bytes]) -> None:
    """Make the data written to an open file durable."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable; a rename alone may be lost by a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_no_follow(path: str, flags: int) -> int:
    """An opener for `open` that follows no symlink: in a folder that other users can write to, it may lead anywhere."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def replace_synced(path: Path, data: bytes) -> None:
    """Replace a small file atomically: after a crash it has the old content or the new."""
    temporary = path.with_name(f".{path.name}.new")
    write_synced(temporary, data)
    os.replace(temporary, path)


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file and make it durable (its name too, once the folder is synced). No link is followed."""
    with open(path, "wb", opener=open_no_follow) as file:
        file.write(data)
        sync_file(file)


def read_regular(path: Path, max_bytes: int, *, links: bool = True) -> bytes:
    """The bytes of a regular file of at most `max_bytes` bytes; OSError for anything else. links=False: no symlinks.

    Reading a pipe would block, and a device has no end.
    """
    extra = os.O_NONBLOCK | os.O_CLOEXEC | (0 if links else os.O_NOFOLLOW)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | extra)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        data = file.read(min(max_bytes, status.st_size) + 1)  # read() allocates this much memory at once
        if len(data) > status.st_size:  # the file is growing
            data += file.read(max_bytes + 1 - len(data))
    if len(data) > max_bytes:
        size = max(len(data), status.st_size)
        raise OSError(errno.EFBIG, f"has {size:,} bytes, more than the limit of {max_bytes:,}", str(path))
    return data


def read_json(
    path: Path, max_bytes: int = MAX_JSON_BYTES, loads: Callable[[bytes], Any] = json.loads, *, links: bool = True
) -> Any:
    """The JSON value in a regular file of at most `max_bytes` bytes. OSError as `read_regular`; ValueError: not JSON.

    loads: the parser; pass a faster one for files of megabytes. Callers turn the errors into messages for their files.
    """
    data = read_regular(path, max_bytes, links=links)
    try:
        return loads(data)
    except RecursionError as error:  # nested deeper than the parser goes
        raise ValueError(str(error)) from None


@contextmanager
def writing(path: Path, resume_hint: Callable[[], str], needed: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Turn a write error inside the block (disk full, no permission) into a DataError that says how to resume.

    resume_hint: advice for when there is space again. needed: estimate of the bytes still to write; called before the
    free space is read.
    """
    try:
        yield
    except OSError as err:
        raise _write_error(err, path, needed(), resume_hint()) from err


def _write_error(err: OSError, path: Path, needed: int, resume_hint: str) -> DataError:
    where = err.filename or path
    if err.errno == errno.EFBIG:
        text = f"{where}: the limit on the size of a file is reached (ulimit -f). Raise it. {resume_hint}"
        return DataError("data.file-size-limit", text)
    if err.errno not in (errno.ENOSPC, errno.EDQUOT):
        text = f"{where}: cannot be written: {err.strerror or err}. Choose another output, or change its permissions."
        return DataError("data.cannot-write", text)
    folder = next((p for p in (path, *path.absolute().parents) if p.is_dir()), Path("/"))
    state = "the disk is full" if err.errno == errno.ENOSPC else "the quota of this user is used up"
    free = shutil.disk_usage(folder).free
    text = f"{where}: {state}: about {needed:,} more bytes are needed, {free:,} are free. Free space. {resume_hint}"
    return DataError("data.disk-full", text)


@contextmanager
def locked(path: Path) -> Iterator[str]:
    """Take a lock file; yields "" if this process now holds it, else its holder, such as "process 12 on host".

    The system releases the lock when the process ends, even if it is killed, so a lock is never stale. Warns on file
    systems without locks.
    """
    with open(path, "a+b", opener=open_no_follow) as file:
        holder = ""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).decode(errors="replace").strip() or "another process"
        except OSError as error:
            warnings.warn(
                f"{path}: this file system has no locks ({error.strerror}): do not start a second run", stacklevel=3
            )
        if not holder:
            file.truncate(0)
            with suppress(OSError):  # on a full disk the holder stays unnamed
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield holder
