"""Megatron-LM's own builders and GPTDataset, measured. Called by order.py with the Python of --megatron-python.

    PYTHON tools/bench/order_megatron.py --prefix PREFIX --small PREFIX     a corpus: start-up, memory, samples/s
    PYTHON tools/bench/order_megatron.py --blend 64                         whose turn it is, 10^8 samples

Nothing of the engine is imported: PYTHON needs torch, numpy and megatron-core, whose code stays where it is installed.
One JSON object on standard output.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from machine import BATCH, BLEND_SAMPLES, SEED, SEQ_LEN, blend_weights, peak_memory, samples_per_s
from megatron.core.datasets import helpers  # type: ignore[import-not-found]
from megatron.core.datasets.blended_megatron_dataset_builder import (  # type: ignore[import-not-found]
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # type: ignore[import-not-found]


def build(prefix: str, cache: str) -> Any:
    """The training set of one epoch of `prefix`, built as pretrain_gpt does, with an empty cache folder."""
    tokenizer = SimpleNamespace(
        eod=1, pad=65_500, vocab_size=65_000, special_tokens_dict={"eod": 1}, unique_identifiers={"class": "none"}
    )
    cfg = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQ_LEN,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=cache,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, cfg).build()[0]


def corpus(prefix: str, small: str) -> dict[str, float]:
    """Opening until 8 samples are there, without writing the index files it would keep; then random samples/s."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as cache:
        build(small, cache)[0]  # imports

    def start() -> Any:
        with tempfile.TemporaryDirectory() as cache:
            data = build(prefix, cache)
            [data[i] for i in range(BATCH)]
        return data

    with mock.patch.object(np, "save", lambda *_, **__: None):
        seconds, memory, data = peak_memory(start)
    return {"seconds": seconds, "memory": memory, **samples_per_s(lambda low: data[low], 1)}


def blend(sources: int) -> dict[str, float]:
    """The two tables of a blend: source and sample number of each of 10^8 samples."""
    weights = blend_weights(sources)

    def work() -> Any:
        turn, number = np.zeros(BLEND_SAMPLES, np.int16), np.zeros(BLEND_SAMPLES, np.int64)
        helpers.build_blending_indices(turn, number, (weights / weights.sum()).tolist(), sources, BLEND_SAMPLES, False)
        return turn, number  # kept, to be counted: the interpreter is locked meanwhile, so nothing watches

    seconds, memory, _ = peak_memory(work)
    return {"seconds": seconds, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prefix")
    parser.add_argument("--small")
    parser.add_argument("--blend", type=int)
    o = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(blend(o.blend) if o.blend else corpus(o.prefix, o.small)))


if __name__ == "__main__":
    main()
