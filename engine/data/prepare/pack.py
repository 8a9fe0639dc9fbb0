"""Encoded documents to the content of a .bin: BOS and end tokens, range check, histogram and dtype conversion."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from engine.data.samples.native_index import native_index

Packed = tuple[npt.NDArray[Any], npt.NDArray[np.int32], int | None]


def begin_documents(
    tokens: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32], bos: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Insert `bos` before every non-empty document; returns (tokens, lengths), shapes as for `pack`."""
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
    """Append `eod` to every non-empty document, convert to `dtype`, and add the token histogram to `counts`.

    tokens: int32 [T], concatenated documents; lengths: int32 [documents]. eod: None for no end token; empty documents
    get none, as it would end the document before a second time. counts: int64 [vocab_size], updated in place.
    Returns (tokens [T'], lengths int32 [documents], None), or an id outside the vocabulary as the last element; then
    tokens and counts are meaningless.
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
    """`pack` in numpy: the reference for tests, and the fallback if the extension is not built."""
    filled = lengths > 0
    if eod is not None:
        tokens = np.insert(tokens, np.cumsum(lengths)[filled], np.int32(eod))
        lengths = lengths + filled
    outside = np.flatnonzero(tokens.view(np.uint32) >= len(counts))  # negative ids are large as uint32
    if outside.size:
        return tokens.astype(dtype), lengths, int(tokens[outside[0]])
    counts += np.bincount(tokens, minlength=len(counts))
    return tokens.astype(dtype), lengths, None
