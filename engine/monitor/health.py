"""Finding where a non-finite number came from, before any weight has changed.

The step is replayed one microbatch at a time with the same weights and without sums over data ranks; every rank
reports the microbatches in which its losses or gradients are not finite, and all ranks raise the same error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.comm import gather_json
from engine.context import ParallelContext
from engine.data.loader import MicroBatch
from engine.errors import TrainingError
from engine.pipeline.actions import Plan
from engine.pipeline.executor import execute
from engine.pipeline.schedules import single
from engine.pipeline.stage import Stage
from engine.sharding import Parameter


def explain_non_finite(
    plan: Plan,
    stages: Mapping[int, Stage],
    params: Sequence[Parameter],
    ctx: ParallelContext,
    batches: Sequence[MicroBatch],
    token_weight: float,
    step: int,
    loss: float,
    tensors: Sequence[str],
) -> None:
    """Raise TrainingError on every rank, naming step, rank, microbatch and tensor. Collective."""
    alone = single(plan)
    mine: list[dict[str, Any]] = []
    for index, batch in enumerate(batches):
        for stage in stages.values():
            assert stage.buckets is not None
            stage.buckets.overlap = False  # no sums over data ranks; the run ends here, nobody needs it back
            stage.buckets.zero_grad()
        losses = execute(alone, stages, ctx, [batch], token_weight)
        if not bool(torch.isfinite(losses).all()):
            mine.append({"microbatch": index, "what": f"loss {float(losses.sum())}"})
        mine += [{"microbatch": index, "what": f"gradient of {name}"} for name in _broken(params, ctx)[:1]]
    found = [
        (finding["microbatch"], rank, finding["what"])
        for rank, findings in enumerate(gather_json(mine, ctx.world, ctx.device))
        for finding in findings
    ]
    raise TrainingError(_message(sorted(found), step, loss, tensors))


def _broken(params: Sequence[Parameter], ctx: ParallelContext) -> list[str]:
    names = []
    for p in params:
        assert p.main_grad is not None
        for piece in p.spec.pieces(ctx):
            if not bool(torch.isfinite(piece.of(p.main_grad)).all()):
                names.append(piece.name)
    return names


def _message(found: list[tuple[int, int, str]], step: int, loss: float, tensors: Sequence[str]) -> str:
    what = f"step {step}: loss is {loss}" + (f", non-finite gradient of {', '.join(tensors[:3])}" if tensors else "")
    if not found:
        return (
            f"{what}; replaying each microbatch alone gave finite numbers everywhere: the sum overflowed or the "
            "hardware erred once. No weight was changed; start the same command again from the last checkpoint."
        )
    first = found[0][0]
    ranks = sorted({rank for index, rank, _ in found if index == first})
    causes = list(dict.fromkeys(text for index, _, text in found if index == first))
    return (
        f"{what}; first in microbatch {first} of rank {', '.join(map(str, ranks))} ({'; '.join(causes[:3])}). "
        "No weight was changed and the last checkpoint is intact. Lower optimizer.lr, or look at that microbatch."
    )
