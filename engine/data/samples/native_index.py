"""Loads engine._index (csrc/data), the optional C++ extension for sample order, blends, packing and corpus checks.

Without it numpy computes the same, more slowly; tests check that both are equal.
"""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np

from engine.data.samples.keyed import permute
from engine.errors import DataError
from engine.util import extension

_INTERFACE = 4  # of csrc/data/module.cpp, incremented when a signature changes, so that an older build is rejected


def load() -> tuple[ModuleType | None, str]:
    """(engine._index, "") or (None, reason): not built, or built from another definition."""
    module, why = extension.load("engine._index", f"interface {_INTERFACE}")
    index = np.arange(100, dtype=np.int64)
    if module is not None and not np.array_equal(module.permute(1000, 42, index), permute(1000, 42, index)):
        return None, "engine._index was built for another sample order"
    return module, why


@functools.cache
def native_index() -> ModuleType | None:
    """engine._index if it has this version, else None, without a warning."""
    return load()[0]


@functools.cache
def _index_or_warn() -> ModuleType | None:
    """engine._index, or None after one warning."""
    module, why = load()
    if module is None:
        extension.warn(why, "the sample order is computed in numpy, with the same result but slower")
    return module


def select_index(native: bool | None) -> ModuleType | None:
    """engine._index or None. native: None uses it if available, True requires it (DataError), False disables it."""
    module = None if native is False else _index_or_warn()
    if native and module is None:
        raise DataError(
            "samples.extension-missing",
            "engine._index is required but not built: pip install --no-build-isolation --no-deps -e .",
        )
    return module
