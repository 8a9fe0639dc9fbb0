"""Quality of the shuffle on a corpus that is sorted by label, compared with a full shuffle of all documents.

    python tools/bench/shuffle.py [--documents 100000 8000000] [--seeds 3] [--batches 200]

A label's share of the tokens is counted in global batches of 256 samples and in each sample. `sd` is its standard
deviation over batches and labels; then labels and entropy (bits) of a sample; with the ratio of the sample order to the
full shuffle. The corpus has only lengths (exponential, at least 1), no tokens: the contents of samples need no more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from report import show

from engine.data.samples.order import SampleOrder

BATCH = 256
MIXES = [(10, 32, 512), (100, 32, 512), (10, 32, 2048), (100, 32, 2048), (10, 200, 2048), (100, 600, 2048)]

IntArray = npt.NDArray[np.int64]
Part = tuple[IntArray, IntArray]  # documents of a sample, tokens of each


class Corpus:
    """Lengths and pointers as an IndexedDataset has them; `tokens` is one byte used for all."""

    prefix, vocab_size = "lengths alone", None

    def __init__(self, documents: int, mean: int, seed: int):
        drawn = np.random.default_rng(seed).exponential(mean, documents)
        self.lengths = np.maximum(1, drawn).astype(np.int32)
        ends = np.cumsum(self.lengths, dtype=np.int64)
        self.pointers = ends - self.lengths
        self.num_tokens = int(ends[-1])
        self.tokens = np.broadcast_to(np.zeros(1, np.uint8), self.num_tokens)

    def __len__(self) -> int:
        return len(self.lengths)


def of_engine(corpus: Corpus, seq_len: int, seed: int) -> Iterator[Part]:
    """Samples of the sample order, epoch after epoch."""
    order = SampleOrder(corpus, seq_len, seed)  # type: ignore[arg-type]
    sample = 0
    while True:
        documents, _, takes = np.array(order.parts(sample), np.int64).T
        yield documents, takes
        sample += 1


def of_shuffle(corpus: Corpus, seq_len: int, seed: int) -> Iterator[Part]:
    """The same with all documents permuted by numpy, and samples permuted by numpy."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(corpus))
        ends = np.cumsum(corpus.lengths[order], dtype=np.int64)
        for k in rng.permutation((corpus.num_tokens - 1) // seq_len).tolist():
            begin, end = k * seq_len, k * seq_len + seq_len + 1
            low, high = np.searchsorted(ends, [begin, end - 1], side="right")
            documents = order[low : high + 1]
            takes = np.minimum(ends[low : high + 1], end) - np.maximum(
                ends[low : high + 1] - corpus.lengths[documents], begin
            )
            yield documents, takes


@dataclass(frozen=True)
class Spread:
    """sd of a label's share in a batch; labels of a sample and their entropy in bits, means."""

    sd: float
    labels: float
    entropy: float


def spread(samples: Iterator[Part], documents: int, labels: int, batches: int) -> Spread:
    """What `batches` batches of samples show of a corpus of so many documents, sorted by label."""
    shares, kinds, entropies = np.zeros((batches, labels)), 0, 0.0
    for batch in range(batches):
        for _ in range(BATCH):
            found, takes = next(samples)
            part = np.bincount(found * labels // documents, takes, labels)
            share = part[part > 0] / part.sum()
            shares[batch] += part / part.sum() / BATCH
            kinds += len(share)
            entropies -= float((share * np.log2(share)).sum())
    sd = float(np.sqrt(((shares - shares.mean(axis=0)) ** 2).sum(axis=0).mean() / (batches - 1)))
    return Spread(sd, kinds / batches / BATCH, entropies / batches / BATCH)


def measure(documents: int, mix: tuple[int, int, int], seeds: int, batches: int) -> tuple[Spread, Spread]:
    """(sample order, full shuffle), each the mean over seeds."""
    labels, mean, seq_len = mix

    def over(samples: Callable[[Corpus, int, int], Iterator[Part]]) -> Spread:
        found = [
            spread(samples(Corpus(documents, mean, seed), seq_len, seed), documents, labels, batches)
            for seed in range(seeds)
        ]
        each: list[Any] = [[getattr(one, name) for one in found] for name in ("sd", "labels", "entropy")]
        return Spread(float(np.sqrt(np.mean(np.square(each[0])))), float(np.mean(each[1])), float(np.mean(each[2])))

    return over(of_engine), over(of_shuffle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[100_000, 8_000_000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=200, help="global batches of 256 for each seed and order")
    o = parser.parse_args()
    for documents in o.documents:
        lines = []
        for mix in MIXES:
            ours, full = measure(documents, mix, o.seeds, o.batches)
            pairs = [(ours.sd, full.sd, 5), (ours.labels, full.labels, 2), (ours.entropy, full.entropy, 2)]
            cells = [f"{a:.{digits}f} {b:.{digits}f} ({a / b:.3f})" for a, b, digits in pairs]
            lines.append((", ".join(map(str, mix)), *cells))
        headers = ("labels, mean length, seq_len", "sd in a batch: order, full", "labels a sample", "entropy")
        show(f"{documents:,} documents sorted by label", headers, lines)


if __name__ == "__main__":
    main()
