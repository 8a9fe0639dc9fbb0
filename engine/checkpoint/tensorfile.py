"""One safetensors file: its header, its digests, writing it in one pass, reading blocks of it that prove themselves.

A tensor is digested in *blocks* of whole rows, at most `block_bytes` each unless one row is longer: a reader that wants
some rows reads and proves the blocks they lie in and nothing else. The header has a digest of its own, so that every
byte of a file is under exactly one digest. Which kind of digest is the storage's choice.
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
_IN_FLIGHT = 4  # blocks that wait for their digest while the next ones are written


def rows_per_block(shape: tuple[int, ...], itemsize: int, block_bytes: int) -> int:
    """How many rows (indices of the first dim) a block has."""
    return max(1, block_bytes // max(1, math.prod(shape[1:]) * itemsize))


def tensor_bytes(x: Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    flat = x.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when its turn to be written comes, so that a file may be larger than memory.

    make: gives a tensor of this dtype and shape; called once, in another thread, while the tensor before is written.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def _made(tensors: Mapping[str, Tensor | LazyTensor]) -> Generator[tuple[str, Tensor], None, None]:
    """Names and tensors in order. Memory: three of those that were pending."""
    if not any(isinstance(x, LazyTensor) for x in tensors.values()):
        yield from cast(Mapping[str, Tensor], tensors).items()
        return
    with closing(map_ahead(lambda item: _make(item[1]), iter(tensors.items()), 1)) as ahead:
        for (name, _), x in ahead:
            yield name, x


def _make(x: Tensor | LazyTensor) -> Tensor:
    if isinstance(x, Tensor):
        return x
    made = x.make()
    assert made.dtype == x.dtype and tuple(made.shape) == x.shape  # the header is written already
    return made


@dataclass(frozen=True)
class Written:
    """What was written: size in bytes, digest of the header, and digests of each key's blocks."""

    size: int
    header: str
    digests: dict[str, tuple[str, ...]]


def header_of(tensors: Mapping[str, Tensor | LazyTensor], metadata: dict[str, str] | None) -> tuple[bytes, int]:
    """The bytes before the first tensor, and the size of the whole file."""
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
) -> Written:
    """Write and sync a safetensors file block by block, without a copy of contiguous CPU tensors.

    The library's own writer takes the whole file as one bytes object; here a second thread digests each block while it
    is being written, and a third makes the next of those tensors that are pending. proceed: called before each block;
    what it raises ends the writing. OSError as storage raises it.
    """
    head, size = header_of(tensors, metadata)
    digests: dict[str, list[str]] = {name: [] for name in tensors}
    waiting: deque[tuple[str, Future[str]]] = deque()

    def collect(limit: int) -> None:
        while len(waiting) > limit:
            name, result = waiting.popleft()
            digests[name].append(result.result())

    out = storage.create(file, size)
    try:
        with ThreadPoolExecutor(1, "digest") as other, closing(_made(tensors)) as made:
            out.write(memoryview(head))
            for name, x in made:
                data = tensor_bytes(x)
                row = math.prod(x.shape[1:]) * x.element_size()
                step = rows_per_block(tuple(x.shape), x.element_size(), block_bytes) * row
                for begin in range(0, len(data), max(1, step)):
                    proceed()
                    block = data[begin : begin + step]
                    waiting.append((name, other.submit(storage.digest, block)))
                    out.write(block)
                    collect(_IN_FLIGHT)
            collect(0)
        proceed()
        out.sync()
    finally:
        out.close()
    return Written(size, storage.digest(head), {name: tuple(found) for name, found in digests.items()})


class TensorFile:
    """An open safetensors file: where each key's bytes lie.

    header: the digest that its header must have, empty where it is not known. Raises CheckpointError for another, and
    for one that is not sound.
    """

    def __init__(self, file: Path, storage: Storage, *, header: str = "", fresh: bool = False):
        self.file, self._storage, self._fresh = file, storage, fresh
        # of each thread its own: the kernel reads ahead of one stream a handle
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
        """Fill `into` with rows [first, last) of a key; returns the digest of what is in it then."""
        _, shape, begin, end = self.entries[key]
        row, hasher = (end - begin) // max(1, shape[0]), self._storage.hasher()
        self._source().read_into(begin + first * row, into[: (last - first) * row], hasher.update)
        return hasher.hexdigest()

    def _source(self) -> StoredFile:
        thread = threading.get_ident()
        if thread not in self._sources:
            self._sources[thread] = self._storage.open(self.file, fresh=self._fresh)
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
                f"{self.file}: damaged: digest {found} of its header, the manifest says {wanted}; "
                "take another checkpoint",
            )
        if not possible:
            raise CheckpointError(
                "checkpoint.tensor-header-damaged",
                f"{self.file}: damaged: its header would have {count} bytes, the file has {size}; "
                "take another checkpoint",
            )
        try:
            table = json.loads(text)
            return dict(self._entries(table, 8 + count, size))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                "checkpoint.tensor-header-damaged",
                f"{self.file}: damaged: its header cannot be read ({type(error).__name__}: {error}); "
                "take another checkpoint",
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
                raise ValueError(f"{name}: bytes {begin} to {end} are not its {e['dtype']} {list(shape)} from {at} on")
            yield name, (e["dtype"], shape, start + begin, start + end)
            at = end
        if start + at != size:
            raise ValueError(f"tensors end at byte {start + at}, the file has {size}")
