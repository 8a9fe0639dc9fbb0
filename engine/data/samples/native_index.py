"""engine._index (csrc/data): sample order, blends, packing and checks of corpora in C++, where it is built.

Without it numpy does the same, more slowly; tests hold the two equal.
"""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np

from engine.data.samples.keyed import permute
from engine.errors import DataError
from engine.util import extension

_INTERFACE = 4  # of csrc/data/module.cpp, counted up when a signature changes: an older build is refused, not called


def load() -> tuple[ModuleType | None, str]:
    """(engine._index, "") or (None, why not): not built, or built from another definition."""
    module, why = extension.load("engine._index", f"interface {_INTERFACE}")
    index = np.arange(100, dtype=np.int64)
    if module is not None and not np.array_equal(module.permute(1000, 42, index), permute(1000, 42, index)):
        return None, "engine._index was built for another sample order"
    return module, why


@functools.cache
def native_index() -> ModuleType | None:
    """engine._index if it is of this version, else None without a word."""
    return load()[0]


@functools.cache
def _wanted() -> ModuleType | None:
    """engine._index, or None after one warning."""
    module, why = load()
    if module is None:
        extension.warn(why, "the sample order runs in numpy, the same but slower")
    return module


def select_index(native: bool | None) -> ModuleType | None:
    """engine._index: None takes it if it is there, True insists (DataError), False refuses it."""
    module = None if native is False else _wanted()
    if native and module is None:
        raise DataError(
            "samples.extension-missing",
            "engine._index is required but not built: pip install --no-build-isolation --no-deps -e .",
        )
    return module
