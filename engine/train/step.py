"""One optimizer step, the same in every layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from engine.batch import MicroBatch
from engine.distributed.collectives import all_reduce_
from engine.monitor.health import NonFinite, raise_non_finite
from engine.optim.clip import GradNorms, clip_factor
from engine.optim.lr import learning_rate
from engine.pipeline.executor import ExecutionTrace, contributes_loss, execute, local_totals
from engine.train.objective import GlobalBatch, count_tokens, scaled
from engine.train.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step. loss: the objective, such as the mean nats per counted token.

    norms: before clipping. lr: learning rate. tokens: number of counted tokens. skipped: a gradient overflowed in fp16
    and no weight changed. trace: of the executor, if requested. by_source: source of a blend -> its mean loss, for
    sources with counted tokens in this step; empty if the objective is not a mean of token losses. sums: the named sums
    of the model's parts, such as z_loss; `loss` does not contain them.
    """

    loss: float
    norms: GradNorms
    lr: float
    tokens: int
    skipped: bool = False
    trace: ExecutionTrace | None = None
    by_source: dict[int, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)


def train_step(
    state: TrainState, batches: Sequence[MicroBatch], *, traced: bool = False, num_sources: int = 0
) -> StepResult:
    """One optimizer step on this rank's share of the samples; identical results on all ranks.

    num_sources: number of sources of a blend, to report a loss for each; 0 for none.

    The objective gives the weight of each token's loss over the whole global batch before the forward. A non-finite
    loss or gradient raises TrainingError on every rank before any weight has changed; in fp16 a non-finite gradient
    only skips the step and halves the loss scale.
    """
    cfg, ctx, scale = state.cfg, state.ctx, state.scale.value
    batches = [b.part(ctx.positions.rank, ctx.positions.size) for b in batches]
    counted = count_tokens(batches, state.plan, ctx)
    state.enter(state.phase)
    there = [b.to(ctx.device).drawing(cfg.train.seed, state.step + 1) for b in batches]
    whole = GlobalBatch(there, counted, state.plan, state.stages, ctx)
    weighting = state.objective(whole)
    weighted = scaled(whole, weighting, scale)
    for stage in state.buckets:
        stage.zero_grad()
    trace = ExecutionTrace(ctx.device) if traced else None
    done = execute(state.plan, state.stages, ctx, weighted, trace)
    for stage in state.buckets:
        stage.wait()
    totals = all_reduce_(local_totals(done, ctx), ctx.world)
    norms = state.norms(scale)  # the only synchronisation with the GPU: all values that the host reads are ready then
    loss, *sums = (totals / scale).tolist()
    if weighting.loss is not None:
        loss = float(weighting.loss)
    finite = math.isfinite(norms.norm)
    state.scale.update(finite)
    if not math.isfinite(loss) or not (finite or (state.scale.window and state.scale.value >= 1)):
        failure = NonFinite(state.step + 1, loss, norms.non_finite(), state.phases.samples(state.step + 1))
        raise_non_finite(state.plan, state.stages, state.params, ctx, weighted, failure)
    lr = learning_rate(state.step + 1, cfg.train.steps, cfg.optimizer, cfg.lr_schedule)
    if finite:
        state.before_update()
        state.optimizer.step(lr, clip_factor(norms.norm, cfg.optimizer.clip_norm) / scale)
    state.step += 1
    by_source = {}
    if num_sources and weighting.mean:
        by_source = losses_by_source(done.losses * (counted.weight / scale), whole.batches, state, num_sources)
    return StepResult(loss, norms, lr, counted.number, not finite, trace, by_source, dict(zip(done.sums, sums)))


def losses_by_source(
    losses: torch.Tensor, batches: Sequence[MicroBatch], state: TrainState, num_sources: int
) -> dict[int, float]:
    """Source -> sum of its weighted token losses / sum of its weights, over the whole global batch. Collective.

    losses [microbatches, b]: for each sample the weighted sum of its token losses in nats.
    """
    ctx = state.ctx
    sums = torch.zeros(2, num_sources, dtype=torch.float64, device=ctx.device)
    if contributes_loss(state.plan, ctx):
        for row, batch in zip(losses, batches):
            assert batch.sources is not None
            sums[0].index_add_(0, batch.sources, row)
            sums[1].index_add_(0, batch.sources, batch.weights.sum(1))
    total, counted = all_reduce_(sums, ctx.world).tolist()
    return {k: total[k] / counted[k] for k in range(num_sources) if counted[k]}
