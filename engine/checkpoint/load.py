"""Loading: any layout from any layout. A rank reads the rectangles it holds, whatever rectangles were written.

What is read proves itself: bytes come in blocks of whole rows, each compared with its digest before it is used, so that
nothing is read twice and nothing unread is paid for. A block that is wanted whole goes straight into the tensor, and is
digested piece by piece as it comes, while the core's cache has it. Each thread reads a run of blocks through a handle
of its own, so that the kernel reads ahead of each. Memory beyond the tensors to fill: one block a thread.

A `TensorSource` is whatever holds canonical tensors: one of our checkpoints (`Reader`), or what a module of interop
reads: a Hugging Face folder (`HfReader`), a checkpoint of Megatron-LM (`MegatronSource`).
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
    file_damages,
    prove,
    read_manifest,
    unexpected_files,
)
from engine.checkpoint.storage import DISK, OF_THE_PROCESS, Storage
from engine.checkpoint.tensorfile import DTYPES, TensorFile, rows_per_block, tensor_bytes
from engine.distributed.collectives import raise_together
from engine.distributed.context import ParallelContext
from engine.distributed.sharding import Piece
from engine.errors import CheckpointError, EngineError
from engine.optim.adamw import StateShard

_THREADS = 2  # one digests or copies while the other waits for the disk


class TensorMeta(Protocol):
    """A canonical tensor: global shape, dtype name of safetensors."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


class Rectangle(Protocol):
    """A part of a tensor: where it begins, and its shape."""

    @property
    def offset(self) -> tuple[int, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


E = TypeVar("E", bound=TensorMeta)
R = TypeVar("R", bound=Rectangle)


class TensorSource(ABC, Generic[E]):
    """Rectangles of canonical tensors from one folder. A context manager; files open on first use.

    entries: kind -> canonical name -> what is there.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Mapping[str, E]]):
        self.folder, self.entries = folder, entries

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Give the files back."""

    def verify(self, *, part: int = 0, parts: int = 1) -> None:
        """Raise CheckpointError for damage that reading does not show, in files number part, part + parts, ..."""

    @abstractmethod
    def _works(self, name: str, entry: E, offset: tuple[int, ...], out: Tensor) -> Iterator[Callable[[], None]]:
        """The work of filling `out` with a rectangle that lies inside the tensor."""

    def names(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Canonical name -> global shape of all tensors of a kind."""
        return {name: entry.shape for name, entry in self.entries.get(kind, {}).items()}

    def read(self, kind: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A rectangle of a tensor, put together from whatever rectangles hold it, in its stored dtype.

        Raises CheckpointError when the tensor is not there, the rectangle is not covered exactly once, or damaged.
        """
        out = torch.empty(shape, dtype=DTYPES[self._entry(kind, name).dtype])
        for work in self.blocks(kind, name, offset, out):
            work()
        return out

    def whole(self, kind: str, name: str) -> Tensor:
        """A whole canonical tensor."""
        shape = self._entry(kind, name).shape
        return self.read(kind, name, (0,) * len(shape), shape)

    def blocks(self, kind: str, name: str, offset: tuple[int, ...], out: Tensor) -> Iterator[Callable[[], None]]:
        """The work of filling `out` (any dtype, any device) with the rectangle at `offset`, block by block.

        The calls may be made in any order and by several threads.
        """
        entry, shape = self._entry(kind, name), tuple(out.shape)
        if len(shape) != len(entry.shape) or any(o + n > size for o, n, size in zip(offset, shape, entry.shape)):
            raise CheckpointError(
                "checkpoint.shape-differs",
                f"{self.folder}: {name} has shape {list(entry.shape)}, but rows {offset}+{shape} are wanted; "
                "it is of another model",
            )
        yield from self._works(f"{kind} {name}", entry, offset, out)

    def _entry(self, kind: str, name: str) -> E:
        entry = self.entries.get(kind, {}).get(name)
        if entry is None:
            raise CheckpointError(
                "checkpoint.tensor-missing", f"{self.folder}: holds no {kind} tensor {name}; it is of another model"
            )
        return entry

    def _meeting(
        self, name: str, parts: Iterable[R], offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> list[tuple[R, list[int], list[int]]]:
        """The parts that hold something of a wanted rectangle, and where they do: [low, high), global.

        Raises CheckpointError unless every value of it is there once.
        """
        found = [(part, *_common(offset, shape, part)) for part in parts]
        found = [(part, low, high) for part, low, high in found if all(a < b for a, b in zip(low, high))]
        covered = sum(math.prod(b - a for a, b in zip(low, high)) for _, low, high in found)
        if covered != math.prod(shape) or _overlap([(low, high) for _, low, high in found]):
            raise CheckpointError(
                "checkpoint.values-missing",
                f"{self.folder}: {name}: {covered} of {math.prod(shape)} values are there; damaged",
            )
        return found


class Reader(TensorSource[TensorEntry]):
    """The source that one of our checkpoints is.

    Raises CheckpointError for a folder whose manifest is not right or that holds files of something else.
    """

    def __init__(self, folder: Path, storage: Storage = DISK):
        self._storage = storage
        self.manifest: Manifest = read_manifest(folder, storage)
        if others := unexpected_files(folder, self.manifest, storage):
            raise CheckpointError(
                "checkpoint.unexpected-files",
                f"{folder / others[0]}: does not belong to this checkpoint (of {len(others)} such files the first); "
                "move it away, or take another checkpoint",
            )
        super().__init__(folder, self.manifest.tensors)
        self._open: dict[str, TensorFile] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _works(
        self, name: str, entry: TensorEntry, offset: tuple[int, ...], out: Tensor
    ) -> Iterator[Callable[[], None]]:
        size = self.manifest.block_bytes or 16 << 20
        for part, low, high in self._meeting(name, entry.slices, offset, tuple(out.shape)):
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
        """Put what one block of a rectangle has of [low, high) (global) into `out`, which lies at `offset`."""
        first, last, num_bytes = block_rows(part, block, entry.dtype, block_bytes)
        begin, end = max(low[0], part.offset[0] + first), min(high[0], part.offset[0] + last)
        target = out[
            tuple(slice(a - o, b - o) for a, b, o in zip((begin, *low[1:]), (end, *high[1:]), offset, strict=True))
        ]
        dtype, file = DTYPES[entry.dtype], self._file(part, entry.dtype)
        whole = end - begin == last - first and tuple(target.shape[1:]) == part.shape[1:]
        if whole and target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous():
            prove(file, part, block, entry.dtype, block_bytes, tensor_bytes(target))
            return
        rows = torch.empty((last - first, *part.shape[1:]), dtype=dtype)
        prove(file, part, block, entry.dtype, block_bytes, tensor_bytes(rows)[:num_bytes])
        within = ((begin - first, end - first), *zip(low[1:], high[1:]))
        target.copy_(rows[tuple(slice(a - o, b - o) for (a, b), o in zip(within, part.offset))])

    def _file(self, part: FileSlice, dtype: str) -> TensorFile:
        path = self.folder / part.file
        with self._lock:
            file = self._open.get(part.file)
            if file is None:
                file = self._open[part.file] = self._opened(path, part)
        if file.entries.get(part.key, ())[:2] != (dtype, part.shape):
            have = file.entries.get(part.key)
            raise CheckpointError(
                "checkpoint.tensor-not-as-listed",
                f"{path}: {part.key} has {f'shape {list(have[1])} {have[0]}' if have else 'no bytes here'}, "
                f"not {list(part.shape)} {dtype}; take another checkpoint",
            )
        return file

    def _opened(self, path: Path, part: FileSlice) -> TensorFile:
        listed = self.manifest.files.get(part.file)
        if listed is None:
            raise CheckpointError(
                "checkpoint.file-not-listed",
                f"{self.folder}: {part.key} lies in {part.file}, which the manifest does not list",
            )
        if self.manifest.schema_version == 1:
            for damage in file_damages(path, self.manifest, self._storage):
                raise CheckpointError("checkpoint.digest-differs", f"{damage}; take another checkpoint")
        try:
            return TensorFile(path, self._storage, header=listed.header)
        except OSError as error:
            if error.errno in OF_THE_PROCESS:  # no reason to fall back on an older checkpoint
                raise
            raise CheckpointError(
                "checkpoint.file-unreadable", f"{path}: {error.strerror or error}; take another checkpoint"
            ) from None


def _common(offset: tuple[int, ...], shape: tuple[int, ...], part: Rectangle) -> tuple[list[int], list[int]]:
    """Where a wanted rectangle and a stored one meet: [low, high), empty where low >= high in some dim."""
    low = [max(a, b) for a, b in zip(offset, part.offset)]
    return low, [min(a + n, b + k) for a, n, b, k in zip(offset, shape, part.offset, part.shape)]


def _overlap(rectangles: list[tuple[list[int], list[int]]]) -> bool:
    """Whether any two rectangles have a value in common."""
    ordered = sorted(rectangles)
    for i, (low, high) in enumerate(ordered):
        for other_low, other_high in ordered[i + 1 :]:
            if other_low[0] >= high[0]:
                break
            if all(max(a, c) < min(b, d) for a, b, c, d in zip(low, high, other_low, other_high)):
                return True
    return False


def load_into(reader: TensorSource[Any], states: Iterable[StateShard], ctx: ParallelContext) -> None:
    """Fill this rank's tensors from a checkpoint of any layout. Collective: a fault on one rank is one on all."""
    error: EngineError | None = None
    pool, ended = ThreadPoolExecutor(_THREADS, "load"), threading.Event()
    try:
        reader.verify(part=ctx.rank, parts=ctx.world.size)
        works = [work for held in states for work in _works(reader, held, ctx)]
        runs = [works[len(works) * i // _THREADS : len(works) * (i + 1) // _THREADS] for i in range(_THREADS)]
        for done in [pool.submit(_do, run, ended) for run in runs]:
            done.result()
    except EngineError as fault:
        error = fault
    finally:
        ended.set()
        pool.shutdown()
    raise_together(error, ctx.world, ctx.device)


def _do(works: list[Callable[[], None]], ended: threading.Event) -> None:
    """One after another, until one raises, here or in another thread."""
    try:
        with torch.no_grad():  # a thread has its own mode
            for work in works:
                if ended.is_set():
                    return
                work()
    except BaseException:
        ended.set()
        raise


def _works(reader: TensorSource[Any], held: StateShard, ctx: ParallelContext) -> Iterator[Callable[[], None]]:
    pieces = [
        (piece, *rectangle)
        for piece in held.param.spec.pieces(ctx)
        for rectangle in piece.rectangles(held.begin, held.begin + len(held.flat))
    ]
    if sum(math.prod(shape) for _, _, shape, _ in pieces) < len(held.flat):
        held.flat.zero_()  # padding rows are in no checkpoint
    for piece, offset, shape, first in pieces:
        _refuse_another_shape(reader, held, piece)
        begin = first - held.begin
        yield from reader.blocks(held.kind, piece.name, offset, held.flat[begin : begin + math.prod(shape)].view(shape))


def _refuse_another_shape(reader: TensorSource[Any], held: StateShard, piece: Piece) -> None:
    entry = reader.entries.get(held.kind, {}).get(piece.name)
    have = piece.global_shape if entry is None else entry.shape  # that it is missing is told when it is read
    if have != piece.global_shape:
        raise CheckpointError(
            "checkpoint.shape-differs",
            f"{reader.folder}: {piece.name} has shape {list(have)}, the model wants "
            f"{list(piece.global_shape)}; it is of another model",
        )
