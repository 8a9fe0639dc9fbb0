"""Runs a checked plan, action by action: the plan that was proven is the plan that runs.

The messages of a step are posted together. A rank waits for a receive when it uses the tensor, and for a send before it
posts the next messages. Both waits come later than the zero-buffering model of `check` assumes, so there is no deadlock
that `check` did not see, and the sends of at most one step are kept alive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.batch import MicroBatch
from engine.distributed.collectives import Pending, post
from engine.distributed.context import ParallelContext
from engine.errors import PlanError
from engine.pipeline.actions import COMMUNICATION, SENDS, Action, Op, Plan, Step
from engine.pipeline.stage import Stage

_TO_NEXT = (Op.SEND_F, Op.RECV_F)


class ExecutionTrace:
    """Start and end of each computation of an execution on this rank, in seconds of time.perf_counter.

    On a GPU the times come from CUDA events; `events` waits for the device.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self._spans: list[tuple[Action, Callable[[], float], Callable[[], float]]] = []
        if self.cuda:
            torch.cuda.synchronize(device)
            self._begin, self._zero = torch.cuda.Event(enable_timing=True), time.perf_counter()
            self._begin.record()

    def _now(self) -> Callable[[], float]:
        if not self.cuda:
            now = time.perf_counter()
            return lambda: now
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return lambda: self._zero + self._begin.elapsed_time(event) / 1000

    @contextmanager
    def span(self, action: Action) -> Iterator[None]:
        """Record start and end of the `with` block."""
        start = self._now()
        yield
        self._spans.append((action, start, self._now()))

    def events(self) -> list[tuple[Action, float, float]]:
        """(action, start, end) in program order."""
        if self.cuda:
            torch.cuda.synchronize()
        return [(action, start(), end()) for action, start, end in self._spans]


@dataclass
class Execution:
    """State of one execution of a plan on one rank.

    losses [microbatches, b]: weighted loss of each sample (float64), zero unless the rank holds the last stage.
    inbox: (Op.F or Op.B, stage, microbatch) -> activation or gradient that this action consumes.
    outbox: the same key -> tensor to send to the neighbour whose action consumes it.
    """

    plan: Plan
    stages: Mapping[int, Stage]
    ctx: ParallelContext
    batches: Sequence[MicroBatch]
    token_weight: float
    losses: Tensor
    trace: ExecutionTrace | None
    inbox: dict[tuple[Op, int, int], Pending] = field(default_factory=dict)
    outbox: dict[tuple[Op, int, int], Tensor] = field(default_factory=dict)
    sending: list[Pending] = field(default_factory=list)

    @contextmanager
    def span(self, action: Action) -> Iterator[None]:
        """Trace a computation if tracing is on."""
        if self.trace is None:
            yield
        else:
            with self.trace.span(action):
                yield


def execute(
    plan: Plan,
    stages: Mapping[int, Stage],
    ctx: ParallelContext,
    batches: Sequence[MicroBatch],
    token_weight: float,
    trace: ExecutionTrace | None = None,
) -> Tensor:
    """Run this rank's program of the plan over its microbatches; returns `Execution.losses`.

    token_weight: weight of every counted token's loss in the objective: loss scale / counted tokens of the global
    batch, which gives the mean loss times the scale.
    Activations between stages are [s, b, h] in the context's dtype (s: the local part under sequence parallelism). A
    plan without backward runs under no_grad.
    """
    if len(batches) != plan.microbatches:
        raise PlanError(
            "pipeline.wrong-microbatch-count",
            f"the plan is for {plan.microbatches} microbatches, {len(batches)} were given",
        )
    losses = torch.zeros(plan.microbatches, len(batches[0].tokens), dtype=torch.float64, device=ctx.device)
    run = Execution(plan, stages, ctx, batches, token_weight, losses, trace)
    program = plan.programs[ctx.pipeline.rank]
    final = {step[0].stage: step[0] for step in program if step[0].op in (Op.B, Op.W)}
    with torch.set_grad_enabled(plan.backward):
        for step in program:
            action = step[0]
            if action.op is Op.F:
                _forward(run, action)
            elif action.op in (Op.B, Op.I):
                _backward(run, action, final=action == final[action.stage])
            elif action.op is Op.W:
                with run.span(action):
                    stages[action.stage].weight_backward(action.microbatch, final=action == final[action.stage])
            elif action.op in COMMUNICATION:
                _communicate(run, step)
            else:
                buckets = stages[action.stage].buckets
                assert buckets is not None, "a plan with backward runs on stages with buckets"
                buckets.reduce()
    for sent in run.sending:
        sent.wait()
    return losses


def contributes_loss(plan: Plan, ctx: ParallelContext) -> bool:
    """Whether this rank contributes its losses to a sum over the world: exactly one rank per data rank does.

    All tensor ranks of the last stage hold the same losses, so only tensor rank 0 contributes.
    """
    return ctx.tensor.rank == 0 and ctx.pipeline.rank == plan.rank_of(plan.num_stages - 1)


def _deliver(run: Execution, op: Op, stage: int, index: int, x: Tensor) -> None:
    """Pass a result to the action (op, stage) that consumes it: directly if it is on this rank, else by a send."""
    if run.plan.rank_of(stage) == run.ctx.pipeline.rank:
        run.inbox[op, stage, index] = Pending(x)
    else:
        run.outbox[op, stage, index] = x


def _forward(run: Execution, action: Action) -> None:
    stage = run.stages[action.stage]
    x = None if stage.first else run.inbox.pop((Op.F, action.stage, action.microbatch)).wait()
    with run.span(action):
        out = stage.forward(action.microbatch, x, run.batches[action.microbatch], run.token_weight)
    if stage.last:
        run.losses[action.microbatch] = out
    else:
        _deliver(run, Op.F, action.stage + 1, action.microbatch, out)


def _backward(run: Execution, action: Action, *, final: bool) -> None:
    """Run B, or I, which is B without the gradients of matrices."""
    stage = run.stages[action.stage]
    grad = None
    if stage.has_backward and not stage.last:
        grad = run.inbox.pop((Op.B, action.stage, action.microbatch)).wait()
    with run.span(action):
        if action.op is Op.B:
            grad_x = stage.backward(action.microbatch, grad, final=final)
        else:
            grad_x = stage.input_backward(action.microbatch, grad)
    if grad_x is not None:
        _deliver(run, Op.B, action.stage - 1, action.microbatch, grad_x)


def _communicate(run: Execution, step: Step) -> None:
    """Post a step's sends and receives together; the module docstring says when each is waited for.

    Where all parameters of a stage and of those before it are frozen, no gradient is computed or sent to it.
    """
    for sent in run.sending:
        sent.wait()
    sends, recvs, keys = [], [], []
    for action in step:
        op, stage, index = action
        forward, peer = op in _TO_NEXT, run.plan.peer_of(action)
        if not forward and not (run.stages[stage].input_grad if op in SENDS else run.stages[stage].has_backward):
            continue
        if op in SENDS:
            consumer = (Op.F if forward else Op.B, stage + 1 if forward else stage - 1, index)
            sends.append((run.outbox.pop(consumer).contiguous(), peer))
        else:
            b, s = run.batches[index].tokens.shape
            shape = (s // run.ctx.sequence.size, b, run.stages[stage].width)
            recvs.append((torch.empty(shape, dtype=run.ctx.dtype, device=run.ctx.device), peer))
            keys.append((Op.F if forward else Op.B, stage, index))
    run.sending, received = post(sends, recvs, run.ctx.pipeline) if sends or recvs else ([], [])
    run.inbox.update(zip(keys, received))
