"""Checkpoints of a short training run on two ranks, and copies with an edited manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.checkpoint.format import read_manifest, step_dir, steps_descending, with_digest
from engine.config.schema import Config
from engine.distributed.context import ParallelContext
from engine.errors import CheckpointError
from engine.train.resume import save_state
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import config, layout_of, random_batches
from tests.support.harness import run_ranks

METADATA: dict[str, Any] = {"prefix": "x", "num_documents": 1, "num_tokens": 1, "tokenizer_digest": None}
TWO = config(2, parallel_tensor=2)


def complete_steps(root: Path) -> list[int]:
    """Steps of all complete checkpoints under `root`, ascending. Temporary and damaged folders do not count."""
    found = []
    for step in reversed(steps_descending(root)):
        with suppress(CheckpointError):
            read_manifest(step_dir(root, step))
            found.append(step)
    return found


def save_one(root: Path, cfg: Config = TWO, steps: int = 1) -> Path:
    def job(ctx: ParallelContext) -> None:
        state = setup(cfg, ctx)
        for step in range(steps):
            train_step(state, random_batches(cfg, ctx, step))
            save_state(state, root, METADATA)

    run_ranks(layout_of(cfg), job)
    return root / f"step_{steps:08d}"


def reseal(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit a manifest and recompute its digest."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["xxh3_128"]
    edit(manifest)
    path.write_bytes(with_digest(json.dumps(manifest).encode()))


def as_step(saved: Path, root: Path, step: int) -> Path:
    """Copy a checkpoint under another step number."""
    folder = Path(shutil.copytree(saved, root / f"step_{step:08d}"))
    reseal(folder, lambda m: m.update(step=step))
    return folder
