"""Tokens/s of training on this CPU: the engine against a hand-written loop, and the engine on two processes.

    python tools/bench/train_cpu.py                          # the whole table, about 20 minutes on two cores
    python tools/bench/train_cpu.py --cases loop engine      # the one-process comparison only

A noisy machine makes single runs worthless, so: rounds. A round runs every case once, each in a fresh process, in an
order that turns from round to round; a case's ratio is taken against the hand-written loop of the same round. Medians
and the whole range over the rounds are shown. A step during which other programs used the processor does not count;
more steps are made until enough were undisturbed. Where that cannot be had, `--threads 1` and the column of processor
seconds are what to look at: a thread that waits for its turn spends none. Nobody's allocator is tuned: MALLOC_*
variables reach all alike.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import busy_s, describe, wait_until_quiet
from rich.console import Console
from rich.table import Table
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One line of the table. micro_batches: per rank and step."""

    title: str
    processes: int
    threads: int
    micro_batches: int = 1
    degrees: tuple[str, ...] = ()

    def sequences(self, micro_batch: int) -> int:
        """Sequences of one step over all ranks."""
        return micro_batch * self.micro_batches * (self.processes if self.degrees == ("data",) else 1)


CASES = {
    "loop": Case("hand-written loop over transformers", 1, 2),
    "engine": Case("engine", 1, 2),
    "data": Case("engine, data=2", 2, 1, degrees=("data",)),
    "tensor": Case("engine, tensor=2", 2, 1, degrees=("tensor",)),
    "pipeline": Case("engine, pipeline=2, 8 microbatches", 2, 1, 8, degrees=("pipeline",)),
}


@dataclass(frozen=True)
class Options:
    """Sizes are those of a 58 M model, which takes the engine about 3 s a step on two cores."""

    cases: tuple[str, ...] = tuple(CASES)
    """which lines to measure: loop, engine, data, tensor, pipeline"""
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
    json: Path | None = None
    """write every number here"""
    hidden: int = 512
    layers: int = 8
    heads: int = 8
    ffn: int = 1376
    vocab: int = 32_000
    seq: int = 512
    micro_batch: int = 4

    def case(self, name: str) -> Case:
        """The case of that name with as many threads as asked for."""
        case = CASES[name]
        return replace(case, threads=self.threads) if case.processes == 1 else case

    def steps_of(self, case: Case) -> tuple[int, int]:
        """(warm-up, timed) steps, so that every case computes for about as long."""
        larger = case.sequences(self.micro_batch) // self.micro_batch
        return max(1, self.warmup // larger), max(2, self.steps // larger)


def random_batch(o: Options, sequences: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [sequences, seq], the same for all cases of one size."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(0, o.vocab, (sequences, o.seq + 1), generator=generator)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def timed(o: Options, case: Case, step: Callable[[int], float], total: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Seconds of each step that counts, the last loss, what the process took from the system, what others used.

    total: sums a tensor over the case's ranks, so that all of them judge a step alike.
    """
    warmup, steps = o.steps_of(case)
    for i in range(warmup):
        step(i)
    before = resource.getrusage(resource.RUSAGE_SELF)
    taken: list[tuple[float, float, float]] = []  # cores that others used, seconds, processor seconds of all ranks
    loss, made = 0.0, 0
    while sum(others <= o.quiet for others, _, _ in taken) < steps and made < o.tries * steps:
        busy, own, begin = busy_s(), time.process_time(), time.perf_counter()
        loss = step(warmup + made)
        seconds = time.perf_counter() - begin
        spent = total(torch.tensor([time.process_time() - own, busy_s() - busy]).double())
        others = float(spent[1] / case.processes - spent[0]) / seconds
        others = float(total(torch.tensor(others).double())) / case.processes
        taken.append((others, seconds, float(spent[0])))
        made += 1
    counted = sorted(taken)[:steps]
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": [seconds for _, seconds, _ in counted],
        "cpu_seconds": [cpu for _, _, cpu in counted],
        "others": counted[-1][0],
        "steps_made": made,
        "loss": loss,
        "page_faults_per_step": (after.ru_minflt - before.ru_minflt) // made,
        "peak_rss_mib": after.ru_maxrss // 1024,
    }


def loop_worker(o: Options) -> dict[str, Any]:
    """The yardstick: what a careful person writes by hand in an afternoon, without compiling."""
    from torch.nn.functional import cross_entropy
    from transformers import LlamaConfig, LlamaForCausalLM

    case = o.case("loop")
    torch.set_num_threads(case.threads)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=o.vocab,
        hidden_size=o.hidden,
        intermediate_size=o.ffn,
        num_hidden_layers=o.layers,
        num_attention_heads=o.heads,
        num_key_value_heads=o.heads,
        max_position_embeddings=o.seq,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(i: int) -> float:
        tokens, labels = random_batch(o, o.micro_batch, i)
        optimizer.zero_grad()
        loss = cross_entropy(model(tokens).logits.view(-1, o.vocab), labels.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return timed(o, case, step, lambda x: x)


def engine_worker(o: Options, name: str) -> dict[str, Any] | None:
    """The engine in this process; None on all ranks but the first."""
    from engine.comm import all_reduce_
    from engine.config import layout_of
    from engine.context import ParallelContext
    from engine.data.loader import MicroBatch
    from engine.launch import read_env, run
    from engine.resolve import load
    from engine.train import setup, train_step

    case = o.case(name)
    torch.set_num_threads(case.threads)
    values = {
        "model.hidden_size": o.hidden,
        "model.num_layers": o.layers,
        "model.num_heads": o.heads,
        "model.ffn_size": o.ffn,
        "model.vocab_size": o.vocab,
        "train.seq_len": o.seq,
        "train.micro_batch_size": o.micro_batch,
        "train.global_batch_size": case.sequences(o.micro_batch),
        "train.device": "cpu",
        "optimizer.lr": 3e-4,
        **{f"parallel.{axis}": case.processes for axis in case.degrees},
    }
    env = read_env()
    cfg = load([], {k: str(v) for k, v in values.items()}, world=env.world).config
    measured: dict[str, Any] = {}

    def main(ctx: ParallelContext) -> int:
        state = setup(cfg, ctx)

        def step(i: int) -> float:
            tokens, labels = random_batch(o, cfg.train.global_batch_size, i)
            per_rank = len(tokens) // ctx.data.size
            mine = range(ctx.data.rank * per_rank, (ctx.data.rank + 1) * per_rank, o.micro_batch)
            parts = [slice(j, j + o.micro_batch) for j in mine]
            mask = torch.ones(o.micro_batch, o.seq, dtype=torch.bool)
            return train_step(state, [MicroBatch(tokens[p], labels[p], mask) for p in parts]).loss

        measured.update(timed(o, case, step, lambda x: all_reduce_(x, ctx.world)))
        return 0

    code = run(
        main,
        env,
        layout_of(cfg),
        num_kv_heads=cfg.model.num_kv_heads,
        dtype=torch.float32,
        device=torch.device("cpu"),
        timeout_s=600.0,
    )
    if code:
        sys.exit(code)
    return measured if env.rank == 0 else None


def worker(name: str, out: str, options: str) -> None:
    """What a fresh process does: measure one case and leave the result in a file."""
    o = Options(**json.loads(options))
    result = loop_worker(o) if name == "loop" else engine_worker(o, name)
    if result is not None:
        Path(out).write_text(json.dumps(result))


def run_case(o: Options, name: str) -> dict[str, Any]:
    """One run of a case in fresh processes."""
    case = o.case(name)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        launcher = [sys.executable]
        if case.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.processes}"]
        options = json.dumps(asdict(o) | {"json": None})
        command = [*launcher, __file__, "worker", name, str(out), options]
        env = os.environ | {"OMP_NUM_THREADS": str(case.threads), "PYTHONFAULTHANDLER": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name} failed with code {done.returncode}:\n{done.stderr[-4000:]}")
        return json.loads(out.read_text())


def spread(values: list[float], digits: int) -> str:
    """Median and whole range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def show(o: Options, runs: dict[str, list[dict[str, Any]]], console: Console) -> None:
    """The table. A run's speed is the median of its steps."""
    machine = describe()
    table = Table(
        "case",
        "proc x thr",
        "tokens a step",
        "tokens/s",
        "ratio",
        "CPU s a step",
        "faults a step",
        "MiB a rank",
        "others",
        title=f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, fp32",
        caption=(
            f"median (range) over {o.rounds} rounds; ratio: to the loop of the same round; faults: page faults; "
            "MiB: peak; others: most cores that others used in a step that counts"
        ),
    )
    for name, results in runs.items():
        case = o.case(name)
        ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(results, runs.get("loop", []))]
        table.add_row(
            case.title,
            f"{case.processes} x {case.threads}",
            f"{case.sequences(o.micro_batch) * o.seq:,}",
            spread([r["tokens_per_s"] for r in results], 0),
            spread(ratios, 3) if ratios and name != "loop" else "",
            spread([statistics.median(r["cpu_seconds"]) for r in results], 2),
            f"{statistics.median(r['page_faults_per_step'] for r in results):,.0f}",
            f"{statistics.median(r['peak_rss_mib'] for r in results):,.0f}",
            f"{max(r['others'] for r in results):.2f}",
        )
    console.print(table)


def main() -> None:
    o = tyro.cli(Options, description=__doc__)
    if unknown := set(o.cases) - set(CASES):
        sys.exit(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    machine = describe()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in o.cases}
    for number in range(o.rounds):
        turn = number % len(o.cases)
        for name in (*o.cases[turn:], *o.cases[:turn]):
            wait_until_quiet(o.quiet, o.patience)
            result = run_case(o, name)
            tokens = CASES[name].sequences(o.micro_batch) * o.seq
            result["tokens_per_s"] = tokens / statistics.median(result["seconds"])
            runs[name].append(result)
            console.print(
                f"round {number + 1}/{o.rounds}  {name:<9} {result['tokens_per_s']:7.1f} tokens/s  "
                f"loss {result['loss']:.3f}  others {result['others']:.2f} cores  {result['steps_made']} steps made"
            )
    show(o, runs, console)
    if o.json:
        o.json.write_text(json.dumps({"machine": machine, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:])
    else:
        main()
