"""Sample order and blends: start-up, memory and random samples/s, compared with Megatron-LM's code. Prints tables.

    python tools/bench/order.py [--documents 1000000 10000000] [--megatron-python PYTHON] [--folder /tmp/order_bench]

PYTHON runs order_megatron.py: an interpreter that has torch and megatron-core; `python tools/bench/peers_env.py
build/bench-peers` makes and prints one. Without it there are no rows for Megatron. Both start cold, without
index files, from the same .bin/.idx, each time in a fresh process; the .bin is sparse. Memory is the peak of anonymous
pages (RssAnon): pages of mapped files belong to the page cache. Medians, and the range in brackets.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import BATCH, BLEND_SAMPLES, SEED, SEQ_LEN, blend_weights, describe, peak_memory, samples_per_s
from report import Row, finish, show, spread

from engine.config.phases import Phase, Phases
from engine.data.samples.blend import SourceAssignment
from engine.data.samples.index_file import HEADER, MAGIC
from engine.data.samples.indexed import IndexedDataset
from engine.data.samples.loader import RankShare
from engine.data.samples.order import SampleOrder

MEAN_TOKENS = 600


def make_corpus(prefix: Path, documents: int) -> None:
    """Documents of 1 to 1,199 tokens of two bytes; the tokens are a hole in a sparse file."""
    if Path(f"{prefix}.bin").exists():
        return
    rng = np.random.default_rng(0)
    with open(f"{prefix}.idx", "wb") as idx:
        idx.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        lengths = rng.integers(1, 2 * MEAN_TOKENS, documents, dtype=np.int32)
        idx.write(lengths.data)
        end = 0
        for low in range(0, documents, 1 << 22):
            ends = end + np.cumsum(lengths[low : low + (1 << 22)].astype(np.int64) * 2)
            idx.write(np.concatenate(([end], ends[:-1])).data)
            end = int(ends[-1])
        for low in range(0, documents + 1, 1 << 22):
            idx.write(np.arange(low, min(low + (1 << 22), documents + 1), dtype=np.int64).data)
    with open(f"{prefix}.bin", "wb") as out:
        out.truncate(end)


def corpus(prefix: str, small: str) -> dict[str, float]:
    """In a fresh process: opening until 8 samples are there, then micro-batches in random access, as in training."""
    phases = Phases((Phase(1, BATCH, BATCH, SEQ_LEN),))
    RankShare(SampleOrder(IndexedDataset(small), SEQ_LEN, 0), phases, 0, 1).read(1)  # imports
    opened = 0.0

    def start() -> SampleOrder:
        nonlocal opened
        began = time.perf_counter()
        dataset = IndexedDataset(prefix)
        opened = time.perf_counter() - began
        order = SampleOrder(dataset, SEQ_LEN, SEED)
        order.gather(np.arange(BATCH))
        return order

    seconds, memory, order = peak_memory(start)
    share = RankShare(order, phases, 0, 1)
    one, two = (samples_per_s(lambda low: share.read(1 + low // BATCH), BATCH, threads) for threads in (1, 2))
    return {"seconds": seconds, "open": opened, "memory": memory, **one, "rate_2": two["rate"]}


def blend(sources: int) -> dict[str, float]:
    """Time until a blend has returned the sources of its first batch, and its counts at sample 10^8."""
    weights = blend_weights(sources).tolist()
    SourceAssignment([1, 1]).counts(1)  # imports

    def work() -> None:
        turns = SourceAssignment(weights)
        turns.locate(np.arange(BATCH))
        turns.counts(BLEND_SAMPLES)

    seconds, memory, _ = peak_memory(work)
    return {"seconds": seconds, "memory": memory}


Seen = dict[str, dict[str, list[float]]]  # who -> figure -> of every trial


def repeated(commands: dict[str, list[str]], trials: int) -> Seen:
    """Each command so many times, in turns: its figures."""
    seen: Seen = {name: {} for name in commands}
    for _ in range(trials):
        for name, command in commands.items():
            done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8")
            for key, value in json.loads(done.stdout.splitlines()[-1]).items():
                seen[name].setdefault(key, []).append(value)
    return seen


def prefix_of(folder: Path, documents: int) -> str:
    return str(folder / f"documents_{documents}")


FIGURES = {  # label -> (key, unit, more is better)
    "first batch": ("seconds", "s", False),
    "memory": ("memory", "MiB", False),
    "random": ("rate", "samples/s", True),
}


def rows_of(title: str, seen: Seen) -> list[Row]:
    """Rows with ours and, if measured, Megatron's numbers."""
    theirs = seen.get("megatron", {})
    return [
        Row(f"{title}: {label}", unit, seen["engine"][key], "Megatron" * bool(theirs), theirs.get(key, []), more=more)
        for label, (key, unit, more) in FIGURES.items()
        if key in seen["engine"]
    ]


def compare(o: argparse.Namespace) -> None:
    """All rows, ours and Megatron's in turns."""
    machine, details, rows = describe(), {}, []
    o.folder.mkdir(parents=True, exist_ok=True)
    small = prefix_of(o.folder, 1000)
    make_corpus(Path(small), 1000)
    pythons = {"engine": [sys.executable, __file__, "--measure"]}
    if o.megatron_python:
        pythons["megatron"] = [o.megatron_python, str(Path(__file__).with_name("order_megatron.py"))]
    else:
        print("no peer: give --megatron-python")
    for documents in o.documents:
        prefix = prefix_of(o.folder, documents)
        make_corpus(Path(prefix), documents)
        able = ("engine", "megatron") if documents <= 2 * 10**7 else ("engine",)  # its tables: 25 bytes a document
        commands = {n: [*p, "--prefix", prefix, "--small", small] for n, p in pythons.items() if n in able}
        details[str(documents)] = seen = repeated(commands, o.trials)
        rows += rows_of(f"order, {documents / 1e6:g} M documents", seen)
        cells = [("seconds", 4), ("open", 4), ("memory", 1), ("rate", 0), ("cpu_rate", 0), ("rate_2", 0)]
        lines = [(name, *(spread(one.get(key, []), digits) for key, digits in cells)) for name, one in seen.items()]
        headers = ("order", "to the first batch, s", "of it open", "MiB", "samples/s", "a cpu s", "2 threads")
        show(f"{documents:,} documents", headers, lines)
    if o.sources:
        details["blend"] = seen = repeated({n: [*p, "--blend", str(o.sources)] for n, p in pythons.items()}, o.trials)
        rows += rows_of(f"blend of {o.sources}, 10^8 samples", seen)
    finish(rows, details, o.json, "Sample order", machine)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/order_bench"))
    parser.add_argument("--megatron-python", default="", help="an interpreter with torch and megatron-core")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--sources", type=int, default=64, help="of the blend; 0: no blend")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--measure", action="store_true", help="one measurement, by the table's fresh processes")
    parser.add_argument("--prefix")
    parser.add_argument("--small")
    parser.add_argument("--blend", type=int)
    o = parser.parse_args()
    if not o.measure:
        compare(o)
        return
    torch.set_num_threads(1)
    result: dict[str, Any] = blend(o.blend) if o.blend else corpus(o.prefix, o.small)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
