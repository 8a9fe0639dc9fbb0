"""A file as an array of bytes in memory that notices when the file is cut short under its reader.

A page of a mapped file that is gone cannot be looked for first: touching it raises SIGBUS. csrc/data/guard.h puts zeros
in its place and remembers it, and whoever has read asks `check` before using anything. Reading costs nothing more.
"""

from __future__ import annotations

import mmap
import weakref
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

from engine.errors import DataError


class MappedFile:
    """All bytes of a file, uint8 [size], read-only. Raises DataError if it cannot be opened.

    native: engine._index. Without it a file that is cut short between two checks is noticed, and one that is cut short
    while it is being read ends the process (SIGBUS).
    """

    def __init__(self, path: Path, native: ModuleType | None):
        self.path, self._native, self._token = path, native, 0
        self._map: mmap.mmap | None = None
        self.bytes: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
        try:
            with path.open("rb") as file:
                if path.stat().st_size:  # mmap refuses empty files; an empty corpus is a valid one
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as err:
            hint = " Give the prefix without the suffix." if path.stem.endswith((".bin", ".idx")) else ""
            raise DataError(
                "samples.corpus-not-found", f"{path}: no such file. A corpus is PREFIX.bin and PREFIX.idx.{hint}"
            ) from err
        except (OSError, ValueError) as err:
            why = getattr(err, "strerror", None) or err
            raise DataError(
                "samples.corpus-unreadable", f"{path}: cannot be read: {why}. Check the path and its permissions."
            ) from err
        if self._map is not None:
            self.bytes = np.frombuffer(self._map, np.uint8)
            if native is not None:
                self._token = native.guard(self.bytes)
                weakref.finalize(self._map, native.release, self._token).atexit = False

    def check(self) -> None:
        """Raise DataError if not all that was read since the file was opened can have been its own bytes."""
        if self._map is None:
            return
        size, lost = self._map.size(), self._native.lost(self._token) if self._native else -1
        if size < len(self.bytes):
            what = f"was cut short while it was read: it had {len(self.bytes)} bytes and has {size}"
        elif lost >= 0:
            what = f"its bytes from {lost} on could not be read: it was cut short meanwhile, or its disk has failed"
        else:
            return
        raise DataError(
            "samples.corpus-cut-short",
            f"{self.path}: {what}. Nothing was learnt from what was read then. Restore the file, and write new ones "
            "under another name; then start the same command again.",
        )
