"""Checkpoints of a short training run on two ranks, and copies with an edited manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.checkpoint.format import with_digest
from engine.config.schema import Config
from engine.distributed.context import ParallelContext
from engine.train.resume import save_state
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import config, layout_of, random_batches
from tests.support.harness import run_ranks

FACTS: dict[str, Any] = {"prefix": "x", "num_documents": 1, "num_tokens": 1, "tokenizer_digest": None}
TWO = config(2, parallel_tensor=2)


def save_one(root: Path, cfg: Config = TWO, steps: int = 1) -> Path:
    def job(ctx: ParallelContext) -> None:
        state = setup(cfg, ctx)
        for step in range(steps):
            train_step(state, random_batches(cfg, ctx, step))
            save_state(state, root, FACTS)

    run_ranks(layout_of(cfg), job, num_kv_heads=cfg.model.num_kv_heads)
    return root / f"step_{steps:08d}"


def reseal(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit a manifest and give it the digest that it then has."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["xxh3_128"]
    edit(manifest)
    path.write_bytes(with_digest(json.dumps(manifest).encode()))


def as_step(saved: Path, root: Path, step: int) -> Path:
    """A copy of a checkpoint that is one of another step."""
    folder = Path(shutil.copytree(saved, root / f"step_{step:08d}"))
    reseal(folder, lambda m: m.update(step=step))
    return folder
