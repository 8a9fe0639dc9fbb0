"""Sample order and blends: start-up, memory and samples/s beside Megatron's published algorithm. Prints tables.

    python tools/bench/order.py [--documents 1000000 10000000] [--folder /tmp/order_bench]

The peer is a numpy re-implementation, written here from a description of the algorithm (document index, sample index,
shuffle index, greedy blend); none of Megatron-LM's code is in it. Its sample index is vectorised with searchsorted,
Megatron walks document by document in C++. Both start cold, without cache files, from the same .bin/.idx; the .bin is
sparse. Memory is the peak of anonymous pages (RssAnon): pages of mapped files belong to the page cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.blend import Turns
from engine.data.indexed import HEADER, MAGIC, IndexedDataset
from engine.data.order import SampleOrder

SEQ_LEN, BATCH, SEED, MEAN_TOKENS = 2048, 8, 1234, 600


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


class PublishedOrder:
    """Document index, sample index, shuffle index: the whole order in memory."""

    def __init__(self, dataset: IndexedDataset):
        self.dataset = dataset
        state = np.random.RandomState(SEED)
        self.documents = np.arange(len(dataset), dtype=np.int32)
        state.shuffle(self.documents)
        ends = np.cumsum(dataset.lengths[self.documents], dtype=np.int64)
        samples = (int(ends[-1]) - 1) // SEQ_LEN
        starts = np.arange(samples + 1, dtype=np.int64) * SEQ_LEN
        at = np.searchsorted(ends, starts, side="right")
        before = np.where(at > 0, ends[at - 1], 0)
        self.index = np.stack((at, starts - before), axis=1).astype(np.int32)
        self.shuffle = np.arange(samples, dtype=np.uint32)
        state.shuffle(self.shuffle)

    def gather(self, samples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """int64 [n, SEQ_LEN + 1], a sample at a time as a map-style dataset does."""
        return np.stack([self._one(int(self.shuffle[s])) for s in samples])

    def _one(self, sample: int) -> np.ndarray[Any, Any]:
        (first, begin), (last, end) = self.index[sample].tolist(), self.index[sample + 1].tolist()
        parts = [self.dataset[int(self.documents[d])] for d in range(first, last + 1)]
        parts[-1] = parts[-1][: end + 1]
        parts[0] = parts[0][begin:]
        return np.concatenate(parts).astype(np.int64)


def greedy_blend(weights: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    """The source of each sample: the one that is furthest behind. One step after another."""
    done, turn = np.zeros(len(weights)), np.empty(count, np.int16)
    for i in range(count):
        turn[i] = best = int(np.argmax(weights * max(i, 1) - done))
        done[best] += 1
    return turn


def peak_memory(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """(seconds, peak MiB of anonymous memory above the start, result) of work()."""

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    base, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    peak[0] = max(peak[0], anonymous())
    done.set()
    thread.join()
    return seconds, (peak[0] - base) / 1024, result


def measure(kind: str, prefix: str) -> dict[str, float]:
    """In a fresh process: opening until the first batch is there, then samples/s in random access."""

    def start() -> Any:
        began = time.perf_counter()
        dataset = IndexedDataset(prefix)
        opened = time.perf_counter() - began
        order = SampleOrder(dataset, SEQ_LEN, SEED) if kind == "engine" else PublishedOrder(dataset)
        order.gather(np.arange(BATCH))
        return order, opened

    SampleOrder(IndexedDataset(prefix_of(Path(prefix).parent, 1000)), 64, 0).gather(np.arange(2))  # imports
    seconds, memory, (order, opened) = peak_memory(start)
    picked = np.random.default_rng(1).integers(0, 10_000, 2048)
    order.gather(picked)  # the pages are there: what is measured is the work, not the disk
    began = time.process_time()
    for low in range(0, len(picked), BATCH):
        order.gather(picked[low : low + BATCH])
    rate = len(picked) / (time.process_time() - began)
    return {"seconds": seconds, "open": opened, "memory": memory, "rate": rate}


def prefix_of(folder: Path, documents: int) -> str:
    return str(folder / f"documents_{documents}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/order_bench"))
    parser.add_argument("--kind", choices=("engine", "published"))
    parser.add_argument("--prefix", default="")
    o = parser.parse_args()
    if o.kind:
        print(json.dumps(measure(o.kind, o.prefix)))
        return
    o.folder.mkdir(parents=True, exist_ok=True)
    make_corpus(Path(prefix_of(o.folder, 1000)), 1000)
    names = ("documents", "order", "first batch s", "of it open s", "memory MiB", "samples/cpu s")
    print("".join(f"{name:>14}" for name in names))
    for documents in o.documents:
        make_corpus(Path(prefix_of(o.folder, documents)), documents)
        for kind in ("engine", "published")[: 1 + (documents <= 2 * 10**7)]:  # its tables are 25 bytes a document
            command = [sys.executable, __file__, "--kind", kind, "--prefix", prefix_of(o.folder, documents)]
            command += ["--folder", str(o.folder)]
            best: dict[str, float] = {}
            for _ in range(3):
                result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                best = result if not best or result["seconds"] < best["seconds"] else best
            print(
                f"{documents:>14,}{kind:>14}{best['seconds']:>14.4f}{best['open']:>14.4f}{best['memory']:>14.1f}"
                f"{best['rate']:>14,.0f}",
                flush=True,
            )
    weights = np.random.default_rng(0).integers(100, 10_000, 64)
    seconds, memory, _ = peak_memory(
        lambda: (turns := Turns(weights.tolist())).locate(np.arange(BATCH)) and turns.counts(10**8)
    )
    print(
        f"blend of 64 sources over 10^8 samples: ready, first batch and last count in {seconds:.4f} s, {memory:.1f} MiB"
    )
    seconds, _, _ = peak_memory(lambda: greedy_blend(weights / weights.sum(), 10**5))
    print(
        f"greedy in numpy, 10^5 of them: {seconds:.2f} s (10^8 would take {seconds * 1000:,.0f} s and 1 GB of tables)"
    )


if __name__ == "__main__":
    main()
