"""Writing files so that a crash or a power cut leaves the old content or the new; reading small ones whole."""

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

MAX_JSON_BYTES = 1 << 30  # of a file of our own; what is read of others has a bound of its own
SEALED = b"TRDSEAL1"  # how an encrypted file begins (engine.checkpoint.seal)


def sync_file(file: IO[bytes]) -> None:
    """Make what was written to an open file durable."""
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
    """An opener for `open` that does not follow a link: in a folder that others write to, it leads anywhere."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def replace_synced(path: Path, data: bytes) -> None:
    """Put a small file in the place of what is there: after a crash it is the one or the other."""
    beside = path.with_name(f".{path.name}.new")
    write_synced(beside, data)
    os.replace(beside, path)


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file and make it durable (its name too, once the folder is synced). No link is followed."""
    with open(path, "wb", opener=open_no_follow) as file:
        file.write(data)
        sync_file(file)


def read_regular(path: Path, most: int, *, links: bool = True) -> bytes:
    """The bytes of a regular file of at most `most` bytes. OSError for anything else, and for a link without `links`.

    A pipe would be waited for, and a device has no end.
    """
    how = os.O_NONBLOCK | os.O_CLOEXEC | (0 if links else os.O_NOFOLLOW)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | how)) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        data = file.read(min(most, facts.st_size) + 1)  # as much memory as this is set aside at once
        if len(data) > facts.st_size:  # it grows
            data += file.read(most + 1 - len(data))
    if len(data) > most:
        raise OSError(
            errno.EFBIG, f"has {max(len(data), facts.st_size):,} bytes, and more than {most:,} are not read", str(path)
        )
    return data


def read_json(
    path: Path, most: int = MAX_JSON_BYTES, loads: Callable[[bytes], Any] = json.loads, *, links: bool = True
) -> Any:
    """The JSON value in a regular file of at most `most` bytes. OSError as `read_regular`; ValueError: no JSON.

    loads: another parser, for files of megabytes. Who calls says in its own words what is wrong with whose file.
    """
    data = read_regular(path, most, links=links)
    try:
        return loads(data)
    except RecursionError as error:  # nested deeper than the parser goes
        raise ValueError(str(error)) from None


@contextmanager
def writing(path: Path, resume_hint: Callable[[], str], needed: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Turn a failed write (disk full, no permission) into a DataError that says how to resume.

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
    text = f"{where}: {state}: about {needed:,} bytes are needed to go on, {free:,} are free. Make room. {resume_hint}"
    return DataError("data.disk-full", text)


@contextmanager
def locked(path: Path) -> Iterator[str]:
    """Hold a lock file; gives who holds it ("process 12 on host"), empty when that is now this process.

    The system takes the lock back when the process ends, however it ends: none is ever stale. Warns on file systems
    that know no locks.
    """
    with open(path, "a+b", opener=open_no_follow) as file:
        holder = ""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).decode(errors="replace").strip() or "another process"
        except OSError as error:
            warnings.warn(f"{path}: no lock on this file system ({error.strerror}): start no second run", stacklevel=3)
        if not holder:
            file.truncate(0)
            with suppress(OSError):  # on a full disk nobody is named
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield holder
