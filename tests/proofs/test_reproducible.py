"""The loss of a sample, minus its log probability: the same bits in training and evaluation, in any micro-batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.batch import Rows, micro_batches
from engine.config.schema import Config
from engine.data.samples.indexed import IndexedDataset
from engine.data.samples.indexed_writer import IndexedWriter
from engine.distributed.context import ParallelContext
from engine.ops import native
from engine.pipeline.executor import contributes_loss, execute
from engine.pipeline.schedules import forward_only
from engine.train.evaluate import Evaluator
from engine.train.state import setup
from tests.support.cases import MODEL, config, layout_of
from tests.support.harness import run_ranks

SAMPLES = 8
SIZES: dict[str, Any] = {"model_hidden_size": 64, "model_ffn_size": 96, "model_num_layers": 2, "model_max_seq_len": 160}
SIZES |= {"train_seq_len": 160, "train_global_batch_size": SAMPLES}  # 1,280 rows: two chunks of the loss
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "recompute": {"train_recompute": "full", "train_dropout": 0.0},
    "sequence": {"parallel_tensor": 2},
    "replicated": {"parallel_tensor": 2, "parallel_sequence": False},
    "pipeline": {"parallel_pipeline": 2, "parallel_schedule": "zb-h1"},
    "data": {"parallel_data": 2},
}
needs_avx2 = pytest.mark.skipif(native.load()[0] is None or not native.load()[0].attention_runs(), reason="needs AVX2")


def sample_losses(cfg: Config, *, training: bool) -> list[float]:
    """The loss of each of SAMPLES samples in which every label counts as 1, by a plan with backward or without."""

    def job(ctx: ParallelContext) -> list[float]:
        state = setup(cfg, ctx)
        rows = torch.randint(61, (SAMPLES, cfg.train.seq_len + 1), generator=torch.Generator().manual_seed(7))
        mine = torch.arange(SAMPLES).chunk(ctx.data.size)[ctx.data.rank]
        batches = micro_batches(Rows.from_tokens(rows[mine], mine, mine), cfg.train.micro_batch_size)
        plan = state.plan if training else forward_only(state.plan, len(batches))
        for stage in state.buckets if training else ():
            stage.zero_grad()
        done = execute(plan, state.stages, ctx, batches)
        for stage in state.buckets if training else ():
            stage.wait()
        return done.losses.flatten().tolist() if contributes_loss(plan, ctx) else []

    ranks = run_ranks(layout_of(cfg), job, dtype=DTYPES[cfg.train.precision])
    return [loss for rank in ranks for loss in rank]


def case(layout: str, precision: str, micro_batch_size: int) -> Config:
    options = SIZES | LAYOUTS[layout] | {"train_precision": precision, "train_micro_batch_size": micro_batch_size}
    world = options.get("parallel_tensor", 1) * options.get("parallel_pipeline", 1) * options.get("parallel_data", 1)
    return config(world, **options)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_and_evaluation_give_the_same_log_probabilities(layout: str, precision: str) -> None:
    """Training computes the loss with its gradients, chunk by chunk; evaluation without."""
    cfg = case(layout, precision, 2)
    trained, evaluated = (sample_losses(cfg, training=way) for way in (True, False))
    assert len(trained) == SAMPLES == len(set(trained)) and trained == evaluated


@needs_avx2
@pytest.mark.parametrize("layout", ["one", "sequence"])
def test_micro_batch_size_changes_no_bit_of_a_sample(layout: str) -> None:
    """With the custom float32 kernels: each row of a matmul is summed in an order that the other rows do not change."""
    with native.forced(gemm=True):
        losses = [sample_losses(case(layout, "fp32", n), training=n % 4 > 0) for n in (1, 2, 4, 8)]
    assert all(x == losses[0] for x in losses)


def test_micro_batch_size_changes_rounding_at_most() -> None:
    """torch's matmul may choose another order of sums for another number of rows."""
    one, *others = (sample_losses(case("one", "fp64", n), training=False) for n in (1, 2, 8))
    assert all(x == pytest.approx(one, rel=1e-14) for x in others)


@needs_avx2
@pytest.mark.parametrize("batches", [0, 1])
def test_the_score_of_a_corpus_is_the_same_for_every_micro_batch_size(tmp_path: Path, batches: int) -> None:
    """The whole corpus (0) ends with a shorter sample and with micro-batches that are filled up."""
    rng = np.random.default_rng(3)
    with IndexedWriter(tmp_path / "corpus", vocab_size=MODEL["vocab_size"]) as writer:
        for length in rng.integers(30, 90, 40):
            writer.add(rng.integers(0, 61, length))
        writer.finish({})

    def score(micro_batch_size: int) -> float:
        cfg = case("one", "fp32", micro_batch_size)

        def job(ctx: ParallelContext) -> float:
            state, dataset = setup(cfg, ctx), IndexedDataset(tmp_path / "corpus")
            return Evaluator(state.plan, state.stages, ctx, dataset, cfg, {}).run(batches).loss

        return run_ranks(layout_of(cfg), job, dtype=torch.float32)[0]

    with native.forced(gemm=True):
        assert len({score(n) for n in (1, 2, 4, 8)}) == 1
