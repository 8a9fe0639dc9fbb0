"""Processor seconds of a training step with two data ranks and ZeRO-1, by size and number of gradient buckets.

    python tools/bench/buckets.py --layers 24 --steps 6

The slower rank's median, over shared memory and over gloo, in each round. In a source tree of each version it compares
how buckets are made.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from report import show

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.distributed.context import ParallelContext
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import config, layout_of, random_batches
from tests.support.harness import run_ranks

MODEL: dict[str, Any] = {
    "model_hidden_size": 256,
    "model_num_heads": 8,
    "model_num_kv_heads": 8,
    "model_ffn_size": 688,
    "model_vocab_size": 4096,
    "model_max_seq_len": 256,
    "train_seq_len": 256,
    "train_global_batch_size": 4,
    "train_micro_batch_size": 1,
    "train_precision": "fp32",
    "parallel_data": 2,
}


def measure(transport: str, steps: int, **overrides: Any) -> tuple[float, int]:
    """(seconds of the slower rank per step, number of buckets of a rank)."""
    cfg = config(2, **MODEL | overrides)

    def job(ctx: ParallelContext) -> tuple[float, int]:
        state, seconds = setup(cfg, ctx), []
        for step in range(steps + 1):
            batches = random_batches(cfg, ctx, step)
            begin = time.process_time()
            train_step(state, batches)
            seconds.append(time.process_time() - begin)
        return statistics.median(seconds[1:]), sum(len(stage.buckets) for stage in state.buckets)

    ranks = run_ranks(layout_of(cfg), job, dtype=torch.float32, timeout_s=600, transport=transport)
    return max(seconds for seconds, _ in ranks), ranks[0][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--bucket-mib", type=float, nargs="+", default=[32.0, 4.0])
    args = parser.parse_args()
    lines = []
    for transport in ("auto", "gloo"):
        for size in args.bucket_mib:
            options = {"model_num_layers": args.layers, "parallel_bucket_mib": size}
            found = [measure(transport, args.steps, **options) for _ in range(args.rounds)]
            seconds = ", ".join(f"{seconds:.2f}" for seconds, _ in found)
            lines.append((transport, f"{size:g}", str(found[0][1]), seconds))
    show("training step", ("transport", "bucket MiB", "buckets", "CPU s per step, each round"), lines)


if __name__ == "__main__":
    main()
