"""Finds the origin of a non-finite loss or gradient, before any weight has changed.

The step is replayed one microbatch at a time with the same weights and without reductions over data ranks. Every rank
reports the microbatches in which its losses or gradients are not finite, and all ranks raise the same error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.batch import MicroBatch
from engine.config.skips import format_ranges, read_ranges
from engine.distributed.collectives import gather_json
from engine.distributed.context import ParallelContext
from engine.distributed.sharding import Parameter, piece_of
from engine.errors import TrainingError
from engine.pipeline.actions import Plan
from engine.pipeline.executor import execute
from engine.pipeline.schedules import first_microbatch
from engine.pipeline.stage import Stage


@dataclass(frozen=True)
class NonFinite:
    """A failed step: its number, loss, tensors whose gradient is not finite, and global sample numbers."""

    step: int
    loss: float
    tensors: Sequence[str]
    samples: range


def raise_non_finite(
    plan: Plan,
    stages: Mapping[int, Stage],
    params: Sequence[Parameter],
    ctx: ParallelContext,
    batches: Sequence[MicroBatch],
    failure: NonFinite,
) -> None:
    """Raise TrainingError on every rank, naming step, rank, microbatch, samples and tensor. Collective.

    batches: with the weights of the failed step.
    """
    alone = first_microbatch(plan)
    mine: list[dict[str, Any]] = []
    for index, batch in enumerate(batches):
        here = batch.samples.tolist()
        for stage in stages.values():
            assert stage.buckets is not None
            stage.buckets.overlap = False  # no reductions over data ranks; not restored, because the run ends here
            stage.buckets.zero_grad()
        losses = execute(alone, stages, ctx, [batch]).losses
        if not bool(torch.isfinite(losses).all()):
            wrong = [here[k] for k in (~torch.isfinite(losses[0])).nonzero().flatten().tolist()]
            mine.append({"microbatch": index, "cause": f"loss {float(losses.sum())}", "samples": wrong})
        for name in _non_finite_gradients(params, ctx)[:1]:
            mine.append({"microbatch": index, "cause": f"gradient of {name}", "samples": here})
    found = [
        (finding["microbatch"], rank, finding["cause"], tuple(finding["samples"]))
        for rank, findings in enumerate(gather_json(mine, ctx.world, ctx.device))
        for finding in findings
    ]
    raise TrainingError("monitor.non-finite", _message(sorted(found), failure))


def _non_finite_gradients(params: Sequence[Parameter], ctx: ParallelContext) -> list[str]:
    names = []
    for p in params:
        if p.main_grad is None:  # frozen
            continue
        for piece in p.spec.pieces(ctx):
            if not bool(torch.isfinite(piece_of(piece, p.main_grad)).all()):
                names.append(piece.name)
    return names


def _message(found: list[tuple[int, int, str, tuple[int, ...]]], step: NonFinite) -> str:
    tensors, samples = step.tensors, step.samples
    failure = f"step {step.step}: loss is {step.loss}"
    failure += f", non-finite gradient of {', '.join(tensors[:3])}" if tensors else ""
    of_step = f"its samples are {samples.start}-{samples.stop - 1}"
    if not found:
        return (
            f"{failure}; {of_step}; each microbatch replayed alone gave finite numbers: the sum overflowed, or the "
            "hardware made a transient error. No weight was changed; start the same command again to resume from the "
            "last checkpoint."
        )
    first = found[0][0]
    ranks = sorted({rank for index, rank, *_ in found if index == first})
    causes = list(dict.fromkeys(text for index, _, text, _ in found if index == first))
    by_loss = {n for _, _, text, numbers in found if text.startswith("loss") for n in numbers}
    wrong = sorted(by_loss or {n for *_, numbers in found for n in numbers})
    named = format_ranges(read_ranges(" ".join(map(str, wrong))))
    place = f"first in microbatch {first} of rank {', '.join(map(str, ranks))} ({'; '.join(causes[:3])})"
    text = (
        f"{failure}; {place}, in samples {named}; {of_step}. No weight was changed and the last checkpoint is intact. "
    )
    if len(wrong) == len(samples):
        return (
            f"{text}All samples of the step are affected: the weights diverged before it. Go back to an earlier "
            "checkpoint (--checkpoint.resume PATH) with a lower optimizer.lr, or skip the steps that led here "
            f'(--train.skip_steps "A-{step.step}")'
        )
    return (
        f"{text}The same command would fail at the same step: lower optimizer.lr, or skip these samples "
        f'(--data.skip_samples "{named}") or the whole step (--train.skip_steps {step.step})'
    )
