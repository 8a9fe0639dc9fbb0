"""Saving and loading compared with plain parallel write + fsync and read of the same bytes, and with torch's DCP.

    python tools/bench/checkpoint.py --gib 1 --ranks 1 2 --repeats 5

Every repetition runs all cases in another order, so that a busy disk affects all equally; a time is that of the
slowest rank. All three sync the written files. Before a read the files are dropped from the page cache
(posix_fadvise), so that it comes from the device, unless that has a cache; the tensors to fill are already allocated.
State: float32 matrices with two moments each, sharded across the data ranks as by ZeRO-1. DCP has the same tensors as
entries of a state dict. "blocked" is how long training waits: the call, and the rest of the copy after `step_s` seconds
of arithmetic that replace the next forward and backward.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from machine import describe, drop_cache
from report import Row, finish, show, spread

from engine.checkpoint.load import Reader, load_into
from engine.checkpoint.save import Saver
from engine.checkpoint.tensorfile import tensor_bytes
from engine.distributed.context import ParallelContext
from engine.distributed.layout import Layout
from engine.distributed.sharding import Parameter
from engine.distributed.specs import Chunk, ShardSpec
from engine.optim.optimizer import StateShard
from tests.support.harness import run_ranks

ROWS, WIDTH, BLOCK = 4096, 1024, 16 << 20
NAMES = ["plain write", "save", "async, blocked", "async, copy alone", "async, whole", "dcp save", "dcp async, blocked"]
NAMES += ["dcp async, whole", "plain read", "load", "dcp load"]
MANIFEST: dict[str, Any] = {"consumed_samples": 0, "consumed_tokens": 0, "config": {}, "data": {}, "versions": {}}
MANIFEST["state_kinds"] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    gib: float = 1.0
    """size of the state over all ranks"""
    ranks: tuple[int, ...] = (1, 2)
    repeats: int = 5
    step_s: float = 0.5
    """how long the forward and backward after a save in the background take, before the update may wait for its copy"""
    folder: Path = Path(tempfile.gettempdir())
    """on the disk to measure"""
    json: Path | None = None
    """write every number here"""


def states(ctx: ParallelContext, gib: float) -> list[StateShard]:
    """This rank's part of matrices of 16 MiB and their moments."""
    found = []
    for number in range(round(gib * 2**30 / (3 * 4 * ROWS * WIDTH))):
        spec = ShardSpec((Chunk(f"layers.{number}.weight", (ROWS, WIDTH)),))
        p = Parameter(torch.empty(ROWS, WIDTH, device="meta"), spec)
        begin, end = (ROWS * WIDTH * r // ctx.data.size for r in (ctx.data.rank, ctx.data.rank + 1))
        for kind in ("model", "exp_avg", "exp_avg_sq"):
            found.append(StateShard(kind, p, begin, torch.randn(end - begin)))
    return found


def plain_write(file: Path, held: list[StateShard]) -> None:
    """Write the bytes of the state sequentially into preallocated files, and sync."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(fd, 0, sum(one.flat.nbytes for one in held))
    for one in held:
        data = tensor_bytes(one.flat)
        for begin in range(0, len(data), BLOCK):
            os.write(fd, data[begin : begin + BLOCK])
    os.fsync(fd)
    os.close(fd)


def plain_read(file: Path, held: list[StateShard]) -> None:
    """The same bytes back into the same tensors."""
    fd = os.open(file, os.O_RDONLY)
    for one in held:
        data = tensor_bytes(one.flat)
        for begin in range(0, len(data), BLOCK):
            os.readv(fd, [data[begin : begin + BLOCK]])
    os.close(fd)


def compute(seconds: float) -> None:
    """Replaces a forward and backward: arithmetic on one thread for that time."""
    end, x = time.perf_counter() + seconds, torch.randn(256, 256)
    while time.perf_counter() < end:
        torch.mm(x, x)


def job(ctx: ParallelContext, o: Options, root: Path) -> list[dict[str, float]]:
    """All repetitions on one rank: [{case: seconds of the slowest rank}]."""
    held, alone = states(ctx, o.gib), ctx.world.size == 1
    theirs = {f"{h.kind}/{h.param.name}/{ctx.rank}": h.flat for h in held}
    saver = Saver(root / "engine", ctx)
    saver.reserve(held)
    group = (
        None if alone else dist.new_group()
    )  # DCP's thread uses a separate group, so that its collectives do not mix with ours

    def together() -> None:
        if not alone:
            dist.barrier()

    def timed(work: Callable[[], object]) -> float:
        together()
        begin = time.perf_counter()
        work()
        seconds = torch.tensor(time.perf_counter() - begin)
        if not alone:
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds)

    def start(step: int, background: bool) -> None:
        saver.start(held, step=step, metadata=MANIFEST, background=background)

    def save() -> None:
        start(1, False)
        saver.finish()

    def load() -> None:
        with Reader(root / "engine/step_00000001") as reader:
            load_into(reader, held, ctx)

    def fresh() -> None:
        together()
        if ctx.rank == 0:
            for folder in root.iterdir():
                shutil.rmtree(folder)
            (root / "plain").mkdir()
            os.sync()
        together()

    def cold() -> None:
        together()
        if ctx.rank == 0:
            drop_cache(root)
        together()

    def plain(now: dict[str, float]) -> None:
        now["plain write"] = timed(lambda: plain_write(root / f"plain/{ctx.rank}", held))
        cold()
        now["plain read"] = timed(lambda: plain_read(root / f"plain/{ctx.rank}", held))

    def ours(now: dict[str, float]) -> None:
        now["save"] = timed(save)
        cold()
        now["load"] = timed(load)

    def ours_async(now: dict[str, float]) -> None:
        begin = time.perf_counter()
        blocked = timed(lambda: start(2, True))
        compute(o.step_s)
        now["async, blocked"] = blocked + timed(saver.wait_copied)
        saver.finish()
        now["async, whole"] = time.perf_counter() - begin

    def ours_copy(now: dict[str, float]) -> None:
        now["async, copy alone"] = timed(lambda: (start(3, True), saver.wait_copied()))
        saver.finish()

    def dcp_waits(now: dict[str, float]) -> None:
        now["dcp save"] = timed(lambda: dcp.save(theirs, checkpoint_id=root / "dcp", no_dist=alone))
        cold()
        now["dcp load"] = timed(lambda: dcp.load(theirs, checkpoint_id=root / "dcp", no_dist=alone))

    def dcp_async(now: dict[str, float]) -> None:
        begin, futures = time.perf_counter(), []
        options: dict[str, Any] = {"checkpoint_id": root / "dcp", "no_dist": alone, "process_group": group}
        now["dcp async, blocked"] = timed(lambda: futures.append(dcp.async_save(theirs, **options)))
        compute(o.step_s)
        futures[0].result()
        now["dcp async, whole"] = time.perf_counter() - begin

    results, order = [], [plain, ours, ours_async, ours_copy, dcp_waits, dcp_async]
    for number in range(o.repeats + 1):
        now: dict[str, float] = {}
        random.Random(number).shuffle(order)  # deleting files of one case slows the disk for the next: random order
        for work in order:
            fresh()
            work(now)
        results.append(now)
    return results[1:]  # the first finds buffers, caches and the disk as they will be


AGAINST = {  # ours -> (title, DCP's, the limit)
    "save": ("save", "dcp save", "plain write"),
    "load": ("load", "dcp load", "plain read"),
    "async, blocked": ("background save, training blocked", "dcp async, blocked", ""),
}


def rows_of(world: int, found: list[dict[str, float]]) -> list[Row]:
    """Rows of the times that training waits, compared with DCP and plain I/O."""
    rows = []
    for name, (title, peer, limit) in AGAINST.items():
        ours, peers, limits = ([one[key] for one in found if key] for key in (name, peer, limit))
        title = f"{title}, {world} rank{'s' * (world > 1)}"
        limit = f"{limit}{' + fsync' * (limit == 'plain write')}"
        rows.append(Row(title, "s", ours, "torch DCP", peers, limit, limits, more=False))
    return rows


def main(o: Options) -> None:
    """Print a table for each number of ranks, and the rows of all."""
    machine, details, rows = describe(), {}, []
    size = round(o.gib * 2**30 / (3 * 4 * ROWS * WIDTH)) * 3 * 4 * ROWS * WIDTH
    for world in o.ranks:
        with tempfile.TemporaryDirectory(dir=o.folder) as folder:
            root = Path(folder)
            found = run_ranks(Layout(world, data=world), partial(job, o=o, root=root), timeout_s=900)[0]
        details[str(world)] = found
        lines = []
        for case in sorted(found[0], key=NAMES.index):
            times = [one[case] for one in found]
            base = "plain read" if "load" in case or "read" in case else "plain write"
            ratio = statistics.median(one[base] / one[case] for one in found)
            speed = f"{size / 1e9 / statistics.median(times):.2f}"
            lines.append((case, spread(times, 4), speed, f"{ratio:.2f} of {base}"))
        blocked = statistics.median(one["async, blocked"] / one["save"] for one in found)
        theirs = statistics.median(one["dcp async, blocked"] / one["dcp save"] for one in found)
        note = f"async blocks for {blocked:.1%} of a save; dcp for {theirs:.1%} of its save"
        show(f"{world} ranks, {size / 1e9:.2f} GB", ("case", "s", "GB/s", "ratio"), lines, note)
        rows += rows_of(world, found)
    finish(rows, details, o.json, f"Checkpoints of {size / 1e9:.2f} GB", machine)


if __name__ == "__main__":
    main(tyro.cli(Options))
