"""A non-finite loss or gradient stops all ranks at the same step, before the update, and is traced to its origin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.batch import MicroBatch
from engine.distributed.context import ParallelContext
from engine.errors import DataError, TrainingError
from engine.model.transformer import Transformer
from engine.train.state import TrainState, setup
from engine.train.step import train_step
from tests.support.cases import config, layout_of, random_batches, weights_of
from tests.support.errors import raises
from tests.support.harness import run_ranks


class Poison(torch.autograd.Function):
    """Identity forward; the gradient becomes NaN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * torch.nan


def poison(state: TrainState, target: MicroBatch, where: str) -> None:
    """Make the final norm fail on one microbatch, known by its labels: in the forward or in the backward only."""
    (stage,) = state.stages.values()
    clean = stage.part
    assert isinstance(clean, Transformer)
    hit = False

    forward = clean.forward

    def observed(inputs: Any, batch: MicroBatch) -> Any:
        nonlocal hit
        hit = torch.equal(batch.labels, target.labels)
        return forward(inputs, batch)

    def spoil(_: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out if not hit else out * torch.nan if where == "forward" else Poison.apply(out)

    clean.forward = observed  # type: ignore[method-assign]
    clean.norm.register_forward_hook(spoil)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("degrees", [(1, 2, 2), (2, 1, 2), (1, 1, 1)])
def test_non_finite_names_step_rank_and_microbatch(where: str, degrees: tuple[int, int, int]) -> None:
    tensor, pipeline, data = degrees
    world = tensor * pipeline * data
    cfg = config(
        world,
        parallel_tensor=tensor,
        parallel_pipeline=pipeline,
        parallel_data=data,
        train_global_batch_size=8,
    )
    last = layout_of(cfg).world - 1

    def job(ctx: ParallelContext) -> tuple[str, bool, int]:
        state = setup(cfg, ctx)
        train_step(state, random_batches(cfg, ctx, 0))
        batches = random_batches(cfg, ctx, 1)
        batches = [replace(b, weights=torch.ones_like(b.weights)) for b in batches]
        if ctx.rank == last:
            poison(state, batches[2], where)
        before = weights_of(state)
        try:
            train_step(state, batches)
        except TrainingError as error:
            after = weights_of(state)
            return str(error), all((a[3] == b[3]).all() for a, b in zip(before, after)), state.step
        raise AssertionError("the step went through")

    for message, unchanged, step in run_ranks(layout_of(cfg), job):
        assert unchanged and step == 1
        assert message.startswith("step 2: ") and "microbatch 2 of rank" in message
        ranks = message.split("of rank ")[1].split(" (")[0].split(", ")
        assert str(last) in ranks
        data_peers = {str(r) for r in range(world) if layout_of(cfg).coords(r)["data"] == data - 1}
        mbs = cfg.train.micro_batch_size
        begin = 8 + (data - 1) * (8 // data) + 2 * mbs  # 8 were consumed by the first step
        named = str(begin) if mbs == 1 else f"{begin}-{begin + mbs - 1}"
        assert f"in samples {named}; its samples are 8-15" in message and f'--data.skip_samples "{named}"' in message
        assert "--train.skip_steps 2" in message
        assert set(ranks) <= data_peers, "only ranks of the poisoned data replica may be named"


def test_a_batch_without_counted_tokens_is_rejected() -> None:
    cfg = config(1)

    def job(ctx: ParallelContext) -> None:
        state = setup(cfg, ctx)
        batches = [replace(b, weights=torch.zeros_like(b.weights)) for b in random_batches(cfg, ctx, 0)]
        with raises(DataError, "train.no-token-counts"):
            train_step(state, batches)

    run_ranks(layout_of(cfg), job)


def diverge(state: TrainState) -> None:
    """Make every loss NaN by setting all weights to NaN."""
    for p in state.params:
        p.data.fill_(torch.nan)


def test_diverged_weights_are_distinguished_from_a_bad_sample() -> None:
    cfg = config(2, parallel_data=2, train_global_batch_size=4)

    def job(ctx: ParallelContext) -> str:
        state = setup(cfg, ctx)
        diverge(state)
        with pytest.raises(TrainingError) as error:
            train_step(state, random_batches(cfg, ctx, 0))
        return str(error.value)

    for message in run_ranks(layout_of(cfg), job):
        assert "in samples 0-3; its samples are 0-3" in message and "the weights diverged before it" in message
