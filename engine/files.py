"""Writing files so that a crash or a power cut leaves the old content or the new, nothing between."""

from __future__ import annotations

import errno
import os
import shutil
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


def write_fault(err: OSError, path: Path, needed_bytes: int, go_on: str) -> str:
    """A failed write in plain words: where, why, for a full disk bytes needed and free; `go_on`: what then helps."""
    where = err.filename or path
    if err.errno == errno.EFBIG:
        return f"{where}: the limit on the size of a file is reached (ulimit -f). Raise it. {go_on}"
    if err.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}: cannot be written: {err.strerror or err}. Choose another output, or change its permissions."
    folder = next((p for p in (path, *path.absolute().parents) if p.is_dir()), Path("/"))
    state = "the disk is full" if err.errno == errno.ENOSPC else "the quota of this user is used up"
    free = shutil.disk_usage(folder).free
    return f"{where}: {state}: about {needed_bytes:,} bytes are needed to go on, {free:,} are free. Make room. {go_on}"
