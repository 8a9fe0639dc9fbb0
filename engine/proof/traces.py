"""The recorded tensors of a run on disk: one file of values and one of lines of JSON for each rank.

Writing appends, reading maps the files, so no process holds more than one tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Phases of a step in program order.
START, FORWARD, BACKWARD, GRADIENTS, UPDATE = range(5)
Array = np.ndarray[Any, Any]
TensorKey = tuple[int, int, str, str]


@dataclass(frozen=True)
class TensorRecord:
    """A rectangle of a canonical tensor, as one rank holds it.

    key: sorts by program order; it begins with step and phase. kind: what the tensor is, such as "activation". name:
    the canonical name. op: the operation that computes it. microbatch: -1 if it belongs to none. offset, shape: the
    rectangle. rank; dtype, at: of its values in the rank's file.
    """

    key: tuple[int, ...]
    kind: str
    name: str
    op: str
    microbatch: int = -1
    offset: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    dtype: str = ""
    at: int = 0
    rank: int = 0

    @property
    def tensor(self) -> TensorKey:
        """What identifies the canonical tensor in a trace: step, phase, kind and name."""
        return self.key[0], self.key[1], self.kind, self.name

    @property
    def layer(self) -> int | None:
        """The number of the layer that the tensor belongs to; None outside the layers."""
        found = re.match(r"layers\.(\d+)", self.name)
        return int(found[1]) if found else None


class TraceWriter:
    """Writes the trace of one rank into a folder. A context manager that closes the files."""

    def __init__(self, folder: Path, rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.rank, self.at = rank, 0
        self.values = (folder / f"rank_{rank}.bin").open("wb")
        self.records = (folder / f"rank_{rank}.jsonl").open("w", encoding="utf-8")

    def write(self, record: TensorRecord, values: Tensor) -> None:
        """Append a rectangle; `record` gives everything except shape, dtype, place and rank."""
        wide = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)
        array = np.ascontiguousarray(wide.cpu().numpy())
        record = replace(record, shape=tuple(values.shape), dtype=array.dtype.str, at=self.at, rank=self.rank)
        self.values.write(array.tobytes())
        self.at += array.nbytes
        self.records.write(json.dumps(vars(record)) + "\n")

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.values.close()
        self.records.close()


class Trace:
    """The trace of a run: all ranks. records: in program order, of one tensor by rank and micro-batch."""

    def __init__(self, folder: Path):
        self.files: dict[int, Array] = {}
        records = []
        for lines in sorted(folder.glob("rank_*.jsonl")):
            rank = int(lines.stem.removeprefix("rank_"))
            values = lines.with_suffix(".bin")
            mapped = np.memmap(values, np.uint8, "r") if values.stat().st_size else np.zeros(0, np.uint8)
            self.files[rank] = np.asarray(mapped)
            with lines.open(encoding="utf-8") as file:
                records += [_record(json.loads(line)) for line in file]
        self.records = sorted(records, key=lambda r: (r.key, r.microbatch, r.rank))
        self.by_tensor: dict[TensorKey, list[TensorRecord]] = defaultdict(list)
        for record in self.records:
            self.by_tensor[record.tensor].append(record)

    def values(self, record: TensorRecord) -> Array:
        """The values of a record, mapped from its file."""
        dtype = np.dtype(record.dtype)
        size = math.prod(record.shape) * dtype.itemsize
        return self.files[record.rank][record.at : record.at + size].view(dtype).reshape(record.shape)

    def rectangle(self, like: TensorRecord) -> tuple[Array, TensorRecord] | None:
        """The same rectangle of the same tensor, float64, and a record that holds a part of it; None if it is not here.

        Where several ranks hold the same values, those of the last are taken.
        """
        out, last = np.full(like.shape, np.nan), None
        covered = np.zeros(like.shape, bool)
        for record in self.by_tensor.get(like.tensor, ()):
            bounds = list(_overlap(like, record))
            if all(low < high for low, high in bounds):
                here = tuple(slice(low - o, high - o) for (low, high), o in zip(bounds, like.offset))
                there = tuple(slice(low - o, high - o) for (low, high), o in zip(bounds, record.offset))
                out[here], covered[here], last = self.values(record)[there], True, record
        return (out, last) if last is not None and covered.all() else None


def _overlap(a: TensorRecord, b: TensorRecord) -> Iterator[tuple[int, int]]:
    """In each dim, the range that two rectangles share; empty if begin >= end."""
    for begin, length, other, more in zip(a.offset, a.shape, b.offset, b.shape):
        yield max(begin, other), min(begin + length, other + more)


def _record(values: dict[str, Any]) -> TensorRecord:
    lists = {name: tuple(values[name]) for name in ("key", "offset", "shape")}
    return TensorRecord(**{**values, **lists})
