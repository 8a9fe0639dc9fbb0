"""fp16: the loss scale, steps skipped on all ranks, the loss scale in checkpoints; dtypes of gradient reductions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoint.format import read_manifest
from engine.checkpoint.lineage import format_lineage
from engine.distributed.context import ParallelContext
from engine.errors import TrainingError
from engine.optim.lr import learning_rate
from engine.optim.precision import PRECISIONS, LossScale
from engine.train.resume import changed_since, resume, save_state
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import (
    assemble,
    config,
    gradients_of,
    layout_of,
    max_relative_error,
    random_batches,
    shard_pieces,
)
from tests.support.harness import run_ranks

METADATA = {"prefix": "x", "num_documents": 1, "num_tokens": 1, "tokenizer_digest": None}


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 7))
def test_the_scale_follows_the_overflows(finite: list[bool], window: int) -> None:
    scale = LossScale(1024.0, window)
    for good in finite:
        before = scale.value
        scale.update(good)
        assert scale.value in ((before, 2 * before) if good else (before / 2,))
    run = len(finite) - 1 - max((i for i, good in enumerate(finite) if not good), default=-1)
    assert scale.good_steps == run % window


def test_a_smaller_window_after_a_resume_does_not_stop_the_growth() -> None:
    scale = LossScale(1024.0, 3, good_steps=7)  # from a run with window 10
    scale.update(True)
    assert (scale.value, scale.good_steps) == (2048.0, 0)


def test_other_precisions_have_no_scale() -> None:
    scale = LossScale()
    scale.update(False)
    assert scale.value == 1.0


def fp16(**change: Any) -> Any:
    base = {"parallel_tensor": 2, "parallel_data": 2, "train_precision": "fp16", "optimizer_lr": 1e-3}
    return config(4, **{**base, **change})


def run(cfg: Any, job: Any) -> list[Any]:
    return run_ranks(layout_of(cfg), job, dtype=torch.float16)


def test_fp16_learns_what_fp32_learns() -> None:
    cfg = fp16()

    def losses(ctx: ParallelContext) -> list[float]:
        state = setup(cfg, ctx)
        return [train_step(state, random_batches(cfg, ctx, 0)).loss for _ in range(12)]

    half = run(cfg, losses)
    assert all(r == half[0] for r in half)
    cfg = fp16(train_precision="fp32")
    whole = run_ranks(layout_of(cfg), losses, dtype=torch.float32)
    assert half[0] == pytest.approx(whole[0], rel=5e-3) and half[0][-1] < half[0][0] - 0.2


def test_an_overflow_skips_the_step_on_all_ranks_and_survives_a_restart(tmp_path: Path) -> None:
    """The first scale is far too large: steps are skipped until it fits, without changing weights or optimizer."""
    cfg = fp16(train_loss_scale=2.0**40, train_loss_scale_window=3)

    def job(ctx: ParallelContext) -> Any:
        state = setup(cfg, ctx)
        start = shard_pieces(state.optimizer.states(), ctx)
        seen = []
        for step in range(100):
            result = train_step(state, random_batches(cfg, ctx, step))
            seen.append((result.skipped, state.scale.value, state.optimizer.steps))
            assert result.lr == learning_rate(step + 1, cfg.train.steps, cfg.optimizer, cfg.lr_schedule)
            if not result.skipped:
                break
            same = shard_pieces(state.optimizer.states(), ctx)
            assert all((a[3] == b[3]).all() for a, b in zip(start, same)) and state.step == step + 1
        save_state(state, tmp_path, METADATA)
        again = setup(cfg, ctx)
        resume(again, tmp_path / f"step_{state.step:08d}", METADATA)
        assert (again.scale, again.optimizer.steps, again.step) == (state.scale, state.optimizer.steps, state.step)
        return seen, shard_pieces(again.optimizer.states(), ctx), shard_pieces(state.optimizer.states(), ctx)

    ranks = run(cfg, job)
    assert all(r[0] == ranks[0][0] for r in ranks)
    seen = ranks[0][0]
    assert len(seen) > 3 and not seen[-1][0] and seen[-1][2] == 1
    assert [value for _, value, _ in seen[:-1]] == [2.0 ** (39 - i) for i in range(len(seen) - 1)]
    assert max_relative_error(assemble([r[1] for r in ranks]), assemble([r[2] for r in ranks])) == 0


def test_a_scale_that_falls_below_one_is_an_error() -> None:
    cfg = fp16(train_loss_scale=1.0)

    def job(ctx: ParallelContext) -> str:
        state = setup(cfg, ctx)
        for p in state.params:  # a gradient that overflows at any scale
            p.register_hook(lambda grad: None if grad is None else grad * torch.inf)
        try:
            train_step(state, random_batches(cfg, ctx, 0))
        except TrainingError as error:
            return str(error)
        return ""

    for text in run(cfg, job):
        assert "step 1" in text and "non-finite gradient of" in text and "No weight was changed" in text


@pytest.mark.parametrize("zero", [0, 1])
def test_gradients_summed_in_bf16_are_those_of_fp32_rounded(zero: int) -> None:
    def grads(reduce_dtype: str) -> dict[str, Any]:
        cfg = config(2, parallel_data=2, train_precision="fp32", parallel_zero=zero, parallel_reduce_dtype=reduce_dtype)

        def job(ctx: ParallelContext) -> Any:
            state = setup(cfg, ctx)
            train_step(state, random_batches(cfg, ctx, 0))
            return gradients_of(state)

        return assemble(run_ranks(layout_of(cfg), job, dtype=torch.float32))

    difference = max_relative_error(grads("bf16"), grads("main"))
    assert 1e-5 < difference < 3 * 2**-8  # each part and the sum are rounded to eight bits


def test_the_scale_is_undone_bitwise() -> None:
    """In float64 a power of two causes no rounding. Compare norms and all states: AdamW is almost scale-invariant."""

    def states(scale: LossScale) -> Any:
        cfg = config(1, model_num_layers=1, optimizer_clip_norm=0.05, train_z_loss=0.1)

        def job(ctx: ParallelContext) -> Any:
            state = setup(cfg, ctx)
            state.scale = scale
            results = [train_step(state, random_batches(cfg, ctx, step)) for step in range(2)]
            return [(r.loss, r.sums, r.norms) for r in results], shard_pieces(state.optimizer.states(), ctx)

        return run_ranks(layout_of(cfg), job)[0]

    plain, scaled = states(LossScale()), states(LossScale(2.0**16, 1))
    assert plain[0] == scaled[0] and max_relative_error(assemble([plain[1]]), assemble([scaled[1]])) == 0


def test_an_overflow_on_one_rank_skips_the_step_on_all() -> None:
    """Only tensor rank 1 has the gradient that overflows."""
    cfg = config(2, model_num_layers=1, parallel_tensor=2, train_precision="fp16")

    def job(ctx: ParallelContext) -> Any:
        state = setup(cfg, ctx)
        fill = state.buckets[0].wait

        def wait() -> None:
            fill()
            if ctx.rank == 1:
                next(p for p in state.params if "out" in p.name).main_grad[0, 0] = torch.inf

        state.buckets[0].wait = wait  # type: ignore[method-assign]
        result = train_step(state, random_batches(cfg, ctx, 0))
        return result.skipped, state.scale.value, state.optimizer.steps

    assert run(cfg, job) == [(True, cfg.train.loss_scale / 2, 0)] * 2


def test_only_fp16_runs_hand_on_a_loss_scale(tmp_path: Path) -> None:
    """Chains of precisions, each resuming from the last checkpoint; engines up to 0.1 wrote scale 1 in all."""

    def go(precision: str, folder: Path, source: Path | None, **change: Any) -> tuple[Path, LossScale, str]:
        cfg = config(1, model_num_layers=1, train_precision=precision, train_loss_scale=2.0**12, **change)

        def job(ctx: ParallelContext) -> Any:
            state = setup(cfg, ctx)
            if source is not None:
                resume(state, source, METADATA)
            start = LossScale(state.scale.value, state.scale.window, state.scale.good_steps)
            line = changed_since(state.lineage[-1].changed, state.scale) if state.lineage else ""
            train_step(state, random_batches(cfg, ctx, state.step))
            return str(save_state(state, folder, METADATA)), start, line

        ((saved, start, line),) = run_ranks(layout_of(cfg), job, dtype=PRECISIONS[precision].compute)
        return Path(saved), start, line

    first = {p: go(p, tmp_path / p, None)[0] for p in ("fp64", "fp32", "bf16", "fp16")}
    for precision, folder in first.items():
        saved = read_manifest(folder).optimizer
        assert ("loss_scale" in saved) == ("good_steps" in saved) == (precision == "fp16")
    for precision in ("fp64", "fp32", "bf16"):
        for source in (first[precision], with_scale_one(first[precision], tmp_path / f"old {precision}")):
            half, start, line = go("fp16", tmp_path / "half", source)
            assert start == LossScale(2.0**12, 1000, 0)
            assert line == (
                f"changed since the checkpoint: train.precision {precision} -> fp16 (the loss scale starts at 4,096)"
            )
            parent = read_manifest(half).lineage[-1]
            assert parent.changed == {"train.precision": (precision, "fp16")}
            assert f"  changed: train.precision: {precision} -> fp16" in format_lineage([parent])
    again, start, line = go("fp16", tmp_path / "again", first["fp16"], train_loss_scale_window=1)
    assert start == LossScale(2.0**12, 1, 1)  # restored from the checkpoint
    assert read_manifest(again).optimizer["loss_scale"] == 2.0**13 and not read_manifest(again).lineage[-1].changed
    back, start, line = go("bf16", tmp_path / "back", again)
    assert start == LossScale() and line == "changed since the checkpoint: train.precision fp16 -> bf16"
    assert "loss_scale" not in read_manifest(back).optimizer
    assert go("fp16", tmp_path / "last", back)[1].value == 2.0**12


def with_scale_one(folder: Path, to: Path) -> Path:
    """A copy of the checkpoint with the loss scale 1 that older engines wrote."""
    shutil.copytree(folder, to / folder.name)
    manifest = read_manifest(folder)
    manifest.optimizer.update(loss_scale=1.0, good_steps=0)
    (to / folder.name / "manifest.json").write_bytes(manifest.encode())
    return to / folder.name


def test_one_data_rank_sums_nothing_and_rounds_nothing() -> None:
    def grads(reduce_dtype: str) -> dict[str, Any]:
        cfg = config(2, parallel_tensor=2, train_precision="fp32", parallel_reduce_dtype=reduce_dtype)

        def job(ctx: ParallelContext) -> Any:
            state = setup(cfg, ctx)
            train_step(state, random_batches(cfg, ctx, 0))
            return gradients_of(state)

        return assemble(run_ranks(layout_of(cfg), job, dtype=torch.float32))

    assert max_relative_error(grads("bf16"), grads("main")) == 0
