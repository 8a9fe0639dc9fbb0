"""Loading: any layout from any layout. A rank reads the rectangles it holds, whatever rectangles were written.

A `Source` is whatever holds canonical tensors as rectangles of safetensors files: one of our checkpoints (`Reader`),
or a Hugging Face folder (hf.HfReader).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoint.format import DTYPES, Manifest, read_manifest, verify_files
from engine.comm import raise_together
from engine.context import ParallelContext
from engine.errors import CheckpointError, EngineError
from engine.optim.adamw import Held
from engine.sharding import Piece


class Part(Protocol):
    """A rectangle of a canonical tensor, and the file and key that hold it."""

    @property
    def file(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def offset(self) -> tuple[int, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Entry(Protocol):
    """A canonical tensor: global shape, dtype name of safetensors, and the rectangles that make it up."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def slices(self) -> Sequence[Part]: ...


class Source(ABC):
    """Reads rectangles of canonical tensors from a folder. A context manager; files open on first use.

    entries: kind -> canonical name -> where it is.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Mapping[str, Entry]]):
        self.folder, self.entries = folder, entries
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    @abstractmethod
    def verify(self, *, part: int = 0, parts: int = 1) -> None:
        """Raise CheckpointError if one of the files number part, part + parts, ... is damaged, as far as is known."""

    @abstractmethod
    def _block(self, part: Part, index: tuple[slice, ...]) -> Tensor:
        """A rectangle of a part, counted from its corner."""

    def names(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Canonical name -> global shape of all tensors of a kind."""
        return {name: entry.shape for name, entry in self.entries.get(kind, {}).items()}

    def read(self, kind: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A rectangle of a tensor, put together from whatever rectangles hold it, in its stored dtype.

        Raises CheckpointError when the tensor is not there or the rectangle is not covered exactly once.
        """
        entry = self.entries.get(kind, {}).get(name)
        if entry is None:
            raise CheckpointError(f"{self.folder}: holds no {kind} tensor {name}; it is of another model")
        if any(o + n > size for o, n, size in zip(offset, shape, entry.shape)) or len(shape) != len(entry.shape):
            raise CheckpointError(
                f"{self.folder}: {name} has shape {list(entry.shape)}, but rows {offset}+{shape} are wanted; "
                "it is of another model"
            )
        out = torch.empty(shape, dtype=DTYPES[entry.dtype])
        covered = 0
        for part in entry.slices:
            low = [max(a, b) for a, b in zip(offset, part.offset)]
            high = [min(a + n, b + k) for a, n, b, k in zip(offset, shape, part.offset, part.shape)]
            if any(lo >= hi for lo, hi in zip(low, high)):
                continue
            source = tuple(slice(lo - b, hi - b) for lo, hi, b in zip(low, high, part.offset))
            target = tuple(slice(lo - a, hi - a) for lo, hi, a in zip(low, high, offset))
            block = self._block(part, source)
            out[target] = block
            covered += block.numel()
        if covered != out.numel():
            raise CheckpointError(f"{self.folder}: {kind} {name}: {covered} of {out.numel()} values are there; damaged")
        return out

    def whole(self, kind: str, name: str) -> Tensor:
        """A whole canonical tensor."""
        shape = self.names(kind)[name]
        return self.read(kind, name, (0,) * len(shape), shape)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = self._stack.enter_context(safe_open(self.folder / name, framework="pt"))
        return self._open[name]


class Reader(Source):
    """The source that one of our checkpoints is."""

    def __init__(self, folder: Path):
        self.manifest: Manifest = read_manifest(folder)
        super().__init__(folder, self.manifest.tensors)

    def verify(self, *, part: int = 0, parts: int = 1) -> None:
        """Compare file digests."""
        verify_files(self.folder, self.manifest, part=part, parts=parts)

    def _block(self, part: Part, index: tuple[slice, ...]) -> Tensor:
        file, key = part.file, part.key
        if file not in self.manifest.files:
            raise CheckpointError(f"{self.folder}: {key} lies in {file}, which the manifest does not list")
        try:
            view = self._file(file).get_slice(key)
            if tuple(view.get_shape()) != part.shape:
                shapes = f"has shape {view.get_shape()}, not {list(part.shape)}"
                raise CheckpointError(f"{self.folder / file}: {key} {shapes}")
            return view[index]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file}: {key}: {error}; take another checkpoint") from None


def load_into(reader: Source, states: Iterable[Held], ctx: ParallelContext, *, verify: bool = True) -> None:
    """Fill this rank's tensors from a checkpoint of any layout. Collective: a fault on one rank is one on all.

    verify: compare file digests first, the ranks sharing the files among them.
    """
    error: EngineError | None = None
    try:
        if verify:
            reader.verify(part=ctx.rank, parts=ctx.world.size)
        with torch.no_grad():
            for held in states:
                held.flat.zero_()  # padding rows are in no checkpoint
                for piece in held.param.spec.pieces(ctx):
                    _fill(reader, held, piece)
    except EngineError as fault:
        error = fault
    raise_together(error, ctx.world, ctx.device)


def _fill(reader: Source, held: Held, piece: Piece) -> None:
    have = reader.names(held.kind).get(piece.name)
    if have is not None and have != piece.global_shape:
        raise CheckpointError(
            f"{reader.folder}: {piece.name} has shape {list(have)}, the model wants "
            f"{list(piece.global_shape)}; it is of another model"
        )
    for offset, shape, first in piece.rectangles(held.begin, held.begin + len(held.flat)):
        begin = first - held.begin
        held.flat[begin : begin + math.prod(shape)].view(shape).copy_(reader.read(held.kind, piece.name, offset, shape))
