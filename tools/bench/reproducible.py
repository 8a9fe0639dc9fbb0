"""Which results of this CPU are the same in every bit, and what torch's deterministic algorithms cost.

    python tools/bench/reproducible.py        # two minutes on two cores

runs: training twice, in turns as it is and with torch.use_deterministic_algorithms: bits of the losses and gradient
norms, CPU seconds of a step on one thread. log probabilities: the loss of each sample of a batch, in training and in
evaluation, for several micro-batch sizes and numbers of threads, against evaluation with micro-batch 1.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from engine.batch import MicroBatch, Rows, micro_batches
from engine.config.derived import derive
from engine.config.load import load
from engine.distributed.context import make_context
from engine.ops import native
from engine.optim.precision import PRECISIONS
from engine.pipeline.executor import execute
from engine.pipeline.schedules import forward_only
from engine.train.state import TrainState, setup
from engine.train.step import train_step


@dataclass(frozen=True)
class Options:
    hidden: int = 256
    layers: int = 2
    vocab: int = 4096
    seq: int = 256
    batch: int = 8
    rounds: int = 5
    threads: int = 2
    precisions: tuple[str, ...] = ("fp32", "bf16")


@dataclass(frozen=True)
class Way:
    """How the losses of samples are computed."""

    micro_batch: int
    training: bool = False
    threads: int = 1

    def __str__(self) -> str:
        kind = "training" if self.training else "evaluation"
        return f"{kind}, micro-batch {self.micro_batch}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def make(o: Options, precision: str, micro_batch: int) -> TrainState:
    values = {
        "model.vocab_size": o.vocab,
        "model.hidden_size": o.hidden,
        "model.ffn_size": 11 * o.hidden // 4,
        "model.num_layers": o.layers,
        "model.max_seq_len": o.seq,
        "train.seq_len": o.seq,
        "train.micro_batch_size": micro_batch,
        "train.global_batch_size": o.batch,
        "train.precision": precision,
        "train.device": "cpu",
    }
    cfg = load([], {name: str(value) for name, value in values.items()}, world=1).config
    return setup(cfg, make_context(derive(cfg).layout, 0, dtype=PRECISIONS[precision].compute))


def batches_of(o: Options, micro_batch: int, seed: int = 0) -> list[MicroBatch]:
    rows = torch.randint(o.vocab, (o.batch, o.seq + 1), generator=torch.Generator().manual_seed(seed))
    return micro_batches(Rows.from_tokens(rows, *[torch.arange(o.batch)] * 2), micro_batch)


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """torch's deterministic algorithms, as users of other engines switch them on."""
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def compare_runs(o: Options, precision: str) -> None:
    """Print whether runs are equal and what a step costs, as it is and with deterministic algorithms."""
    torch.set_num_threads(1)
    runs = {(on, number): make(o, precision, o.batch // 2) for number in (0, 1) for on in (False, True)}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    results: dict[tuple[bool, int], list[tuple[float, float]]] = {key: [] for key in runs}
    for step in range(o.rounds + 1):
        batches = batches_of(o, o.batch // 2, step)
        for (on, number), state in runs.items():
            began = time.process_time()
            with deterministic(on):
                done = train_step(state, batches)
            if step:
                seconds[on].append(time.process_time() - began)
            results[on, number].append((done.loss, done.norms.norm))
    equal = {on: results[on, 0] == results[on, 1] for on in (False, True)}
    ratios = [b / a for a, b in zip(seconds[False], seconds[True])]
    print(f"{precision}: two runs of {o.rounds + 1} steps: {_equality(equal[False])}")
    print(
        f"{precision}: with deterministic algorithms: {_equality(equal[True])}; compared with runs without: "
        f"{_equality(results[False, 0] == results[True, 0])}; a step takes "
        f"{statistics.median(ratios):.3f} of the time ({min(ratios):.3f}-{max(ratios):.3f})"
    )


def _equality(equal: bool) -> str:
    return "the same bits" if equal else "DIFFERENT BITS"


def sample_losses(o: Options, precision: str, way: Way) -> Tensor:
    """The loss of each sample, every label counted as 1: float64 [batch]."""
    torch.set_num_threads(way.threads)
    state, batches = make(o, precision, way.micro_batch), batches_of(o, way.micro_batch)
    for stage in state.buckets:
        stage.zero_grad()
    plan = state.plan if way.training else forward_only(state.plan, len(batches))
    return execute(plan, state.stages, state.ctx, batches).losses.flatten()


def compare_losses(o: Options, precision: str) -> None:
    """Print, for each way, how many samples have another loss than alone in a micro-batch, and by how much."""
    sizes = [n for n in (1, 2, 4, 8) if o.batch % n == 0]
    ways = [Way(n, training) for n in sizes for training in (False, True)] + [Way(sizes[-1], threads=o.threads)]
    reference = sample_losses(o, precision, ways[0])
    for way in ways[1:]:
        losses = sample_losses(o, precision, way)
        count = int((losses != reference).sum())
        error = float(((losses - reference) / reference).abs().max())
        found = f"{count} of {o.batch} samples differ, by {error:.1e} at most" if count else "the same bits"
        print(f"{precision}: {way}: {found}", flush=True)


def main() -> None:
    o = tyro.cli(Options, description=__doc__)
    print(f"kernels: {native.describe_kernels(torch.device('cpu'), torch.float32)}")
    for precision in o.precisions:
        compare_runs(o, precision)
        compare_losses(o, precision)


if __name__ == "__main__":
    main()
