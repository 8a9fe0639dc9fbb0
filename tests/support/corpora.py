"""Tiny corpora of known tokens, and whether the extension that reads them is built."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from engine.data.samples.indexed import IndexedDataset
from engine.data.samples.indexed_writer import IndexedWriter

# By presence, not by native_index(): that rejects a faulty extension, and its tests would be skipped silently.
BUILT = importlib.util.find_spec("engine._index") is not None
NATIVE = [False, pytest.param(True, marks=pytest.mark.skipif(not BUILT, reason="engine._index is not built"))]


def corpus(prefix: Path, lengths: list[int], vocab_size: int = 60_000) -> IndexedDataset:
    """Documents of these lengths with tokens 1, 2, 3, ..., so that each token identifies its position."""
    ends = np.cumsum(lengths) if lengths else []
    with IndexedWriter(prefix, vocab_size) as writer:
        for length, end in zip(lengths, ends):
            writer.add(np.arange(end - length + 1, end + 1) % vocab_size)
        writer.finish({})
    return IndexedDataset(prefix, vocab_size)


def rows_of_61(prefix: Path) -> str:
    """60 documents of 60 tokens below 61, for a model with a vocabulary of 61; returns the prefix."""
    with IndexedWriter(prefix, 61) as writer:
        for k in range(60):
            writer.add((np.arange(60) * 7 + k) % 61)
        writer.finish({})
    return str(prefix)
