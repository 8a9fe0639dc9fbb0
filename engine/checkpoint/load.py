"""Loading: any layout from any layout. A rank reads the rectangles it holds, whatever rectangles were written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoint.format import DTYPES, Manifest, read_manifest, verify_files
from engine.comm import raise_together
from engine.context import ParallelContext
from engine.errors import CheckpointError, EngineError
from engine.optim.adamw import Held
from engine.sharding import Piece


class Reader:
    """Reads rectangles of canonical tensors from one checkpoint folder. A context manager; files open on first use."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def names(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Canonical name -> global shape of all tensors of a kind."""
        return {name: entry.shape for name, entry in self.manifest.tensors.get(kind, {}).items()}

    def read(self, kind: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A rectangle of a tensor, put together from whatever rectangles hold it, in its stored dtype.

        Raises CheckpointError when the tensor is not there or the rectangle is not covered exactly once.
        """
        entry = self.manifest.tensors.get(kind, {}).get(name)
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
            block = self._slice(part.file, part.key, part.shape, source)
            out[target] = block
            covered += block.numel()
        if covered != out.numel():
            raise CheckpointError(f"{self.folder}: {kind} {name}: {covered} of {out.numel()} values are there; damaged")
        return out

    def whole(self, kind: str, name: str) -> Tensor:
        """A whole canonical tensor."""
        shape = self.names(kind)[name]
        return self.read(kind, name, (0,) * len(shape), shape)

    def _slice(self, file: str, key: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> Tensor:
        try:
            if file not in self._open:
                if file not in self.manifest.files:
                    raise CheckpointError(f"{self.folder}: {key} lies in {file}, which the manifest does not list")
                self._open[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
            view = self._open[file].get_slice(key)
            if tuple(view.get_shape()) != shape:
                raise CheckpointError(f"{self.folder / file}: {key} has shape {view.get_shape()}, not {list(shape)}")
            return view[index]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file}: {key}: {error}; take another checkpoint") from None


def load_into(reader: Reader, states: Iterable[Held], ctx: ParallelContext, *, verify: bool = True) -> None:
    """Fill this rank's tensors from a checkpoint of any layout. Collective: a fault on one rank is one on all.

    verify: compare file digests first, the ranks sharing the files among them.
    """
    error: EngineError | None = None
    try:
        if verify:
            verify_files(reader.folder, reader.manifest, part=ctx.rank, parts=ctx.world.size)
        with torch.no_grad():
            for held in states:
                held.flat.zero_()  # padding rows are in no checkpoint
                for piece in held.param.spec.pieces(ctx):
                    _fill(reader, held, piece)
    except EngineError as fault:
        error = fault
    raise_together(error, ctx.world, ctx.device)


def _fill(reader: Reader, held: Held, piece: Piece) -> None:
    have = reader.names(held.kind).get(piece.name)
    if have is not None and have != piece.global_shape:
        raise CheckpointError(
            f"{reader.folder}: {piece.name} has shape {list(have)}, the model wants "
            f"{list(piece.global_shape)}; it is of another model"
        )
    for offset, shape, first in piece.rectangles(held.begin, held.begin + len(held.flat)):
        begin = first - held.begin
        held.flat[begin : begin + math.prod(shape)].view(shape).copy_(reader.read(held.kind, piece.name, offset, shape))
