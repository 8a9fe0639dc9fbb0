"""Human-readable summary of a checkpoint: contents, tensor norms and lineage."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from engine.checkpoint.lineage import config_digest, format_lineage
from engine.checkpoint.load import Reader
from engine.optim.update_rules import MODEL


@dataclass(frozen=True)
class TensorStats:
    """Statistics of a canonical tensor. shape: global. files: number of files. norm: L2, NaN if not computed."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    files: int
    norm: float


def summary(reader: Reader) -> Iterator[str]:
    """Step, data position, layout, sizes and lineage, as lines of text."""
    m = reader.manifest
    degrees = " x ".join(f"{axis} {n}" for axis, n in m.layout.items() if n > 1) or "one process"
    parameters = sum(math.prod(entry.shape) for entry in m.tensors.get(MODEL, {}).values())
    size = sum(entry.size for entry in m.files.values())
    yield f"{reader.folder}: step {m.step:,}, {parameters:,} parameters, {len(m.files)} files, {size:,} bytes"
    yield f"data position: {m.consumed_samples:,} samples, {m.consumed_tokens:,} tokens"
    yield f"data: {', '.join(f'{name} {value}' for name, value in m.data.items() if value is not None)}"
    optimizer = ", ".join(f"{name} {value:g}" for name, value in m.optimizer.items())
    state = "none, weights only" if m.kinds is None else f"{', '.join(m.kinds) or 'none needed'} ({optimizer})"
    yield f"optimizer state: {state}"
    yield f"written by {degrees}: {', '.join(f'{name} {v}' for name, v in m.versions.items())}"
    yield f"config {config_digest(m.config)}"
    if m.initial_values:
        yield f"initial weights: drawn by {m.initial_values}"
    yield from format_lineage(m.lineage) or ["no earlier checkpoint: the run started from initial weights"]


def tensor_stats(reader: Reader, *, norms: bool) -> Iterator[TensorStats]:
    """Statistics of every tensor, by kind, with layers in numerical order.

    norms: compute L2 norms in float64, which reads all tensors, one rectangle at a time.
    """
    for kind, entries in reader.manifest.tensors.items():
        for name, entry in sorted(entries.items(), key=lambda item: _natural_order(item[0])):
            norm = math.nan
            if norms:
                parts = (reader.read(kind, name, part.offset, part.shape) for part in entry.slices)
                norm = math.sqrt(sum(float(part.double().square_().sum()) for part in parts))
            files = len({part.file for part in entry.slices})
            yield TensorStats(kind, name, entry.shape, entry.dtype, files, norm)


def _natural_order(name: str) -> list[str | int]:
    """Sort key that puts layers.2 before layers.10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
