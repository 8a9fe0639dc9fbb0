"""Objectives: what each token's loss weighs in the number that training minimises.

The head computes its gradients in the forward (ops.loss), so the weight of every token has to be known before. For a
mean it is 1 / counted tokens. For a loss that is another function of the token losses, such as a preference loss over
pairs of samples, the weight is its derivative: an objective may first run forward-only plans to learn the losses.

An objective sees the whole global batch, in the same order in every layout. So its weights do not depend on the layout.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from engine.batch import MicroBatch
from engine.config.objective_table import OBJECTIVES, ObjectiveConfig
from engine.distributed.collectives import all_reduce_
from engine.distributed.context import ParallelContext
from engine.errors import DataError
from engine.pipeline.actions import Plan
from engine.pipeline.executor import contributes_loss, execute
from engine.pipeline.schedules import forward_only
from engine.pipeline.stage import Stage


@dataclass(frozen=True)
class CountedTokens:
    """The counted labels of a global batch. number: those with a weight above 0. weight: the sum of their weights."""

    number: int
    weight: float


def count_labels(batches: Sequence[MicroBatch]) -> Tensor:
    """float64 [3] on the host: the sum of the weights, how many are above 0, how many are negative or not finite.

    batches: on the host, to avoid a synchronisation with the GPU.
    """
    counts = torch.zeros(3, dtype=torch.float64)
    for weights in (b.weights for b in batches):
        valid = weights.isfinite() & (weights >= 0)
        counts += torch.stack([x.sum().double() for x in (weights, weights > 0, ~valid)])
    return counts


def checked_counts(counts: Sequence[float]) -> CountedTokens:
    """The counts of `count_labels`, summed over the data ranks. DataError if a weight is negative or not finite."""
    weight, number, invalid = counts
    if invalid:
        raise DataError(
            "train.weight-not-valid",
            f"{invalid:,.0f} labels of this global batch have a weight that is negative or not finite; a weight says "
            "how much a label counts: correct the transform that sets it",
        )
    return CountedTokens(int(number), weight)


def count_tokens(batches: Sequence[MicroBatch], plan: Plan, ctx: ParallelContext) -> CountedTokens:
    """Count the labels of the microbatches of all data ranks. Collective. batches: on the host.

    DataError on all ranks if a weight is negative or not finite, or if no label counts.
    """
    counts = count_labels(batches)
    if ctx.data_context.size > 1:  # over the world: this axis may still be gathering the weights of the previous step
        counts = all_reduce_(counts.to(ctx.device) * float(contributes_loss(plan, ctx)), ctx.world)
    counted = checked_counts(counts.tolist())
    if counted.number == 0:
        raise DataError(
            "train.no-token-counts",
            "the loss mask excludes every token of this global batch; check the data, or skip the step with "
            "--train.skip_steps",
        )
    return counted


@dataclass(frozen=True)
class GlobalBatch:
    """The global batch of a step as an objective sees it. Its methods are collectives of all ranks.

    batches: the microbatches of this data rank, on its device, with the weights that the transforms of the data set.
    counted: of all data ranks.
    """

    batches: Sequence[MicroBatch]
    counted: CountedTokens
    plan: Plan
    stages: Mapping[int, Stage]
    ctx: ParallelContext

    def sample_losses(self, weights: Sequence[Tensor]) -> Tensor:
        """Run forward only: float64 [samples], for each sample of the global batch its sum of weights * token losses.

        weights: for each of `batches`, float [b, s]. The result is on every rank, in the order of the samples.
        """
        plan = forward_only(self.plan, len(self.batches))
        batches = [replace(b, weights=w, shares=None) for b, w in zip(self.batches, weights, strict=True)]
        mine = execute(plan, self.stages, self.ctx, batches).losses.flatten()
        whole = mine.new_zeros(self.ctx.samples.size, len(mine))
        whole[self.ctx.samples.rank] = mine * float(contributes_loss(self.plan, self.ctx))
        return all_reduce_(whole, self.ctx.world).flatten()

    def of_this_rank(self, values: Tensor) -> list[Tensor]:
        """Values of all samples [samples, ...] -> for each of `batches`, those of its samples [b, ...]."""
        sizes = [len(b.tokens) for b in self.batches]
        return list(values.chunk(self.ctx.samples.size)[self.ctx.samples.rank].split(sizes))


@dataclass(frozen=True)
class Weighting:
    """An objective at the current weights of the model.

    weights: for each microbatch of this data rank float64 [b, s], the derivative of the objective with respect to each
    token's loss, over the whole global batch. loss: the objective, float64 scalar on the context's device, equal on all
    ranks; None: the sum of weights * token losses. mean: whether it is the mean of the token losses by the weights of
    the batch, so that the same mean of each source is a part of it.
    """

    weights: list[Tensor]
    loss: Tensor | None = None
    mean: bool = False


class Objective(Protocol):
    """Gives the weights of a global batch. Called once per step on every rank, before the forward."""

    def __call__(self, batch: GlobalBatch) -> Weighting: ...


def make_objective(cfg: ObjectiveConfig) -> Objective:
    """The objective that a config selects from OBJECTIVES."""
    module, _, attribute = OBJECTIVES[cfg.kind].partition(":")
    objective: Objective = getattr(importlib.import_module(module), attribute)(cfg)
    return objective


class LanguageModel:
    """The mean cross entropy of the next token, over the counted tokens of the global batch, by their weights."""

    def __init__(self, cfg: ObjectiveConfig):
        pass  # it has no settings

    def __call__(self, batch: GlobalBatch) -> Weighting:
        return Weighting([b.weights / batch.counted.weight for b in batch.batches], mean=True)


def scaled(batch: GlobalBatch, weighting: Weighting, scale: float) -> list[MicroBatch]:
    """The microbatches with all factors of the loss: objective, mean over counted tokens, and loss scale."""
    mean = scale / batch.counted.weight
    return [
        replace(b, weights=w * scale, shares=b.weights * mean)
        for b, w in zip(batch.batches, weighting.weights, strict=True)
    ]
