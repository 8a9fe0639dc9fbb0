"""Writing files so that a crash or a power cut leaves the old content or the new, nothing between."""

from __future__ import annotations

import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


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


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file and make it durable (its name too, once the folder is synced)."""
    with path.open("wb") as file:
        file.write(data)
        sync_file(file)


@contextmanager
def locked(path: Path) -> Iterator[str]:
    """Hold a lock file; gives who holds it ("process 12 on host"), empty when that is now this process.

    The system takes the lock back when the process ends, however it ends: none is ever stale. Warns on file systems
    that know no locks.
    """
    with path.open("a+b") as file:
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
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            file.flush()
        yield holder
