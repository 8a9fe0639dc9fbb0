"""Small configs, random batches, and canonical tensors assembled from the pieces of all ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.batch import Documents, MicroBatch, Sequence
from engine.config.derived import derive
from engine.config.load import Resolved, load
from engine.config.phases import phases_of
from engine.config.schema import Config
from engine.distributed.context import ParallelContext
from engine.distributed.layout import Layout
from engine.proof.tensors import Pieces, gradients_of, pieces_of, shard_pieces, weights_of
from engine.proof.tensors import assemble as assembled

MODEL = {
    "vocab_size": 61,  # odd on purpose: every tensor degree pads it
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 2,
    "ffn_size": 48,
    "max_seq_len": 64,
}


def same_bytes(a: Path, b: Path) -> None:
    """AssertionError with the first different byte, unless two files are equal.

    (If CI is set in the environment, pytest prints a line-by-line difference of unequal bytes: minutes for a
    checkpoint.)
    """
    x, y = (np.frombuffer(path.read_bytes(), np.uint8) for path in (a, b))
    if len(x) != len(y):
        raise AssertionError(f"{a} has {len(x)} bytes, {b} has {len(y)}")
    if (different := np.flatnonzero(x != y)).size:
        raise AssertionError(f"{a} and {b} differ in {different.size} of {len(x)} bytes, first at {different[0]}")


def resolve(world: int = 1, **overrides: Any) -> Resolved:
    """A resolved float64 config: MODEL and a short run, changed by overrides such as parallel_tensor=2.

    The rows of a table are a tuple of dicts: optimizer_groups=({"role": "head", "lr_factor": 0.5},).
    """
    values: dict[str, Any] = {f"model.{k}": v for k, v in MODEL.items()}
    values |= {
        "train.steps": 20,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 1,
        "train.seq_len": 16,
        "train.precision": "fp64",
        "train.device": "cpu",
        "optimizer.lr": 3e-3,
        "lr_schedule.warmup_steps": 2,
        "parallel.bucket_mib": 0.01,
        "monitor.tensorboard": False,
    }
    for key, value in overrides.items():
        if row := re.fullmatch(r"(phase)_(\d+)_(\w+)", key):
            values[".".join(row.groups())] = value
            continue
        section = next(s for s in Config.model_fields if key.startswith(f"{s}_"))
        path = f"{section}.{key.removeprefix(section)[1:]}"
        if isinstance(value, tuple):  # rows of a table
            values |= {f"{path}.{n}.{name}": x for n, row in enumerate(value, 1) for name, x in row.items()}
        else:
            values[path] = value
    return load([], {k: str(v) for k, v in values.items()}, world=world)


def config(world: int = 1, **overrides: Any) -> Config:
    """The config of `resolve`, without the sources of its values."""
    return resolve(world, **overrides).config


def layout_of(cfg: Config) -> Layout:
    """The layout of a resolved config."""
    return derive(cfg).layout


def random_batches(cfg: Config, ctx: ParallelContext, step: int) -> list[MicroBatch]:
    """This data rank's microbatches of a global batch with very uneven masks, a function of the step alone."""
    phase = phases_of(cfg).at(step + 1)
    g, s = phase.global_batch_size, phase.seq_len
    rng = np.random.default_rng(step)
    rows = torch.from_numpy(rng.integers(0, cfg.model.vocab_size, (g, s + 1)))
    counted = torch.from_numpy(rng.integers(0, s + 1, g))
    counted[step % g], counted[(step + 3) % g] = 0, s
    mask = torch.arange(s)[None, :] < counted[:, None]
    local, mbs = g // ctx.samples.size, phase.micro_batch_size
    parts = [slice(i, i + mbs) for i in range(ctx.samples.rank * local, (ctx.samples.rank + 1) * local, mbs)]
    numbers = torch.arange(step * g, (step + 1) * g)
    sequences = [Sequence.of_rows(s) for _ in parts]
    if cfg.data.separate_documents:
        begins = torch.from_numpy(rng.random((g, s)) < 0.2) * torch.arange(s)
        starts = begins.cummax(1).values
        sequences = [Sequence.of_rows(s, Documents.from_starts(starts[p])) for p in parts]
    tokens, labels = rows[:, :-1], rows[:, 1:]
    return [
        micro_batch(tokens[p].contiguous(), labels[p].contiguous(), mask[p], numbers[p], sequence)
        for p, sequence in zip(parts, sequences, strict=True)
    ]


def micro_batch(
    tokens: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
    samples: torch.Tensor | None = None,
    sequence: Sequence | None = None,
    **more: Any,
) -> MicroBatch:
    """A micro-batch; by default every label counts, and samples are numbered from 0. weights: of any dtype."""
    weights = torch.ones(tokens.shape) if weights is None else weights
    samples = torch.arange(len(tokens)) if samples is None else samples
    sequence = Sequence.of_rows(tokens.shape[1]) if sequence is None else sequence
    return MicroBatch(tokens, labels, weights.double(), samples, sequence, **more)


def assemble(ranks: list[Pieces]) -> dict[str, np.ndarray]:
    """Canonical tensors from all ranks' pieces; asserts full coverage and that replicas are bitwise equal."""
    found = assembled(ranks)
    assert not found.faults, found.faults
    return found.tensors


def max_relative_error(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Largest difference between two sets of tensors, relative to each tensor's largest value."""
    assert a.keys() == b.keys()
    return max(float(np.abs(a[k] - b[k]).max() / max(np.abs(b[k]).max(), 1e-300)) for k in b)


__all__ = [
    "MODEL",
    "assemble",
    "config",
    "gradients_of",
    "layout_of",
    "max_relative_error",
    "micro_batch",
    "pieces_of",
    "random_batches",
    "resolve",
    "shard_pieces",
    "weights_of",
]
