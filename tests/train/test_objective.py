"""Objectives: float weights, and weights from forward-only plans, equal direct autograd in every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch import MicroBatch
from engine.config.objective_table import OBJECTIVES, ObjectiveConfig
from engine.config.schema import Config
from engine.data.samples.indexed import IndexedDataset
from engine.data.samples.order import SampleOrder
from engine.distributed.context import ParallelContext, make_context
from engine.distributed.layout import Layout
from engine.errors import DataError
from engine.train.evaluate import Evaluator
from engine.train.objective import GlobalBatch, Weighting
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import (
    assemble,
    config,
    gradients_of,
    layout_of,
    max_relative_error,
    micro_batch,
    random_batches,
    weights_of,
)
from tests.support.corpora import corpus
from tests.support.errors import raises
from tests.support.harness import run_ranks
from tests.support.plain_model import plain_logits
from tests.support.runs import TINY

BETA, SAMPLES = 0.3, 4
MODEL = TINY | {"model_tie_embeddings": False, "train_global_batch_size": SAMPLES}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "large micro-batches": {"train_micro_batch_size": 2},
    "data 4": {"parallel_data": 4},  # the two samples of a pair are on two ranks
    "data 2": {"parallel_data": 2, "train_micro_batch_size": 2, "parallel_zero": 0},
    "tensor 2 pipeline 2": {"parallel_tensor": 2, "parallel_pipeline": 2},
    "zb-v": {"parallel_pipeline": 2, "parallel_schedule": "zb-v", "model_num_layers": 4},
}


class Preference:
    """Of each two consecutive samples the first is preferred: the mean of -log sigmoid(beta * difference of log p).

    As in DPO without a reference model; log p of a sample is the weighted sum of its tokens.
    """

    def __init__(self, cfg: ObjectiveConfig):
        self.beta = BETA

    def __call__(self, batch: GlobalBatch) -> Weighting:
        losses = batch.sample_losses([b.weights for b in batch.batches]).requires_grad_()
        loss = F.softplus(-self.beta * (losses[1::2] - losses[::2])).mean()
        (slopes,) = torch.autograd.grad(loss, losses)
        parts = zip(batch.batches, batch.of_this_rank(slopes), strict=True)
        return Weighting([b.weights * slope[:, None] for b, slope in parts], loss.detach())


class Confidence:
    """Each sample weighs as the model's probability of its tokens, which is a constant of the step."""

    def __init__(self, cfg: ObjectiveConfig):
        self.rate = 0.1

    def __call__(self, batch: GlobalBatch) -> Weighting:
        weights = (-self.rate * batch.sample_losses([b.weights for b in batch.batches])).exp()
        parts = zip(batch.batches, batch.of_this_rank(weights / weights.sum()), strict=True)
        return Weighting([b.weights * weight[:, None] for b, weight in parts])


def uneven(cfg: Config, ctx: ParallelContext) -> list[MicroBatch]:
    """Random batches with weights that are not integers; one sample counts nothing."""
    batches = random_batches(cfg, ctx, 0)
    return [replace(b, weights=b.weights * (0.3 + (b.samples[:, None] * 7 + torch.arange(8)) % 5)) for b in batches]


def step(cfg: Config) -> dict[str, Any]:
    def job(ctx: ParallelContext) -> dict[str, Any]:
        state = setup(cfg, ctx)
        init = weights_of(state)
        batches = [replace(b, sources=b.samples % 2) for b in uneven(cfg, ctx)]
        result = train_step(state, batches, num_sources=2)
        found = {"loss": result.loss, "z": result.sums["z_loss"], "sources": result.by_source, "tokens": result.tokens}
        return found | {"init": init, "grads": gradients_of(state)}

    ranks = run_ranks(layout_of(cfg), job)
    assert all(rank[key] == ranks[0][key] for rank in ranks for key in ("loss", "z", "sources", "tokens"))
    return ranks[0] | {key: assemble([rank[key] for rank in ranks]) for key in ("init", "grads")}


def plain(cfg: Config, weights: dict[str, Tensor]) -> dict[str, Any]:
    """The same in one graph. Sample by sample: log p, and the z-loss, which is a mean over tokens by their weights."""
    ctx = make_context(Layout(), 0, dtype=torch.float64)
    alone = cfg.model_copy(update={"train": cfg.train.model_copy(update={"micro_batch_size": 1})})
    losses, counts, z = [], [], torch.zeros((), dtype=torch.float64)
    for b in uneven(alone, ctx):
        logits = plain_logits(cfg.model, weights, b)
        losses.append((F.cross_entropy(logits.permute(1, 2, 0), b.labels, reduction="none") * b.weights).sum())
        z = z + (logits.exp().sum(-1).log().square() * b.weights.t()).sum()
        counts.append(float(b.weights.sum()))
    each, total = torch.stack(losses), sum(counts)
    sources = {}
    kind = cfg.objective.kind
    if kind == "pretrain":
        loss = each.sum() / total
    elif kind == "preference":
        loss = -torch.sigmoid(BETA * (each[1::2] - each[::2])).log().mean()
    else:
        share = (-0.1 * each).detach().exp()
        loss = (each * share / share.sum()).sum()
    if kind == "pretrain":
        sources = {k: each[k::2].sum().item() / sum(counts[k::2]) for k in (0, 1)}
    z = cfg.train.z_loss * z / total
    (loss + z).backward()
    grads = {f"grad/{name}": x.grad.numpy() for name, x in weights.items() if x.grad is not None}
    return {"loss": loss.item(), "z": z.item(), "sources": sources, "grads": grads}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["pretrain", "preference", "confidence"])
def test_objectives_equal_plain_torch_in_every_layout(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a preference loss are negative for some samples; the z-loss stays a mean over counted tokens."""
    for toy in (Preference, Confidence):
        monkeypatch.setitem(OBJECTIVES, toy.__name__.lower(), f"{__name__}:{toy.__name__}")
    layout = LAYOUTS[name]
    world = layout.get("parallel_data", 1) * layout.get("parallel_tensor", 1) * layout.get("parallel_pipeline", 1)
    cfg = config(world, **MODEL | layout, train_z_loss=0.2, objective_kind=kind)
    found = step(cfg)
    expected = plain(cfg, {k: torch.from_numpy(x.copy()).requires_grad_() for k, x in found["init"].items()})
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-11)
    assert found["z"] == pytest.approx(expected["z"], rel=1e-11)
    assert found["sources"] == pytest.approx(expected["sources"], rel=1e-11)
    assert max_relative_error(found["grads"], expected["grads"]) < 1e-11
    assert 0 < found["tokens"] < SAMPLES * 8


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_not_valid_is_an_error_on_all_ranks(wrong: float) -> None:
    cfg = config(2, **MODEL, parallel_data=2)

    def job(ctx: ParallelContext) -> None:
        batches = uneven(cfg, ctx)
        if ctx.rank == 1:
            batches[0].weights[0, 3] = wrong
        with raises(DataError, "train.weight-not-valid", "1 labels"):
            train_step(setup(cfg, ctx), batches)

    run_ranks(layout_of(cfg), job)


FADED = torch.tensor([1.0, 0.25], dtype=torch.float64).repeat(4)


def score(data: IndexedDataset, world: int, **layout: Any) -> Any:
    """(score with all labels, score with every second one at a quarter, initial weights)."""
    cfg = config(world, **MODEL | layout, train_z_loss=0.2)

    def job(ctx: ParallelContext) -> Any:
        state = setup(cfg, ctx)
        evaluator = Evaluator(state.plan, state.stages, ctx, data, cfg, {})
        whole = evaluator.run(0)
        evaluator.transforms = (lambda rows: replace(rows, weights=rows.weights * FADED),)
        return whole, evaluator.run(0), weights_of(state)

    ranks = run_ranks(layout_of(cfg), job)
    assert all(rank[:2] == ranks[0][:2] for rank in ranks)
    return *ranks[0][:2], assemble([rank[2] for rank in ranks])


def test_validation_is_a_mean_by_weight(tmp_path: Path) -> None:
    """Loss and named sums of float weights, against plain torch and on one and on four ranks."""
    data = corpus(tmp_path / "c", [17] * 9 + [4], 61)
    whole, found, init = score(data, 1)
    assert whole.tokens == found.tokens == data.num_tokens - 1 and abs(found.loss / whole.loss - 1) > 1e-6
    cfg, loss, z, total = config(1, **MODEL), 0.0, 0.0, 0.0
    w = {name: torch.from_numpy(x) for name, x in init.items()}
    order = SampleOrder(data, cfg.train.seq_len, cfg.train.seed, short=True)
    for row in [*order.gather(np.arange(order.samples_per_epoch)), order.gather_tail()]:
        batch = micro_batch(
            torch.from_numpy(row[None, :-1]), torch.from_numpy(row[None, 1:]), FADED[None, : len(row) - 1]
        )
        logits = plain_logits(cfg.model, w, batch)[:, 0]
        loss += float(F.cross_entropy(logits, batch.labels[0], reduction="none") @ batch.weights[0])
        z += 0.2 * float(logits.exp().sum(-1).log().square() @ batch.weights[0])
        total += float(batch.weights.sum())
    assert (found.loss, found.sums) == (
        pytest.approx(loss / total, rel=1e-11),
        {"z_loss": pytest.approx(z / total, rel=1e-11)},
    )
    for a, b in zip(score(data, 4, parallel_data=2, parallel_tensor=2)[:2], (whole, found)):
        assert (a.loss, a.sums["z_loss"], a.tokens) == pytest.approx((b.loss, b.sums["z_loss"], b.tokens), rel=1e-12)
    assert found.as_dict()["z_loss"] == found.sums["z_loss"] and "sums" not in found.as_dict()
