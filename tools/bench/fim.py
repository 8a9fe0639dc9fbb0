"""Samples per second with fill-in-the-middle, compared with reading without it: tools/bench/fim.py [FILES...]

Trains a byte-level BPE of 4,096 tokens on the files (by default this repository's Python), writes a corpus, and reads
batches of 8 samples of 2048 tokens, alternately with and without it. One process; the tokenizer uses all cores.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from engine.config.schema import DataConfig
from engine.data.samples.indexed import IndexedDataset
from engine.data.samples.indexed_writer import IndexedWriter
from engine.data.samples.order import SampleOrder
from engine.data.samples.special import FAMILIES, fill_in_the_middle
from engine.data.tokenize.tokenizer import END_OF_TEXT, Tokenizer

SEQ_LEN, BATCH, ROUNDS = 2048, 8, 25


def main(files: list[Path]) -> None:
    texts = [file.read_text(encoding="utf-8") for file in files]
    tokenizer = Tokenizer.train(iter(texts), 4096, special_tokens=(END_OF_TEXT, *FAMILIES[0]))
    with tempfile.TemporaryDirectory() as folder:
        with IndexedWriter(Path(folder) / "c", tokenizer.vocab_size) as writer:
            for ids in tokenizer.encode_batch(texts):
                writer.add(np.append(ids, tokenizer.eod))
            writer.finish({"eod": tokenizer.eod})
        order = SampleOrder(IndexedDataset(Path(folder) / "c"), SEQ_LEN, 1)
        fims = [fill_in_the_middle(DataConfig(fim_rate=rate), tokenizer, tokenizer.eod, 1) for rate in (0.0, 0.5, 1.0)]
        seconds: list[list[float]] = [[] for _ in fims]
        for k in range(ROUNDS + 2):
            samples = np.arange(k * BATCH, (k + 1) * BATCH)
            for fim, found in zip(fims, seconds):
                begin = time.perf_counter()
                fim.transform(order.gather(samples), samples, order.sources(samples))
                found.append(time.perf_counter() - begin)
    for fim, found in zip(fims, seconds):
        per_second = BATCH / np.array(found[2:])
        low, middle, high = np.percentile(per_second, (10, 50, 90))
        print(f"fim_rate {fim.rate}: {middle:,.0f} samples/s of seq {SEQ_LEN} (10 % {low:,.0f}, 90 % {high:,.0f})")


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    ours = sorted(root.glob("engine/**/*.py")) + sorted(root.glob("tests/**/*.py"))
    main([Path(word) for word in sys.argv[1:]] or ours)
