"""Memory-mapped file that detects when it is truncated while it is being read.

Reading a page that no longer exists raises SIGBUS, and this cannot be tested in advance. csrc/data/guard.h replaces the
page by zeros and records it; the reader calls `check` before it uses the data. Reads have no overhead.
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

    native: engine._index. Without it, a truncation between reads is still detected, but reading a missing page ends the
    process (SIGBUS).
    """

    def __init__(self, path: Path, native: ModuleType | None):
        self.path, self._native, self._token = path, native, 0
        self._map: mmap.mmap | None = None
        self.bytes: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
        try:
            with path.open("rb") as file:
                if path.stat().st_size:  # mmap rejects empty files, but an empty corpus is valid
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
        """Raise DataError if some data read since the file was opened may not be its content."""
        if self._map is None:
            return
        size, lost = self._map.size(), self._native.lost(self._token) if self._native else -1
        if size < len(self.bytes):
            problem = f"was truncated while it was read: it had {len(self.bytes)} bytes and now has {size}"
        elif lost >= 0:
            problem = f"its bytes from offset {lost} could not be read: it was truncated, or its disk has failed"
        else:
            return
        raise DataError(
            "samples.corpus-cut-short",
            f"{self.path}: {problem}. The model was not trained on the invalid data. Restore the file (write new files "
            "under another name), then start the same command again.",
        )
