"""Encoded documents to what a .bin holds: begin tokens, then in one pass end tokens, range check, histogram, dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from engine.data.samples.native_index import native_index

Packed = tuple[npt.NDArray[Any], npt.NDArray[np.int32], int | None]


def begin_documents(
    tokens: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32], bos: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """(tokens, lengths) with `bos` before every document that is not empty; shapes as for `pack`."""
    filled = lengths > 0
    starts = np.cumsum(lengths) - lengths
    return np.insert(tokens, starts[filled], np.int32(bos)), lengths + filled


def pack(
    tokens: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.int32],
    eod: int | None,
    dtype: np.dtype[Any],
    counts: npt.NDArray[np.int64],
) -> Packed:
    """(tokens [T'] in `dtype`, lengths int32 [documents], None), or in the last place an id outside the vocabulary.

    tokens: int32 [T], the documents one after the other; lengths: int32 [documents]. `eod`, if there is one, follows
    every document that is not empty: an end after an empty one would end the one before a second time. counts: int64
    [vocab_size], to which the histogram is added (of no meaning if an id is outside).
    """
    module = native_index()
    if module is None:
        return pack_reference(tokens, lengths, eod, dtype, counts)
    tokens, lengths = np.ascontiguousarray(tokens, np.int32), np.ascontiguousarray(lengths, np.int32)
    written = lengths + (lengths > 0) if eod is not None else lengths
    packed = np.empty(int(written.sum(dtype=np.int64)), dtype)
    wrong = module.pack(tokens, lengths, -1 if eod is None else eod, packed, counts)
    return packed, written, wrong


def pack_reference(
    tokens: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.int32],
    eod: int | None,
    dtype: np.dtype[Any],
    counts: npt.NDArray[np.int64],
) -> Packed:
    """The same in numpy: what the native function is held to, and what works without it."""
    filled = lengths > 0
    if eod is not None:
        tokens = np.insert(tokens, np.cumsum(lengths)[filled], np.int32(eod))
        lengths = lengths + filled
    outside = np.flatnonzero(tokens.view(np.uint32) >= len(counts))  # negative ones are large here
    if outside.size:
        return tokens.astype(dtype), lengths, int(tokens[outside[0]])
    counts += np.bincount(tokens, minlength=len(counts))
    return tokens.astype(dtype), lengths, None
