"""Finds documents that duplicate an earlier one, from keys on disk, in bounded memory.

Every document has one row in each column file: `exact` (both 64-bit halves of the digest of its text) and one key for
each MinHash band. Documents with equal keys form a group, of which the earliest is kept. A column is processed in
slices of the key range, each small enough to sort in memory; in addition to a slice, memory holds 8 bytes per document.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

_SLICE_ROWS = 1 << 22  # sorted at once: about 200 MB
_READ_ROWS = 1 << 20


def earliest_match(columns: Sequence[Sequence[Path]], count: int, width: int) -> npt.NDArray[np.int64]:
    """Number of the earliest document that shares a key with each document (itself if none), int64 [count].

    columns: the files of each column, in document order; a row is `width` uint64.
    """
    first = np.arange(count, dtype=np.int64)
    slices = max(1, -(-count // _SLICE_ROWS))
    for files in columns:
        for number in range(slices):
            keys, documents = _slice(files, width, number, slices)
            _group(keys, documents, first)
    return first


def _slice(
    files: Sequence[Path], width: int, number: int, slices: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Rows uint64 [n, width] whose first key is in slice `number` of `slices`, and their document numbers int64 [n]."""
    keys: list[npt.NDArray[np.uint64]] = [np.empty((0, width), np.uint64)]
    documents: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    begin = 0
    for path in files:
        with path.open("rb") as file:
            while (rows := np.fromfile(file, "<u8", _READ_ROWS * width).reshape(-1, width)).size:
                chosen = np.flatnonzero((rows[:, 0] >> np.uint64(40)) % np.uint64(slices) == number)
                keys.append(rows[chosen].astype(np.uint64))
                documents.append(chosen + begin)
                begin += len(rows)
    return np.concatenate(keys), np.concatenate(documents)


def _group(keys: npt.NDArray[np.uint64], documents: npt.NDArray[np.int64], first: npt.NDArray[np.int64]) -> None:
    """Lower first[d] to the earliest document of d's group. `documents` is ascending, and the sort is stable."""
    if not documents.size:
        return
    order = np.lexsort(keys.T)
    keys, documents = keys[order], documents[order]
    starts = np.concatenate([[True], (keys[1:] != keys[:-1]).any(axis=1)])
    heads = documents[np.flatnonzero(starts)[np.cumsum(starts) - 1]]
    first[documents] = np.minimum(first[documents], heads)
