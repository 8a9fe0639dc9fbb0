"""Counts the false alarms of `engine.proof.difference` on correct layouts in bf16, or in another precision.

    python -m tests.proofs.clean_layouts --count 200
    python -m tests.proofs.clean_layouts --count 50 --precision fp32 --seed 7

Layouts and options are drawn at random. A layout is compared with one process, which has the same model and data and
one sample per micro-batch.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine.config.schema import Config
from engine.errors import ConfigError
from engine.proof.difference import MOVES, LayoutDifference, compare
from engine.proof.report import place_of
from engine.proof.sides import Side, noise_of, record
from engine.proof.small_data import with_small_data
from engine.proof.traces import Trace
from tests.support.cases import config

_SIZES = {"model_num_layers": 4, "model_hidden_size": 16, "model_num_heads": 4, "model_num_kv_heads": 2}
_SIZES |= {"model_ffn_size": 24, "train_seq_len": 8, "train_global_batch_size": 4, "data_mask_eod": True}
MODELS: tuple[dict[str, Any], ...] = (
    {"model_tie_embeddings": True, "train_z_loss": 0.03},
    {"model_qk_norm": True, "train_dropout": 0.2, "train_attention_dropout": 0.1},
    {"model_norm_position": "sandwich", "model_window": 3, "model_window_layers": "wf"},
    {"model_norm_position": "post", "model_qk_norm": True, "model_qk_norm_span": "projection"},
    {"model_parallel_residual": True, "model_norm": "layernorm", "model_qkv_bias": True, "model_mlp_bias": True},
    {
        "model_positions": "learned",
        "model_gated_mlp": False,
        "model_activation": "gelu_tanh",
        "model_norm": "layernorm",
    },
    {"data_separate_documents": True, "model_num_kv_heads": 1, "model_norm_offset": True},
)
LAYOUT: dict[str, tuple[Any, ...]] = {
    "parallel_tensor": (1, 2, 4),
    "parallel_pipeline": (1, 1, 2, 4),
    "parallel_data": (1, 1, 2, 4),
    "parallel_schedule": ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v"),
    "parallel_sequence": (True, False),
    "parallel_zero": (1, 0),
    "train_recompute": ("none", "selective", "full"),
    "train_micro_batch_size": (1, 2),
}


def drawn(rng: random.Random, model: dict[str, Any], most: int) -> Config:
    """A valid config of a random layout of more than one rank, on at most `most`."""
    while True:
        options = {name: rng.choice(values) for name, values in LAYOUT.items()}
        world = options["parallel_tensor"] * options["parallel_pipeline"] * options["parallel_data"]
        if 1 < world <= most:
            try:
                return config(world, **_SIZES | model | options)
            except ConfigError:
                continue


def compared(cfg: Config, reference: Path, folder: Path) -> LayoutDifference:
    """A layout against a recorded reference."""
    record(Side(cfg, redrawn=True), folder, [noise_of([cfg], 0)], 1)
    there, *moves = (Trace(reference / str(move)) for move in range(MOVES + 1))
    return compare(Trace(folder / "0"), there, moves)


def main() -> int:
    """Compare layouts; the exit code is 0 if none differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="number of layouts")
    parser.add_argument("--precision", default="bf16", help="train.precision")
    parser.add_argument("--seed", type=int, default=1, help="of the layouts")
    parser.add_argument("--most", type=int, default=4, help="largest number of ranks")
    args = parser.parse_args()
    rng, alarms, rectangles = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory(prefix="clean_layouts_") as name:
        root = Path(name)
        for number in range(args.count):
            begin, index = time.monotonic(), number % len(MODELS)
            reference, data = root / f"reference{index}", root / f"data{index}"
            model = MODELS[index] | {"train_precision": args.precision, "data_train": str(data / "train")}
            if not reference.exists():
                data.mkdir()
                one = config(1, **_SIZES | model)
                with_small_data(config(1, **_SIZES | MODELS[index]), data)
                record(Side(one, redrawn=True), reference, [noise_of([one], move) for move in range(MOVES + 1)], 1)
            cfg = drawn(rng, model, args.most)
            with tempfile.TemporaryDirectory(dir=root) as folder:
                found = compared(cfg, reference, Path(folder))
            rectangles += found.compared
            alarms += bool(found.findings)
            p = cfg.parallel
            text = f"tensor {p.tensor} pipeline {p.pipeline} data {p.data} {p.schedule}, model {index}"
            first = found.findings[0] if found.findings else None
            what = f"{place_of(first.here)}: {first.distance:.1e} > {first.allowed:.1e}" if first else "clean"
            print(f"{number + 1} {time.monotonic() - begin:.0f} s  {text}: {what}", flush=True)
    print(f"{alarms} false alarms in {args.count} layouts, {rectangles:,} rectangles, {args.precision}")
    return int(alarms > 0)


if __name__ == "__main__":
    sys.exit(main())
