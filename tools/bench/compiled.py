"""Speed-up of train.compile on this CPU: steps with plain torch code, compiled, and with custom kernels, in turns.

python tools/bench/compiled.py        # a minute and a half on two cores
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from engine.batch import Rows, micro_batches
from engine.config.derived import derive
from engine.config.load import load
from engine.distributed.context import make_context
from engine.ops import native
from engine.train.state import TrainState, setup
from engine.train.step import train_step


@dataclass(frozen=True)
class Options:
    hidden: int = 512
    layers: int = 4
    seq: int = 512
    batch: int = 2
    rounds: int = 5
    threads: int = 2


def make(o: Options, *, compile: bool) -> TrainState:
    values: dict[str, Any] = {
        "model.hidden_size": o.hidden,
        "model.ffn_size": 1376 * o.hidden // 512,
        "model.num_layers": o.layers,
        "train.seq_len": o.seq,
        "train.micro_batch_size": o.batch,
        "train.global_batch_size": o.batch,
        "train.device": "cpu",
        "train.compile": str(compile).lower(),
    }
    cfg = load([], {name: str(value) for name, value in values.items()}, world=1).config
    return setup(cfg, make_context(derive(cfg).layout, 0, dtype=torch.float32))


def main() -> None:
    o = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(o.threads)
    with native.forced(kernels=False):  # the attention cores are chosen when the model is built
        plain, compiled = make(o, compile=False), make(o, compile=True)
    own = make(o, compile=False)
    ways = {"plain torch": (plain, False), "train.compile": (compiled, False), "custom kernels": (own, True)}
    if native.load()[0] is None:
        del ways["custom kernels"]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(o.rounds + 2):
        rows = torch.randint(4096, (o.batch, o.seq + 1), generator=torch.Generator().manual_seed(step))
        (batch,) = micro_batches(Rows.from_tokens(rows, *[torch.arange(o.batch)] * 2), o.batch)
        for name, (state, kernels) in ways.items():
            began = time.perf_counter()
            with native.forced(kernels=kernels):
                train_step(state, [batch])
            seconds[name].append(time.perf_counter() - began)
    tokens = o.batch * o.seq
    for name, all_of in seconds.items():
        rates = [tokens / x for x in all_of[2:]]
        ratios = [a / b for a, b in zip(seconds["plain torch"][2:], all_of[2:])]
        print(
            f"{name}: {statistics.median(rates):.0f} tokens/s ({min(rates):.0f}-{max(rates):.0f}), "
            f"{statistics.median(ratios):.2f} of plain torch ({min(ratios):.2f}-{max(ratios):.2f}), "
            f"first step {all_of[0]:.1f} s"
        )


if __name__ == "__main__":
    main()
