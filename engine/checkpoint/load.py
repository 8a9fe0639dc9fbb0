"""Loading: any layout from any layout. Each rank reads the rectangles it needs, independent of those that were written.

Reads are verified: bytes are read in blocks of whole rows, and each block is compared with its digest before use. So
nothing is read twice, and only the necessary blocks are read. A block that is needed as a whole is read directly into
the tensor and digested piece by piece while it is in the core's cache. Each thread reads consecutive blocks through
its own file handle, so that the kernel reads ahead. Memory in addition to the tensors to fill: one block per thread.

A `TensorSource` provides canonical tensors: from one of our checkpoints (`Reader`), or in interop from a Hugging Face
folder (`HfReader`) or a Megatron-LM checkpoint (`MegatronSource`).
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from engine.checkpoint.format import (
    FileSlice,
    Manifest,
    TensorEntry,
    block_rows,
    find_file_damage,
    read_manifest,
    unexpected_files,
    verify_block,
)
from engine.checkpoint.storage import DISK, PROCESS_ERRNOS, Storage
from engine.checkpoint.tensorfile import DTYPES, TensorFile, rows_per_block, tensor_bytes
from engine.distributed.collectives import raise_together
from engine.distributed.context import ParallelContext
from engine.distributed.specs import Piece
from engine.errors import CheckpointError, EngineError
from engine.optim.optimizer import StateShard

_THREADS = 2  # one thread digests or copies while the other waits for the disk


class TensorMeta(Protocol):
    """A canonical tensor: global shape, and dtype as safetensors names it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


class Rectangle(Protocol):
    """A rectangular part of a tensor: offset and shape."""

    @property
    def offset(self) -> tuple[int, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


E = TypeVar("E", bound=TensorMeta)
R = TypeVar("R", bound=Rectangle)


class TensorSource(ABC, Generic[E]):
    """Reads rectangles of canonical tensors from a folder. A context manager; files are opened on first use.

    entries: kind -> canonical name -> metadata of the stored tensor.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Mapping[str, E]]):
        self.folder, self.entries = folder, entries

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close the files."""

    def verify(self, *, part: int = 0, parts: int = 1) -> None:
        """Check what lazy reads would miss, in every `parts`-th file from number `part`. Raises CheckpointError."""

    @abstractmethod
    def _fill_tasks(self, name: str, entry: E, offset: tuple[int, ...], out: Tensor) -> Iterator[Callable[[], None]]:
        """Calls that together fill `out` with the rectangle at `offset`, which is inside the tensor."""

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Canonical name -> global shape of all tensors of a kind."""
        return {name: entry.shape for name, entry in self.entries.get(kind, {}).items()}

    def read(self, kind: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A rectangle of a tensor in its stored dtype, assembled from the stored rectangles that contain it.

        Raises CheckpointError if the tensor is missing or damaged, or the rectangle is not covered exactly once.
        """
        out = torch.empty(shape, dtype=DTYPES[self._entry(kind, name).dtype])
        for fill in self.fill_tasks(kind, name, offset, out):
            fill()
        return out

    def read_whole(self, kind: str, name: str) -> Tensor:
        """A whole canonical tensor."""
        shape = self._entry(kind, name).shape
        return self.read(kind, name, (0,) * len(shape), shape)

    def fill_tasks(self, kind: str, name: str, offset: tuple[int, ...], out: Tensor) -> Iterator[Callable[[], None]]:
        """Calls that together fill `out` (any dtype, any device) with the rectangle at `offset`, one per block.

        They may be called in any order and by several threads.
        """
        entry, shape = self._entry(kind, name), tuple(out.shape)
        if len(shape) != len(entry.shape) or any(o + n > size for o, n, size in zip(offset, shape, entry.shape)):
            raise CheckpointError(
                "checkpoint.shape-differs",
                f"{self.folder}: {name} has shape {list(entry.shape)}, but rows {offset}+{shape} are needed; "
                "the checkpoint is from another model",
            )
        yield from self._fill_tasks(f"{kind} {name}", entry, offset, out)

    def _entry(self, kind: str, name: str) -> E:
        entry = self.entries.get(kind, {}).get(name)
        if entry is None:
            raise CheckpointError(
                "checkpoint.tensor-missing", f"{self.folder}: has no {kind} tensor {name}; it is from another model"
            )
        return entry

    def _overlapping(
        self, name: str, parts: Iterable[R], offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> list[tuple[R, list[int], list[int]]]:
        """The parts that overlap a wanted rectangle, each with the overlap [low, high) in global indices.

        Raises CheckpointError unless the parts contain every value of the rectangle exactly once.
        """
        found = [(part, *_intersection(offset, shape, part)) for part in parts]
        found = [(part, low, high) for part, low, high in found if all(a < b for a, b in zip(low, high))]
        covered = sum(math.prod(b - a for a, b in zip(low, high)) for _, low, high in found)
        if covered != math.prod(shape) or _any_overlap([(low, high) for _, low, high in found]):
            raise CheckpointError(
                "checkpoint.values-missing",
                f"{self.folder}: {name}: its parts have {covered} of {math.prod(shape)} values, or overlap; damaged",
            )
        return found


class Reader(TensorSource[TensorEntry]):
    """Reads canonical tensors from one of our checkpoints.

    Raises CheckpointError if the manifest is invalid or the folder has files that it does not list.
    """

    def __init__(self, folder: Path, storage: Storage = DISK):
        self._storage = storage
        self.manifest: Manifest = read_manifest(folder, storage)
        if others := unexpected_files(folder, self.manifest, storage):
            raise CheckpointError(
                "checkpoint.unexpected-files",
                f"{folder / others[0]}: does not belong to this checkpoint (the first of {len(others)} such files); "
                "move it away, or use another checkpoint",
            )
        super().__init__(folder, self.manifest.tensors)
        self._open: dict[str, TensorFile] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _fill_tasks(
        self, name: str, entry: TensorEntry, offset: tuple[int, ...], out: Tensor
    ) -> Iterator[Callable[[], None]]:
        size = self.manifest.block_bytes or 16 << 20
        for part, low, high in self._overlapping(name, entry.slices, offset, tuple(out.shape)):
            rows = rows_per_block(part.shape, DTYPES[entry.dtype].itemsize, size)
            for block in range((low[0] - part.offset[0]) // rows, -(-(high[0] - part.offset[0]) // rows)):
                yield partial(self._fill, out, offset, entry, part, low, high, block, size)

    def _fill(
        self,
        out: Tensor,
        offset: tuple[int, ...],
        entry: TensorEntry,
        part: FileSlice,
        low: list[int],
        high: list[int],
        block: int,
        block_bytes: int,
    ) -> None:
        """Copy the part of one block that is in [low, high) (global) into `out`, whose first value is at `offset`."""
        first, last, num_bytes = block_rows(part, block, entry.dtype, block_bytes)
        begin, end = max(low[0], part.offset[0] + first), min(high[0], part.offset[0] + last)
        target = out[
            tuple(slice(a - o, b - o) for a, b, o in zip((begin, *low[1:]), (end, *high[1:]), offset, strict=True))
        ]
        dtype, file = DTYPES[entry.dtype], self._file(part, entry.dtype)
        whole = end - begin == last - first and tuple(target.shape[1:]) == part.shape[1:]
        if whole and target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous():
            verify_block(file, part, block, entry.dtype, block_bytes, tensor_bytes(target))
            return
        rows = torch.empty((last - first, *part.shape[1:]), dtype=dtype)
        verify_block(file, part, block, entry.dtype, block_bytes, tensor_bytes(rows)[:num_bytes])
        within = ((begin - first, end - first), *zip(low[1:], high[1:]))
        target.copy_(rows[tuple(slice(a - o, b - o) for (a, b), o in zip(within, part.offset))])

    def _file(self, part: FileSlice, dtype: str) -> TensorFile:
        path = self.folder / part.file
        with self._lock:
            file = self._open.get(part.file)
            if file is None:
                file = self._open[part.file] = self._open_file(path, part)
        if file.entries.get(part.key, ())[:2] != (dtype, part.shape):
            have = file.entries.get(part.key)
            raise CheckpointError(
                "checkpoint.tensor-not-as-listed",
                f"{path}: {part.key} has {f'shape {list(have[1])} {have[0]}' if have else 'no bytes in this file'}, "
                f"not {list(part.shape)} {dtype}; use another checkpoint",
            )
        return file

    def _open_file(self, path: Path, part: FileSlice) -> TensorFile:
        listed = self.manifest.files.get(part.file)
        if listed is None:
            raise CheckpointError(
                "checkpoint.file-not-listed",
                f"{self.folder}: {part.key} is in {part.file}, which the manifest does not list",
            )
        if self.manifest.schema_version == 1:
            for damage in find_file_damage(path, self.manifest, self._storage):
                raise CheckpointError("checkpoint.digest-differs", f"{damage}; use another checkpoint")
        try:
            return TensorFile(path, self._storage, header=listed.header)
        except OSError as error:
            if error.errno in PROCESS_ERRNOS:  # not damage: do not fall back to an older checkpoint
                raise
            raise CheckpointError(
                "checkpoint.file-unreadable", f"{path}: {error.strerror or error}; use another checkpoint"
            ) from None


def _intersection(offset: tuple[int, ...], shape: tuple[int, ...], part: Rectangle) -> tuple[list[int], list[int]]:
    """Overlap [low, high) of a wanted and a stored rectangle; empty if low >= high in some dim."""
    low = [max(a, b) for a, b in zip(offset, part.offset)]
    return low, [min(a + n, b + k) for a, n, b, k in zip(offset, shape, part.offset, part.shape)]


def _any_overlap(rectangles: list[tuple[list[int], list[int]]]) -> bool:
    """Whether any two of these rectangles overlap."""
    ordered = sorted(rectangles)
    for i, (low, high) in enumerate(ordered):
        for other_low, other_high in ordered[i + 1 :]:
            if other_low[0] >= high[0]:
                break
            if all(max(a, c) < min(b, d) for a, b, c, d in zip(low, high, other_low, other_high)):
                return True
    return False


def load_into(reader: TensorSource[Any], states: Iterable[StateShard], ctx: ParallelContext) -> None:
    """Fill this rank's state shards from a checkpoint of any layout. Collective: all ranks raise if one fails."""
    error: EngineError | None = None
    pool, ended = ThreadPoolExecutor(_THREADS, "load"), threading.Event()
    try:
        reader.verify(part=ctx.rank, parts=ctx.world.size)
        tasks = [task for shard in states for task in _fill_tasks(reader, shard, ctx)]
        runs = [tasks[len(tasks) * i // _THREADS : len(tasks) * (i + 1) // _THREADS] for i in range(_THREADS)]
        for done in [pool.submit(_run_tasks, run, ended) for run in runs]:
            done.result()
    except EngineError as caught:
        error = caught
    finally:
        ended.set()
        pool.shutdown()
    raise_together(error, ctx.world, ctx.device)


def _run_tasks(tasks: list[Callable[[], None]], ended: threading.Event) -> None:
    """Run tasks in order until one raises, in this thread or in another."""
    try:
        with torch.no_grad():  # grad mode is per thread
            for task in tasks:
                if ended.is_set():
                    return
                task()
    except BaseException:
        ended.set()
        raise


def _fill_tasks(reader: TensorSource[Any], shard: StateShard, ctx: ParallelContext) -> Iterator[Callable[[], None]]:
    pieces = [
        (piece, *rectangle)
        for piece in shard.param.spec.pieces(ctx)
        for rectangle in piece.rectangles(shard.begin, shard.begin + len(shard.flat))
    ]
    if sum(math.prod(shape) for _, _, shape, _ in pieces) < len(shard.flat):
        shard.flat.zero_()  # checkpoints do not contain padding rows
    for piece, offset, shape, first in pieces:
        _check_shape(reader, shard, piece)
        begin = first - shard.begin
        yield from reader.fill_tasks(
            shard.kind, piece.name, offset, shard.flat[begin : begin + math.prod(shape)].view(shape)
        )


def _check_shape(reader: TensorSource[Any], shard: StateShard, piece: Piece) -> None:
    entry = reader.entries.get(shard.kind, {}).get(piece.name)
    have = piece.global_shape if entry is None else entry.shape  # a missing tensor is reported when it is read
    if have != piece.global_shape:
        raise CheckpointError(
            "checkpoint.shape-differs",
            f"{reader.folder}: {piece.name} has shape {list(have)}, the model needs "
            f"{list(piece.global_shape)}; the checkpoint is from another model",
        )
