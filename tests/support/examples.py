"""The scripts of examples/, on a tiny model: their environment, a config and the losses of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from engine.data.samples.indexed_writer import IndexedWriter
from tests.support.paths import BIN, ROOT

SCRIPT, SLURM = ROOT / "examples/pretrain_7b.sh", ROOT / "examples/pretrain_7b.slurm"
PORT = str(20000 + os.getpid() % 10000)  # avoids ports of other processes; each host namespace has separate ports
TINY = """
[model]
preset = "micro"
vocab_size = 97
[parallel]
tensor = 2
pipeline = 1
timeout_s = 60
[train]
global_batch_size = 8
seq_len = 32
precision = "fp64"
[eval]
every = 0
[optimizer]
lr = 1e-2
[lr_schedule]
kind = "constant"
warmup_steps = 0
[data]
train = "{corpus}"
valid = ""
tokenizer = ""
[monitor]
tensorboard = false
"""


def environment(**more: str) -> dict[str, str]:
    """This process's environment without a launcher's variables, with this Python's commands first in PATH."""
    names = ("RANK", "WORLD_SIZE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GPUS_PER_NODE")
    kept = {k: v for k, v in os.environ.items() if k not in names and not k.startswith("SLURM_")}
    return kept | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"} | more


def tiny_config(folder: Path) -> Path:
    """A config in `folder` that makes the 7B script train a tiny float64 model on a corpus of consecutive numbers."""
    rng = np.random.default_rng(0)
    with IndexedWriter(folder / "counting", vocab_size=97) as writer:
        for _ in range(200):
            writer.add((rng.integers(97) + np.arange(rng.integers(5, 200))) % 97)
        writer.finish({"text_bytes": 40000})
    config = folder / "tiny.toml"
    config.write_text(TINY.format(corpus=folder / "counting"))
    return config


def losses(run: Path) -> list[float]:
    """The losses of all steps; asserts that each step is recorded once and in order."""
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    return [r["loss"] for r in records]
