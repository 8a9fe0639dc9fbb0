"""Start-up time of ranks: of a test case that tests/support forks, and of a real `torchrun` start.

    python tools/bench/startup.py --repeats 5 --json startup.json

The second table splits the way from the command to the end of the first step of `torchrun --nproc-per-node N -m engine
train`: the same command line, run through this file, which notes when each of the engine's own functions begins and
ends. Times are rank 0's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTED = time.time()  # before the heavy imports: `worker` splits them off
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Options:
    """Both measurements are made `repeats` times, and medians shown with the whole range."""

    ranks: tuple[int, ...] = (1, 2, 4, 8)
    """forked ranks"""
    torchrun: int = 4
    """ranks of the torchrun start"""
    repeats: int = 5
    quiet: float = 0.15
    """others may use so many cores when a repetition begins"""
    patience: float = 60.0
    """seconds to wait for that"""
    json: Path | None = None
    """write every number here"""


# ---- (a) a test case


def forked(ranks: int) -> float:
    """Seconds from run_ranks to its return, for one all-reduce."""
    import torch

    from engine.distributed.collectives import all_reduce_
    from engine.distributed.layout import Layout
    from tests.support.harness import run_ranks

    begin = time.perf_counter()
    results = run_ranks(Layout(ranks, data=ranks), lambda ctx: float(all_reduce_(torch.ones(1), ctx.world)))
    seconds = time.perf_counter() - begin
    assert results == [ranks] * ranks
    return seconds


# ---- (b) torchrun


def noting(stamps: dict[str, list[float]], owner: Any, name: str) -> None:
    """Replace a function of `owner` by itself with the times of its first call noted."""
    original: Callable[..., Any] = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        begin = time.time()
        result = original(*args, **kwargs)
        stamps.setdefault(name, [begin, time.time()])
        return result

    setattr(owner, name, wrapper)


def worker(out: str, *arguments: str) -> None:
    """One rank: `python -m engine train` with recorded times."""
    stamps = {"interpreter": [STARTED, STARTED]}
    import torch  # noqa: F401

    stamps["import torch"] = [STARTED, time.time()]
    import engine.cli.main
    import engine.cli.prepare
    import engine.distributed.env
    import engine.distributed.launch
    import engine.train.loop
    import engine.train.run

    stamps["import engine"] = [stamps["import torch"][1], time.time()]
    noting(stamps, engine.distributed.launch, "_init_process_group")
    noting(stamps, engine.distributed.launch, "make_context")
    noting(stamps, engine.train.run, "setup")
    noting(stamps, engine.train.loop.MetricsLog, "__enter__")
    noting(stamps, engine.train.loop, "train_step")
    leave = engine.distributed.launch.leave

    def write(code: int, env: engine.distributed.env.Env) -> int:
        if env.rank == 0:
            Path(out).write_text(json.dumps(stamps), encoding="utf-8")
        return leave(code, env)

    engine.distributed.launch.leave = write  # it ends the process
    engine.cli.main.main(["train", *arguments])


PHASES = {  # title -> (phase whose end begins it, phase, whose end ends it); None: the command
    "torchrun, until rank 0's first line": (None, "interpreter"),
    "import torch": ("interpreter", "import torch"),
    "import the engine": ("import torch", "import engine"),
    "options, rendezvous, process group": ("import engine", "_init_process_group"),
    "groups of the axes": ("_init_process_group", "make_context"),
    "data, model, buckets, optimizer": ("make_context", "setup"),
    "run folder, TensorBoard": ("setup", "__enter__"),
    "first step": ("__enter__", "train_step"),
}


def torchrun(ranks: int, corpus: Path) -> dict[str, float]:
    """Seconds of each phase from the command to the end of the first step, and the whole command's."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "stamps.json"
        engine_args = ["--data.train", str(corpus), "--run.dir", f"{folder}/run", "--train.steps", "1"]
        engine_args += ["--train.device", "cpu", "--lr-schedule.warmup-steps", "0"]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        begin = time.time()
        command = [*launcher, __file__, "worker", str(out), *engine_args]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        whole = time.time() - begin
        if done.returncode:
            sys.exit(f"torchrun failed with code {done.returncode}:\n{done.stderr[-4000:]}")
        stamps = json.loads(out.read_text(encoding="utf-8"))
        ends = {None: begin} | {name: end for name, (_, end) in stamps.items()}
        seconds = {title: ends[last] - ends[first] for title, (first, last) in PHASES.items()}
        first_step = ends["train_step"] - begin
        return seconds | {"command to first step": first_step, "saving, leaving": whole - first_step}


def make_corpus(prefix: Path) -> Path:
    """100 documents of random tokens in the default model's vocabulary."""
    import numpy as np

    from engine.data.samples.indexed_writer import IndexedWriter

    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, vocab_size=4096) as writer:
        for _ in range(100):
            writer.add(rng.integers(0, 4096, 300))
        writer.finish({})
    return prefix


def main() -> None:
    import tyro
    from machine import describe, wait_until_quiet
    from report import Row, finish, show, spread

    o = tyro.cli(Options, description=__doc__)
    sys.path.insert(0, str(ROOT))
    machine = describe()
    forks: dict[int, list[float]] = {n: [] for n in o.ranks}
    starts: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder) / "corpus")
        for _ in range(o.repeats):
            wait_until_quiet(o.quiet, o.patience)
            for n in o.ranks:
                forks[n].append(forked(n))
            for title, seconds in torchrun(o.torchrun, corpus).items():
                starts.setdefault(title, []).append(seconds)
    show("torchrun, part by part", ("part", "s"), [(part, spread(seconds, 3)) for part, seconds in starts.items()])
    show("forked ranks, one all-reduce", ("ranks", "s"), [(str(n), spread(seconds, 3)) for n, seconds in forks.items()])
    most = max(forks)
    rows = [Row(f"fork of {most} ranks, one all-reduce", "s", forks[most], more=False)]
    unavoidable = [a + b for a, b in zip(starts["torchrun, until rank 0's first line"], starts["import torch"])]
    label = f"torchrun, {o.torchrun} ranks, to the first step"
    limit = "torchrun, import torch"
    rows.append(Row(label, "s", starts["command to first step"], limit=limit, limits=unavoidable, more=False))
    finish(rows, {"forked": forks, "torchrun": starts}, o.json, "Start-up", machine)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:])
    else:
        main()
