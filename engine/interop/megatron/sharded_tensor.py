"""A global tensor made of parts: each part is a rectangle of it that is stored in another tensor, and read lazily."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.interop.megatron.archive import StoredTensor

MAX_PARTS = 1024  # of a tensor: a matrix of one layer is sharded across tensor ranks, sometimes across data ranks too


@dataclass(frozen=True)
class TensorPart:
    """A rectangle of a sharded tensor. origin: its start in the stored tensor, which may have extra leading dims."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    open_tensor: Callable[[], StoredTensor]
    origin: tuple[int, ...]


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor of `shape` whose parts cover it exactly once (`check` verifies this). where: its name in messages."""

    where: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[TensorPart, ...]

    def check(self) -> None:
        """Raise CheckpointError unless the parts are inside the shape and cover every value exactly once."""
        if not 1 <= len(self.parts) <= MAX_PARTS:
            raise CheckpointError(
                "interop.megatron-too-many-parts",
                f"{self.where}: has {len(self.parts)} parts; 1 to {MAX_PARTS} are read",
            )
        covered = 0
        for part in self.parts:
            if len(part.shape) != len(self.shape) or not all(
                o >= 0 and n > 0 and o + n <= size for o, n, size in zip(part.offset, part.shape, self.shape)
            ):
                raise CheckpointError(
                    "interop.megatron-part-out-of-place",
                    f"{self.where}: a part of shape {list(part.shape)} at {list(part.offset)} is outside its shape "
                    f"{list(self.shape)}; damaged",
                )
            covered += math.prod(part.shape)
        if covered != math.prod(self.shape):
            raise CheckpointError(
                "interop.megatron-values-missing",
                f"{self.where}: the parts have {covered} values, not {math.prod(self.shape)}; damaged",
            )
        begin = np.array([part.offset for part in self.parts], np.int64)
        end = begin + np.array([part.shape for part in self.parts], np.int64)
        overlaps = ((begin[:, None] < end) & (begin < end[:, None])).all(-1)
        if overlaps.sum() != len(self.parts):  # each part overlaps itself
            raise CheckpointError("interop.megatron-parts-overlap", f"{self.where}: parts overlap; damaged")

    def layers(self) -> list[ShardedTensor]:
        """Split a stacked tensor along dim 0 into one checked tensor per layer. Raises CheckpointError."""
        if not self.shape or sum(part.shape[0] for part in self.parts if part.shape) > MAX_PARTS * 1000:
            raise CheckpointError(
                "interop.megatron-stack-malformed",
                f"{self.where}: shape {list(self.shape)} in {len(self.parts)} parts; damaged",
            )
        parts: list[list[TensorPart]] = [[] for _ in range(self.shape[0])]
        for part in self.parts:
            for index in range(part.offset[0], min(part.offset[0] + part.shape[0], len(parts))):
                origin = (part.origin[0] + index - part.offset[0], *part.origin[1:])
                parts[index].append(TensorPart(part.offset[1:], part.shape[1:], part.open_tensor, origin))
        layers = [
            ShardedTensor(f"{self.where}[{i}]", self.dtype, self.shape[1:], tuple(p)) for i, p in enumerate(parts)
        ]
        for layer in layers:
            layer.check()
        return layers

    def read_into(self, out: Tensor, offset: tuple[int, ...]) -> None:
        """Fill `out` with the rectangle of its shape at `offset`. Raises CheckpointError."""
        for part in self.parts:
            low = [max(a, b) for a, b in zip(offset, part.offset)]
            high = [min(a + n, b + k) for a, n, b, k in zip(offset, out.shape, part.offset, part.shape)]
            if any(lo >= hi for lo, hi in zip(low, high)):
                continue
            lead = len(part.origin) - len(part.shape)
            begin = tuple(o + lo - b for o, lo, b in zip(part.origin[lead:], low, part.offset))
            shape = tuple(hi - lo for lo, hi in zip(low, high))
            block = part.open_tensor().read((*part.origin[:lead], *begin), (*(1,) * lead, *shape))
            out[tuple(slice(lo - a, hi - a) for lo, hi, a in zip(low, high, offset))] = block.view(shape)
