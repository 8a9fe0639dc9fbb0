"""Layout and writer of the .idx file of Megatron's indexed dataset format.

`PREFIX.idx` is little-endian:

    0   9 bytes  magic "MMIDIDX\\0\\0"           26       u64     D = document boundaries, documents + 1
    9   u64      version = 1                    34       i32[N]  sequence lengths, tokens
    17  u8       dtype code of .bin             34+4N    i64[N]  byte offset of every sequence in .bin
    18  u64      N = sequences                  34+12N   i64[D]  boundaries as sequence numbers, 0 ... N
                                                34+12N+8D i8[N]  modes (multimodal only, optional)

A document is any number of sequences. Legend: N sequences, D boundaries.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# 6 and 7 are floats, in an order on which Megatron and gpt-neox disagree; token ids are never floats.
DTYPES: dict[int, str] = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
CHUNK = 1 << 22  # elements processed at once: bounds memory for a corpus of any size

IntArray = npt.NDArray[Any]


def chunks(total: int, size: int = CHUNK) -> Iterator[slice]:
    """Slices that cover range(total), in order."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def code_of(dtype: np.dtype[Any]) -> int:
    """Code of a dtype in the header."""
    return next(code for code, name in DTYPES.items() if np.dtype(name) == dtype)


def write_index(out: IO[bytes], dtype: np.dtype[Any], lengths: IntArray) -> None:
    """Write an .idx for documents of `lengths` int32 [documents] in tokens; one of length 0 has no sequence.

    Streams: `lengths` may be a memory map of a file larger than memory.
    """
    num_sequences = sum(int(np.count_nonzero(lengths[part])) for part in chunks(len(lengths)))
    out.write(HEADER.pack(MAGIC, 1, code_of(dtype), num_sequences, len(lengths) + 1))
    for part in chunks(len(lengths)):
        out.write(lengths[part][lengths[part] > 0].astype("<i4").data)
    end = 0
    for part in chunks(len(lengths)):
        sizes = lengths[part][lengths[part] > 0].astype(np.int64) * dtype.itemsize
        out.write((end + np.cumsum(sizes) - sizes).astype("<i8").data)
        end += int(sizes.sum())
    boundary = 0
    out.write(np.zeros(1, "<i8").data)
    for part in chunks(len(lengths)):
        boundaries = boundary + np.cumsum(lengths[part] > 0)
        out.write(boundaries.astype("<i8").data)
        boundary = int(boundaries[-1])
