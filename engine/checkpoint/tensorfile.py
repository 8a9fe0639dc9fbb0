"""Writes a safetensors file in one pass, computing digests, and reads it in blocks that can be verified one by one.

A tensor is digested in *blocks* of whole rows. A block has at most `block_bytes`, unless one row is longer. To read
some rows, only the blocks that contain them are read and verified. The header has its own digest, so each byte of the
file is covered by exactly one digest. The storage chooses the digest algorithm.
"""

from __future__ import annotations

import json
import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from engine.checkpoint.storage import DISK, Storage, StoredFile
from engine.errors import CheckpointError
from engine.util.prefetch import map_ahead

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

BLOCK_BYTES = 16 << 20
HeaderEntry = tuple[str, tuple[int, ...], int, int]  # dtype name, shape, first byte in the file, byte after the last
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_IN_FLIGHT = 4  # blocks whose digests may be pending while the next ones are written


def rows_per_block(shape: tuple[int, ...], itemsize: int, block_bytes: int) -> int:
    """Number of rows (indices of the first dim) in a block."""
    return max(1, block_bytes // max(1, math.prod(shape[1:]) * itemsize))


def tensor_bytes(x: Tensor) -> memoryview:
    """Raw little-endian bytes of a tensor; no copy if it is contiguous and on the CPU."""
    flat = x.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed only when it is about to be written, so that a file may be larger than memory.

    make: returns a tensor of this dtype and shape. Called once, in another thread, while the previous one is written.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def _materialized(tensors: Mapping[str, Tensor | LazyTensor]) -> Generator[tuple[str, Tensor], None, None]:
    """Names and tensors in order. At most three lazy tensors are in memory at a time."""
    if not any(isinstance(x, LazyTensor) for x in tensors.values()):
        yield from cast(Mapping[str, Tensor], tensors).items()
        return
    with closing(map_ahead(lambda item: _materialize(item[1]), iter(tensors.items()), 1)) as ahead:
        for (name, _), x in ahead:
            yield name, x


def _materialize(x: Tensor | LazyTensor) -> Tensor:
    if isinstance(x, Tensor):
        return x
    tensor = x.make()
    assert tensor.dtype == x.dtype and tuple(tensor.shape) == x.shape  # the header is already written
    return tensor


@dataclass(frozen=True)
class WrittenFile:
    """Size of a written file in bytes, digest of its header, and digests of the blocks of each key."""

    size: int
    header: str
    digests: dict[str, tuple[str, ...]]


def build_header(tensors: Mapping[str, Tensor | LazyTensor], metadata: dict[str, str] | None) -> tuple[bytes, int]:
    """(all bytes before the first tensor, size of the whole file in bytes)."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, x in tensors.items():
        begin, end = end, end + math.prod(x.shape) * x.dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + end


def write_safetensors(
    file: Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    metadata: dict[str, str] | None = None,
    *,
    storage: Storage = DISK,
    block_bytes: int = BLOCK_BYTES,
    proceed: Callable[[], None] = lambda: None,
) -> WrittenFile:
    """Write and sync a safetensors file block by block, without copying contiguous CPU tensors.

    (The writer of the safetensors library needs the whole file as one bytes object.) A second thread digests each block
    while it is written, and a third computes the next lazy tensor. proceed: called before each block; an exception from
    it stops the writing. Raises OSError as storage does.
    """
    head, size = build_header(tensors, metadata)
    digests: dict[str, list[str]] = {name: [] for name in tensors}
    waiting: deque[tuple[str, Future[str]]] = deque()

    def collect(limit: int) -> None:
        while len(waiting) > limit:
            name, result = waiting.popleft()
            digests[name].append(result.result())

    out = storage.create(file, size)
    try:
        with ThreadPoolExecutor(1, "digest") as digester, closing(_materialized(tensors)) as ready:
            out.write(memoryview(head))
            for name, x in ready:
                data = tensor_bytes(x)
                row = math.prod(x.shape[1:]) * x.element_size()
                step = rows_per_block(tuple(x.shape), x.element_size(), block_bytes) * row
                for begin in range(0, len(data), max(1, step)):
                    proceed()
                    block = data[begin : begin + step]
                    waiting.append((name, digester.submit(storage.digest, block)))
                    out.write(block)
                    collect(_IN_FLIGHT)
            collect(0)
        proceed()
        out.sync()
    finally:
        out.close()
    return WrittenFile(size, storage.digest(head), {name: tuple(found) for name, found in digests.items()})


class TensorFile:
    """An open safetensors file. entries: dtype, shape and byte range of each key.

    header: expected digest of the header, empty if unknown. Raises CheckpointError if the digest differs or the header
    is invalid.
    """

    def __init__(self, file: Path, storage: Storage, *, header: str = "", uncached: bool = False):
        self.file, self._storage, self._uncached = file, storage, uncached
        # one handle per thread, because the kernel reads ahead for one stream per handle
        self._sources: dict[int, StoredFile] = {}
        try:
            self.entries = self._read_header(self._source(), header)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the file back."""
        for source in self._sources.values():
            source.close()
        self._sources.clear()

    def read_rows(self, key: str, first: int, last: int, into: memoryview) -> str:
        """Fill `into` with rows [first, last) of a key; returns the digest of these bytes."""
        _, shape, begin, end = self.entries[key]
        row, hasher = (end - begin) // max(1, shape[0]), self._storage.hasher()
        self._source().read_into(begin + first * row, into[: (last - first) * row], hasher.update)
        return hasher.hexdigest()

    def _source(self) -> StoredFile:
        thread = threading.get_ident()
        if thread not in self._sources:
            self._sources[thread] = self._storage.open(self.file, uncached=self._uncached)
        return self._sources[thread]

    def _read_header(self, source: StoredFile, wanted: str) -> dict[str, HeaderEntry]:
        size = source.size
        length = bytearray(8)
        if size >= 8:
            source.read_into(0, memoryview(length))
        count = int.from_bytes(length, "little")
        possible = 2 <= count <= min(size - 8, _MAX_HEADER_BYTES)
        text = bytearray(count if possible else 0)
        source.read_into(8, memoryview(text))
        if wanted and (found := self._storage.digest(length + text)) != wanted:
            raise CheckpointError(
                "checkpoint.digest-differs",
                f"{self.file}: damaged: digest {found} of its header, the manifest lists {wanted}; "
                "use another checkpoint",
            )
        if not possible:
            raise CheckpointError(
                "checkpoint.tensor-header-damaged",
                f"{self.file}: damaged: its header states a length of {count} bytes, the file has {size}; "
                "use another checkpoint",
            )
        try:
            table = json.loads(text)
            return dict(self._entries(table, 8 + count, size))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                "checkpoint.tensor-header-damaged",
                f"{self.file}: damaged: its header cannot be read ({type(error).__name__}: {error}); "
                "use another checkpoint",
            ) from None

    def _entries(self, table: dict[str, Any], start: int, size: int) -> Iterator[tuple[str, HeaderEntry]]:
        at = 0
        rows = [(name, e) for name, e in table.items() if name != "__metadata__"]
        for name, e in sorted(rows, key=lambda item: item[1]["data_offsets"][0]):
            begin, end = e["data_offsets"]
            shape = tuple(e["shape"])
            if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
                raise ValueError(f"{name}: offsets and shape must be whole numbers")
            if begin != at or end - begin != math.prod(shape) * DTYPES[e["dtype"]].itemsize:
                raise ValueError(
                    f"{name}: bytes {begin} to {end} do not hold a {e['dtype']} {list(shape)} starting at {at}"
                )
            yield name, (e["dtype"], shape, start + begin, start + end)
            at = end
        if start + at != size:
            raise ValueError(f"tensors end at byte {start + at}, the file has {size}")
