"""Shared by all workers of train_cpu.py: the cases, their sizes and data, and timing.

Every rank is a fresh worker process (worker.py). It may run in another interpreter, which has a peer but not the
engine, so this module needs only torch.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from machine import busy_s
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One program under measure. micro_batches: per rank and step. peer: it runs in the peers' interpreter."""

    title: str
    column: str
    processes: int = 1
    threads: int = 2
    micro_batches: int = 1
    peer: bool = False

    def sequences(self, micro_batch: int) -> int:
        """Sequences of one step over all ranks."""
        return micro_batch * self.micro_batches * (self.processes if self.column == "data" else 1)


@dataclass(frozen=True)
class Column:
    """What is compared: ours is the case of the engine, the others are its peers."""

    title: str
    ours: str
    processes: int
    threads: int
    micro_batches: int = 1


COLUMNS = {
    "one": Column("1 process x 2 threads", "engine", 1, 2),
    "data": Column("data=2", "data", 2, 1),
    "tensor": Column("tensor=2", "tensor", 2, 1),
    "pipeline": Column("pipeline=2, 8 microbatches", "pipeline", 2, 1, 8),
}
PEERS = {  # peer -> title, columns it can do, and whether it runs in the peers' interpreter
    "loop": ("transformers loop", ("one", "data"), False),
    "compiled": ("transformers, compiled", ("one", "data"), False),
    "trainer": ("HF Trainer, compiled", ("one", "data"), True),
    "litgpt": ("litgpt, compiled", ("one", "data"), True),
    "olmo": ("OLMo-core", ("one", "data"), True),
    "megatron": ("Megatron-core", ("one", "data", "tensor", "pipeline"), True),
}


def _case(column: Column, key: str, title: str, peer: bool) -> Case:
    return Case(title, key, column.processes, column.threads, column.micro_batches, peer)


CASES = {column.ours: _case(column, key, "engine", False) for key, column in COLUMNS.items()} | {
    name if key == "one" else f"{key}.{name}": _case(COLUMNS[key], key, title, peer)
    for name, (title, keys, peer) in PEERS.items()
    for key in keys
}


@dataclass(frozen=True)
class Options:
    """Sizes are those of a 58 M model, which takes the engine about 3 s a step on two cores."""

    cases: tuple[str, ...] = ()
    """which to measure, by name; none: all of the columns"""
    columns: tuple[str, ...] = tuple(COLUMNS)
    """one (process), data, tensor, pipeline"""
    rounds: int = 5
    """how often every case runs"""
    steps: int = 6
    """timed steps a run; cases with larger steps take fewer, at least 2"""
    warmup: int = 2
    """steps before the clock starts"""
    quiet: float = 0.1
    """others may use so many cores during a step that counts"""
    tries: int = 4
    """so many times `steps` are made at most to find undisturbed ones; then the least disturbed count"""
    threads: int = 2
    """of the one-process cases"""
    patience: float = 60.0
    """seconds to wait for a quiet machine before each run"""
    timeout: float = 900.0
    """seconds after which a run of one case is given up"""
    peers_env: Path = field(default_factory=lambda: Path(__file__).resolve().parents[2] / "build/bench-peers")
    """folder of the peers' packages; made on first use"""
    peers: bool = True
    """also compare with peers that are not installed with the engine"""
    gemm_size: int = 4096
    """rows and columns of the matmul whose speed is the limit"""
    json: Path | None = None
    """write every number here"""
    hidden: int = 512
    layers: int = 8
    heads: int = 8
    ffn: int = 1376
    vocab: int = 32_000
    seq: int = 512
    micro_batch: int = 4
    lr: float = 3e-4

    def case(self, name: str) -> Case:
        """The case of that name with as many threads as asked for."""
        case = CASES[name]
        return replace(case, threads=self.threads) if case.processes == 1 else case

    def steps_of(self, case: Case) -> tuple[int, int]:
        """(warm-up, timed) steps, so that every case computes for about as long."""
        larger = case.sequences(self.micro_batch) // self.micro_batch
        return max(1, self.warmup // larger), max(2, self.steps // larger)

    def parameters(self) -> int:
        """Of the model: Llama's, head and embedding apart."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.ffn + 2 * self.hidden
        return 2 * self.vocab * self.hidden + self.layers * layer + self.hidden

    def flops_per_token(self) -> int:
        """Forward and backward: 6 per weight of the matrices, and attention's two matmuls, not halved for the mask."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.ffn
        return 6 * (self.layers * layer + self.vocab * self.hidden) + 12 * self.layers * self.hidden * self.seq

    def stages(self) -> tuple[int, int]:
        """Layers of the two pipeline stages, with FLOPs as equal as possible; the head is on the last. Same for all."""
        layer = 6 * (4 * self.hidden**2 + 3 * self.hidden * self.ffn) + 12 * self.hidden * self.seq
        head = 6 * self.vocab * self.hidden
        cuts = range(1, self.layers)
        first = min(cuts, key=lambda n: max(n * layer, (self.layers - n) * layer + head))
        return first, self.layers - first


def batch_of(o: Options, sequences: int) -> tuple[Tensor, Tensor]:
    """Random tokens and labels [sequences, seq]: the same for all cases of one size, and every step the same.

    The loss then falls from about ln(vocab) as the model learns them by heart, for all in the same way.
    """
    rows = torch.randint(0, o.vocab, (sequences, o.seq + 1), generator=torch.Generator().manual_seed(0))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def mine(o: Options, case: Case, rank: int) -> tuple[Tensor, Tensor]:
    """This rank's rows of the batch."""
    tokens, labels = batch_of(o, case.sequences(o.micro_batch))
    if case.column != "data":
        return tokens, labels
    part = slice(rank * o.micro_batch, (rank + 1) * o.micro_batch)
    return tokens[part], labels[part]


class Meter:
    """Times steps until enough of them were undisturbed. `total` sums a tensor over the case's ranks, so that all ranks
    make the same decisions."""

    def __init__(self, o: Options, case: Case, parameters: int, total: Callable[[Tensor], Tensor] = lambda x: x):
        self.o, self.case, self.parameters, self.total = o, case, parameters, total
        self.warmup, self.steps = o.steps_of(case)
        self.losses: list[float] = []
        self.warm: list[float] = []  # seconds of the steps before the clock
        self.taken: list[tuple[float, float, float]] = []  # cores that others used, seconds, processor s of all ranks
        self.errors = 0

    @property
    def done(self) -> bool:
        """Whether enough steps were made."""
        good = sum(others <= self.o.quiet for others, _, _ in self.taken)
        return good >= self.steps or len(self.taken) >= self.o.tries * self.steps

    def begin(self) -> None:
        """A step begins."""
        if len(self.warm) == self.warmup and not self.taken:
            self.errors = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        self.before = busy_s(), time.process_time(), time.perf_counter()

    def end(self, loss: float | None = None) -> None:
        """It is done; `loss` may come later, by `losses`."""
        busy, own, begin = self.before
        seconds = time.perf_counter() - begin
        if loss is not None:
            self.losses.append(loss)
        if len(self.warm) < self.warmup:
            self.warm.append(seconds)
            return
        spent = self.total(torch.tensor([time.process_time() - own, busy_s() - busy]).double())
        others = float(spent[1] / self.case.processes - spent[0]) / seconds
        others = float(self.total(torch.tensor(others).double())) / self.case.processes
        self.taken.append((others, seconds, float(spent[0])))

    def run(self, step: Callable[[], float]) -> dict[str, Any]:
        """Run all steps; returns the measurements as JSON."""
        while not self.done:
            self.begin()
            self.end(step())
        return self.result()

    def result(self) -> dict[str, Any]:
        """The measurements. Page faults and peak are this rank's, peak_sum_mib all ranks'."""
        counted = sorted(self.taken)[: self.steps]
        after = resource.getrusage(resource.RUSAGE_SELF)
        peak = after.ru_maxrss / 1024
        return {
            "seconds": [seconds for _, seconds, _ in counted],
            "cpu_seconds": [cpu for _, _, cpu in counted],
            "others": counted[-1][0],
            "steps_made": len(self.taken),
            "first_step_s": self.warm[0],
            "losses": self.losses,
            "parameters": self.parameters,
            "page_faults_per_step": (after.ru_minflt - self.errors) // len(self.taken),
            "peak_rss_mib": peak,
            "peak_sum_mib": float(self.total(torch.tensor(peak).double())),
        }
