"""The memory sheet equals the bytes of live storages that are counted in real steps (tests.support.live_memory)."""

from __future__ import annotations

import gc
import math
import random
import re
from typing import Any

import pytest
import torch

from engine.config.derived import derive
from engine.config.load import Resolved, load
from engine.config.schema import Config
from engine.distributed.context import ParallelContext
from engine.errors import ConfigError
from engine.ops import native
from engine.planner.formulas import formula
from engine.planner.sheet import TERMS, sheets
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import config, layout_of, random_batches
from tests.support.harness import run_ranks
from tests.support.live_memory import LiveStorages, count_rank

# large enough that what no term counts, such as losses and token ids, is less than a percent
SIZES: dict[str, Any] = {
    "model_hidden_size": 128,
    "model_num_heads": 8,
    "model_num_kv_heads": 4,
    "model_ffn_size": 352,
    "model_num_layers": 4,
    "model_vocab_size": 512,
    "model_max_seq_len": 128,
    "train_seq_len": 128,
    "train_global_batch_size": 4,
    "train_precision": "fp32",
    "parallel_bucket_mib": 0.3,
}
needs_kernels = pytest.mark.skipif(native.load()[0] is None, reason="the sheet is of runs with the custom kernels")


def make(options: dict[str, Any]) -> Config:
    degrees = (options.get(f"parallel_{axis}", 1) for axis in ("tensor", "pipeline", "data"))
    world = 1
    for degree in degrees:
        world *= degree
    return config(world, **{**SIZES, **options})


def check(cfg: Config, *, fake: bool = False) -> None:
    derived = derive(cfg)
    for sheet in sheets(cfg, derived):
        state, peak = count_rank(cfg, derived.layout.rank({"pipeline": sheet.rank}), fake=fake)
        assert sum(sheet.state.values()) == pytest.approx(state, rel=0.03), sheet
        assert sheet.peak.total == pytest.approx(peak, rel=0.03), sheet


QUICK: dict[str, dict[str, Any]] = {
    "one rank": {},
    "bfloat16, data 2, full recompute": {
        "parallel_data": 2,
        "train_precision": "bf16",
        "train_recompute": "full",
        "train_global_batch_size": 2,
    },
    "large vocabulary": {"model_vocab_size": 4096, "model_num_layers": 1, "train_micro_batch_size": 4},
    "micro-batch of 4, full recompute": {"train_recompute": "full", "train_micro_batch_size": 4},
    "tensor 2, selective": {"parallel_tensor": 2, "train_recompute": "selective", "train_global_batch_size": 1},
    "uneven stages": {"parallel_pipeline": 2, "parallel_layers": "3,1", "train_global_batch_size": 2},
}


@needs_kernels
@pytest.mark.parametrize("case", QUICK)
def test_the_sheet_equals_the_counted_storages(case: str) -> None:
    check(make(QUICK[case]))


@needs_kernels
def test_a_rank_alone_needs_as_much_as_a_rank_among_others() -> None:
    """The same count in steps of two real ranks, which exchange gradients and activations."""
    cfg = make({"parallel_pipeline": 2, "train_precision": "bf16", "train_global_batch_size": 2})

    def job(ctx: ParallelContext) -> int:
        with LiveStorages() as live:
            state = setup(cfg, ctx)
            for step in range(2):
                gc.collect()
                live.reset()
                train_step(state, random_batches(cfg, ctx, step))
        return live.peak

    for rank, peak in enumerate(run_ranks(layout_of(cfg), job, dtype=torch.bfloat16)):
        assert count_rank(cfg, rank)[1] == pytest.approx(peak, rel=0.01)


@needs_kernels
def test_a_deferred_gradient_holds_no_graph() -> None:
    """Else each micro-batch between I and W would keep the input of its stage and the gradient of that, too."""
    batches = {"train_micro_batch_size": 4, "train_global_batch_size": 16}
    cfg = make({"parallel_pipeline": 2, "parallel_schedule": "zb-h1", **batches})
    for sheet in sheets(cfg, derive(cfg)):
        assert 0.98 < count_rank(cfg, sheet.rank)[1] / sheet.peak.total < 1.004


def draw(seed: int) -> Config:
    """A random layout of up to 4 ranks with random options; draws again until the options fit together."""
    rng = random.Random(seed)
    while True:
        tensor, pipeline, data = (rng.choice((1, 1, 2, 4)) for _ in range(3))
        options = {
            "parallel_tensor": tensor,
            "parallel_pipeline": pipeline,
            "parallel_data": data,
            "parallel_sequence": rng.random() < 0.6,
            "parallel_zero": rng.choice((0, 1)),
            "parallel_overlap": rng.random() < 0.7,
            "parallel_schedule": rng.choice(("1f1b", "gpipe", "interleaved", "zb-h1", "zb-v")),
            "parallel_layers": rng.choice(("", "balanced", "3,1", "2,1,1,0")),
            "parallel_bucket_mib": rng.choice((0.1, 0.5, 32)),
            "parallel_reduce_dtype": rng.choice(("main", "main", "bf16")),
            "parallel_keep_gathered": rng.random() < 0.2,
            "train_precision": rng.choice(("fp32", "bf16")),
            "train_recompute": rng.choice(("none", "none", "selective", "full")),
            "train_recompute_layers": rng.choice((0, 0, 1)),
            "train_micro_batch_size": rng.choice((1, 1, 2)),
            "train_global_batch_size": rng.choice((4, 8)),
            "model_tie_embeddings": rng.random() < 0.2,
            "model_num_kv_heads": rng.choice((2, 4, 8)),
        }
        if tensor * pipeline * data > 4:
            continue
        try:
            return make(options)
        except ConfigError:
            continue


@pytest.mark.heavy
@needs_kernels
@pytest.mark.parametrize("seed", range(30))
def test_the_sheet_equals_the_counted_storages_of_a_random_layout(seed: int) -> None:
    check(draw(seed))


LLAMA = {"model.preset": "llama-2-7b", "train.precision": "bf16", "train.seq_len": "4096"}


def llama(world: int, **more: str) -> Resolved:
    return load([], LLAMA | {"train.global_batch_size": str(world)} | more, world=world)


@pytest.mark.heavy
@needs_kernels
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("degrees", [{}, {"parallel.tensor": "8"}], ids=["data 8", "tensor 8"])
def test_the_sheet_of_llama_2_7b_equals_the_storages_of_fake_tensors(degrees: dict[str, str]) -> None:
    check(llama(8, **degrees, **{"train.device": "cpu"}).config, fake=True)


def test_llama_2_7b_on_8_data_ranks_has_the_figures_that_were_counted() -> None:
    """47.1 GiB of state and a peak of 64.5 GiB, counted with fake tensors and a fake process group."""
    resolved = llama(8)
    (sheet,) = sheets(resolved.config, resolved.derived)
    assert sum(sheet.state.values()) / 2**30 == pytest.approx(47.1, rel=0.03)
    assert sheet.peak.total / 2**30 == pytest.approx(64.5, rel=0.03)


def test_the_peak_of_a_phase_is_that_of_the_run() -> None:
    """Longer sequences from step 5 on need more; the phase after the last step does not count."""
    more = {"train.steps": "10", "phase.1.from_step": "5", "phase.1.seq_len": "8192", "model.max_seq_len": "8192"}
    plain, later, never = (llama(8, **o) for o in ({}, more, more | {"train.steps": "4"}))
    (a,), (b,), (c,) = (sheets(r.config, r.derived) for r in (plain, later, never))
    assert b.peak.total > 1.2 * a.peak.total and b.phase.number == 1
    assert c.peak.total == a.peak.total and c.phase.number == 0


@pytest.mark.parametrize("term", TERMS)
def test_every_term_has_a_formula(term: str) -> None:
    resolved = llama(8, **{"parallel.pipeline": "4", "parallel.schedule": "zb-v", "checkpoint.every": "10"})
    for sheet in sheets(resolved.config, resolved.derived):
        assert all(len(line) > 2 for line in formula(term, resolved.config, sheet))


@pytest.mark.parametrize("term", ["weights", "gradients", "master", "optimizer", "staging", "prefetch", "checkpoint"])
def test_the_numbers_of_a_formula_give_the_bytes_of_the_term(term: str) -> None:
    resolved = llama(8, **{"parallel.tensor": "2", "checkpoint.every": "10"})
    (sheet,) = sheets(resolved.config, resolved.derived)
    found = 0
    for line in formula(term, resolved.config, sheet)[1:]:
        for product in re.findall(r"[\d,]+(?: x [\d,]+)*", line.split(":")[-1]):
            found += math.prod(int(number.replace(",", "")) for number in product.split(" x "))
    assert found == {**sheet.state, **sheet.host, "checkpoint": sheet.checkpoint}[term]
