"""Milliseconds of collectives between CPU processes of this machine: over gloo and over shared memory.

    python tools/bench/collectives.py                        # the whole table, about two minutes on two cores

Each cell: the median over many rounds of the slowest rank's time, and CPU milliseconds per rank. Ranks have one thread.
All ranks start an operation together, after an all-reduce that is not timed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from machine import describe
from rich.console import Console
from rich.table import Table

TRANSPORTS = ("gloo", "shared")
Result = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Options:
    """What to measure."""

    ranks: tuple[int, ...] = (2, 4, 8)
    sizes: tuple[int, ...] = (4 << 10, 4 << 20, 32 << 20)
    """bytes of the whole tensor, float32"""
    seconds: float = 1.5
    """a cell takes at most about so long"""


def measure(o: Options) -> Result:
    """(milliseconds, processor milliseconds of a rank) by operation and size, on every rank."""
    from engine.distributed.collectives import (
        all_gather_start,
        all_reduce_,
        all_reduce_start,
        post,
        reduce_scatter_start,
    )
    from engine.distributed.context import ParallelContext
    from engine.distributed.env import read_env
    from engine.distributed.launch import Mesh, run
    from engine.distributed.layout import Layout

    env = read_env()
    found: Result = {}
    torch.set_num_threads(1)

    def main(ctx: ParallelContext) -> int:
        axis = ctx.pipeline

        def exchange(x: torch.Tensor) -> None:
            got = torch.empty_like(x)
            sent, received = post([(x, (axis.rank + 1) % axis.size)], [(got, (axis.rank - 1) % axis.size)], axis)
            received[0].wait()
            sent[0].wait()

        works: dict[str, Callable[[torch.Tensor], object]] = {
            "all-reduce": lambda x: all_reduce_start(x, axis).wait(),
            "all-gather": lambda x: all_gather_start(x[: len(x) // axis.size], axis).wait(),
            "reduce-scatter": lambda x: reduce_scatter_start(x, axis).wait(),
            "to the next": exchange,
        }
        for size in o.sizes:
            x = torch.zeros(size // 4)
            for name, work in works.items():
                rounds, walls, cpu = 3, [], 0.0
                while len(walls) < rounds:
                    all_reduce_(torch.zeros(1), axis)
                    begin, own = time.perf_counter(), time.process_time()
                    work(x)
                    took = torch.tensor(time.perf_counter() - begin)
                    cpu += time.process_time() - own
                    walls.append(all_reduce_(took, axis, "max").item())
                    if len(walls) == 3:
                        rounds = int(min(200, max(5, o.seconds / max(walls[1:]))))
                found[f"{name} {size}"] = statistics.median(walls) * 1e3, cpu / len(walls) * 1e3
        return 0

    layout = Layout(env.world, pipeline=env.world)
    mesh = Mesh(layout, torch.float32, torch.device("cpu"), timeout_s=120.0, transport=sys.argv[2])
    code = run(main, env, mesh)
    if code:
        sys.exit(code)
    return found if env.rank == 0 else {}


def worker(out: str, options: str) -> None:
    """One rank of one run; the first leaves the result in a file."""
    if found := measure(Options(**json.loads(options))):
        Path(out).write_text(json.dumps(found), encoding="utf-8")


def run_ranks(o: Options, ranks: int, transport: str) -> Result:
    """Measure in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*launcher, __file__, "worker", transport, str(out), json.dumps(asdict(o))]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, encoding="utf-8")
        if done.returncode:
            sys.exit(f"{transport} with {ranks} ranks failed:\n{done.stderr[-4000:]}")
        return {key: (wall, cpu) for key, (wall, cpu) in json.loads(out.read_text(encoding="utf-8")).items()}


def main() -> None:
    o = tyro.cli(Options, description=__doc__)
    machine = describe()
    table = Table("ranks", "operation", "bytes", "gloo ms", "shared ms", "ratio", "gloo CPU ms", "shared CPU ms")
    table.title = f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}"
    for ranks in o.ranks:
        gloo, shared = (run_ranks(o, ranks, transport) for transport in TRANSPORTS)
        for key, (wall, cpu) in gloo.items():
            name, size = key.rsplit(" ", 1)
            ours, our_cpu = shared[key]
            cells = [f"{wall:.2f}", f"{ours:.2f}", f"{wall / ours:.1f}", f"{cpu:.2f}", f"{our_cpu:.2f}"]
            table.add_row(str(ranks), name, f"{int(size):,}", *cells)
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[3:])
    else:
        main()
