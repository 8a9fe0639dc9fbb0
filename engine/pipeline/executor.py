"""Runs a checked plan, action by action: the list that was proven is the list that runs.

Receives of a communication step are waited for at once, its sends before the next communication step: later than the
zero-buffering model of `check` assumes, hence never a deadlock that it did not see, and at most one step's sends are
kept alive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from engine.comm import post
from engine.context import ParallelContext
from engine.data.loader import MicroBatch
from engine.errors import PlanError
from engine.pipeline.actions import Action, Op, Plan, Step
from engine.pipeline.stage import Stage

_TO_NEXT = (Op.SEND_F, Op.RECV_F)


@dataclass
class Run:
    """The state of one execution of a plan on one rank. `losses` [microbatches]: float64 sums, zero off the last stage.

    inbox: (Op.F or Op.B, stage, microbatch) -> activation or gradient that the action of that name consumes.
    outbox: the same key -> what the action of that name has produced for a neighbour.
    """

    plan: Plan
    stages: Mapping[int, Stage]
    ctx: ParallelContext
    batches: Sequence[MicroBatch]
    loss_grad: float
    losses: Tensor
    inbox: dict[tuple[Op, int, int], Tensor]
    outbox: dict[tuple[Op, int, int], Tensor]
    sending: list[dist.Work]


def execute(
    plan: Plan,
    stages: Mapping[int, Stage],
    ctx: ParallelContext,
    batches: Sequence[MicroBatch],
    loss_grad: float,
) -> Tensor:
    """Run this rank's program of the plan over its microbatches; returns `Run.losses`.

    loss_grad: gradient of the objective with respect to every summed loss, 1 / (counted tokens of the global batch).
    Activations between stages are [s, b, h] in the context's dtype. A plan without backward runs under no_grad.
    """
    if len(batches) != plan.microbatches:
        raise PlanError(f"the plan is for {plan.microbatches} microbatches, {len(batches)} were given")
    losses = torch.zeros(plan.microbatches, dtype=torch.float64, device=ctx.device)
    run = Run(plan, stages, ctx, batches, loss_grad, losses, {}, {}, [])
    program = plan.programs[ctx.pipeline.rank]
    last_backward = {a.stage: a for step in program for a in step if a.op is Op.B}
    with torch.set_grad_enabled(plan.backward):
        for step in program:
            action = step[0]
            if action.op is Op.F:
                _forward(run, action)
            elif action.op is Op.B:
                _backward(run, action, final=action == last_backward[action.stage])
            elif action.op is Op.REDUCE:
                buckets = stages[action.stage].buckets
                assert buckets is not None, "a plan with backward runs on stages with buckets"
                buckets.reduce()
            elif action.op in (Op.SEND_F, Op.RECV_F, Op.SEND_B, Op.RECV_B):
                _communicate(run, step)
            else:
                raise PlanError(f"{action}: the executor runs whole backwards (B), not {action.op}")
    for work in run.sending:
        work.wait()
    return losses


def _deliver(run: Run, op: Op, stage: int, index: int, x: Tensor) -> None:
    """Hand a result to the action (op, stage) that consumes it: directly when it is on this rank, else by a send."""
    here = run.plan.rank_of(stage) == run.ctx.pipeline.rank
    (run.inbox if here else run.outbox)[op, stage, index] = x


def _forward(run: Run, action: Action) -> None:
    stage = run.stages[action.stage]
    x = run.inbox.pop((Op.F, action.stage, action.microbatch), None)
    out = stage.forward(action.microbatch, x, run.batches[action.microbatch])
    if stage.last:
        run.losses[action.microbatch] = out
    else:
        _deliver(run, Op.F, action.stage + 1, action.microbatch, out)


def _backward(run: Run, action: Action, *, final: bool) -> None:
    stage = run.stages[action.stage]
    if stage.last:
        out = stage.live[action.microbatch][1]
        grad = torch.full_like(out, run.loss_grad)
    else:
        grad = run.inbox.pop((Op.B, action.stage, action.microbatch))
    grad_x = stage.backward(action.microbatch, grad, final=final)
    if grad_x is not None:
        _deliver(run, Op.B, action.stage - 1, action.microbatch, grad_x)


def _communicate(run: Run, step: Step) -> None:
    """Post a step's sends and receives together; see the module text for when each is waited for."""
    for work in run.sending:
        work.wait()
    sends, recvs = [], []
    for op, stage, index in step:
        forward = op in _TO_NEXT
        sending = op in (Op.SEND_F, Op.SEND_B)
        other = stage + (1 if forward == sending else -1)
        peer = run.plan.rank_of(other)
        consumer = (Op.F if forward else Op.B, other if sending else stage, index)
        if sending:
            sends.append((run.outbox.pop(consumer).contiguous(), peer))
        else:
            b, s = run.batches[index].tokens.shape
            x = torch.empty(s, b, run.stages[stage].width, dtype=run.ctx.dtype, device=run.ctx.device)
            recvs.append((x, peer))
            run.inbox[consumer] = x
    run.sending, received = post(sends, recvs, run.ctx.pipeline)
    for work in received:
        work.wait()
