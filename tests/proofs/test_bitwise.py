"""Options that must not change a single bit: schedule, recomputation, ZeRO-1, bucket size, overlap; and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.schema import Config
from engine.distributed.context import ParallelContext
from engine.train.resume import resume, save_state
from engine.train.state import TrainState, setup
from engine.train.step import train_step
from tests.support.cases import assemble, config, layout_of, random_batches, shard_pieces
from tests.support.harness import run_ranks

METADATA = {"prefix": "x", "num_documents": 1, "num_tokens": 1, "tokenizer_digest": None}


def digest(state: TrainState, ctx: ParallelContext) -> list[Any]:
    """This rank's pieces of all canonical tensors of model and optimizer, named kind/name."""
    return shard_pieces(state.optimizer.states(), ctx)


def steps(state: TrainState, ctx: ParallelContext, count: int) -> list[tuple[float, float]]:
    results = [train_step(state, random_batches(state.cfg, ctx, state.step)) for _ in range(count)]
    return [(r.loss, r.norms.norm) for r in results]


def run(cfg: Config, dtype: torch.dtype = torch.float32, count: int = 4) -> tuple[Any, dict[str, np.ndarray]]:
    def job(ctx: ParallelContext) -> Any:
        state = setup(cfg, ctx)
        return steps(state, ctx, count), digest(state, ctx)

    ranks = run_ranks(layout_of(cfg), job, dtype=dtype)
    return ranks[0][0], assemble([r[1] for r in ranks])


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# (base config, changes to apply to it one at a time)
PIPELINE = {"parallel_pipeline": 2, "parallel_data": 2, "model_num_layers": 4}
TENSOR = {"parallel_tensor": 2, "parallel_data": 2, "model_num_layers": 2, "model_qk_norm": True}
TIED = {"parallel_pipeline": 2, "parallel_data": 2, "model_num_layers": 2, "model_tie_embeddings": True}
DROPOUT = {"parallel_tensor": 2, "parallel_pipeline": 2, "model_num_layers": 2, "train_dropout": 0.2}
DROPOUT |= {"train_attention_dropout": 0.1}
CHANGES: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    (
        PIPELINE,
        [
            {"parallel_schedule": "interleaved"},
            {"parallel_schedule": "zb-h1"},
            {"parallel_schedule": "zb-h1", "train_recompute": "full"},
            {"parallel_schedule": "zb-v", "train_recompute": "selective"},
            {"parallel_schedule": "dualpipe-v", "parallel_overlap": False},
        ],
    ),
    (
        TENSOR,
        [
            {"train_recompute": "selective"},
            {"train_recompute": "full", "train_recompute_layers": 1},
            {"parallel_keep_gathered": True},
            {"parallel_zero": 0},
            {"parallel_overlap_gather": False},
        ],
    ),
    (
        TIED,
        [
            {"parallel_schedule": "gpipe"},
            {"parallel_schedule": "zb-h1"},
            {"parallel_bucket_mib": 100},
            {"parallel_bucket_mib": 0.001, "parallel_zero": 0},
            {"parallel_overlap": False},
        ],
    ),
    (
        DROPOUT,
        [
            {"train_recompute": "selective"},
            {"train_recompute": "full"},
            {"parallel_schedule": "zb-h1", "train_recompute": "full"},
            {"parallel_schedule": "zb-h1", "parallel_keep_gathered": True},
        ],
    ),
]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.heavy)])
@pytest.mark.parametrize(("base", "changes"), CHANGES, ids=["pipeline", "tensor", "tied", "dropout"])
def test_options_that_change_no_bit(base: dict[str, Any], changes: list[dict[str, Any]], precision: str) -> None:
    """Schedule, recomputation, ZeRO-1, bucket size and overlap move work and bytes, but change no arithmetic."""
    base = {**base, "train_global_batch_size": 8, "train_precision": precision}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    losses, state = run(config(4, **base), dtype)
    for change in changes:
        other_losses, other = run(config(4, **{**base, **change}), dtype)
        assert other_losses == losses and same(other, state), change


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pipeline_degree_changes_no_bit(precision: str) -> None:
    """Distributing the layers over pipeline ranks moves activations but does not change them."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    one = run(config(1, train_precision=precision, model_num_layers=4), dtype)
    four = run(config(4, train_precision=precision, model_num_layers=4, parallel_pipeline=4), dtype)
    assert one[0] == four[0] and same(one[1], four[1])


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_resume_in_the_same_layout_changes_no_bit(tmp_path: Path, precision: str, stop: int) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[precision]
    dropout = {"train_dropout": 0.2, "train_attention_dropout": 0.1} if precision == "fp64" else {}
    cfg = config(4, parallel_tensor=2, parallel_data=2, train_precision=precision, model_num_layers=2, **dropout)

    def through(ctx: ParallelContext) -> Any:
        state = setup(cfg, ctx)
        losses = steps(state, ctx, stop)
        save_state(state, tmp_path, METADATA)
        return losses + steps(state, ctx, 5 - stop), digest(state, ctx)

    def resumed(ctx: ParallelContext) -> Any:
        state = setup(cfg, ctx)
        resume(state, tmp_path / f"step_{stop:08d}", METADATA)
        assert state.position.samples == stop * cfg.train.global_batch_size
        return steps(state, ctx, 5 - stop), digest(state, ctx)

    a = run_ranks(layout_of(cfg), through, dtype=dtype)
    b = run_ranks(layout_of(cfg), resumed, dtype=dtype)
    assert a[0][0][stop:] == b[0][0]
    assert same(assemble([r[1] for r in a]), assemble([r[1] for r in b]))


RESHARD = [(1, 1, 1), (4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1), (1, 1, 4), (2, 1, 1)]


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.heavy), True])
def test_resume_in_another_layout_holds_the_same_state(tmp_path: Path, tied: bool) -> None:
    """A checkpoint of each layout is resumed in the next one: equal state, and the float64 losses continue."""

    def cfg_of(degrees: tuple[int, int, int]) -> Config:
        tensor, pipeline, data = degrees
        return config(
            tensor * pipeline * data,
            parallel_tensor=tensor,
            parallel_pipeline=pipeline,
            parallel_data=data,
            model_tie_embeddings=tied,
            model_num_layers=4,
        )

    def chain(degrees: tuple[int, int, int], step: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], float]:
        cfg = cfg_of(degrees)

        def job(ctx: ParallelContext) -> Any:
            state = setup(cfg, ctx)
            if step:
                resume(state, tmp_path / f"step_{step:08d}", METADATA)
            before = digest(state, ctx)
            losses = steps(state, ctx, 1)
            save_state(state, tmp_path, METADATA)
            return before, digest(state, ctx), losses[0][0]

        ranks = run_ranks(layout_of(cfg), job)
        return assemble([r[0] for r in ranks]), assemble([r[1] for r in ranks]), ranks[0][2]

    losses, after = [], None
    for step, degrees in enumerate(RESHARD):
        before, now, loss = chain(degrees, step)
        assert after is None or same(before, after), degrees
        after = now
        losses.append(loss)
    reference = run(cfg_of((1, 1, 1)), torch.float64, len(RESHARD))[0]
    assert losses == pytest.approx([loss for loss, _ in reference], rel=1e-11)
