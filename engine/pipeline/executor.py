"""Runs a checked plan, action by action: the plan that was proven is the plan that runs.

The messages of a step are posted together. A rank waits for a receive when it uses the tensor, and for a send before it
posts the next messages. Both waits come later than the zero-buffering model of `check` assumes, so there is no deadlock
that `check` did not see, and the sends of at most one step are kept alive.

A message of the plan carries the tensors of a boundary (engine.part), which travel as one message each, in order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from engine.batch import MicroBatch
from engine.distributed.collectives import Pending, gather_json, post
from engine.distributed.context import ParallelContext
from engine.errors import PlanError
from engine.part import Boundary, BoundaryTensor
from engine.pipeline.actions import COMMUNICATION, SENDS, Action, Op, Plan, Step
from engine.pipeline.stage import Links, Stage

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


@dataclass(frozen=True)
class Executed:
    """What this rank's stages returned, over the microbatches.

    losses: float64 [microbatches, b], zero unless the rank holds the last stage. sums: name -> float64 [microbatches],
    with the names of all stages of the pipeline, zero where this rank's stages return none.
    """

    losses: Tensor
    sums: dict[str, Tensor]


@dataclass
class Execution:
    """State of one execution of a plan on one rank.

    inbox: (Op.F or Op.B, stage, microbatch) -> tensors or gradients that this action consumes.
    outbox: the same key -> tensors to send to the neighbour whose action consumes them.
    """

    plan: Plan
    stages: Mapping[int, Stage]
    ctx: ParallelContext
    batches: Sequence[MicroBatch]
    done: Executed
    trace: ExecutionTrace | None
    inbox: dict[tuple[Op, int, int], tuple[Pending, ...]] = field(default_factory=dict)
    outbox: dict[tuple[Op, int, int], tuple[Tensor, ...]] = field(default_factory=dict)
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
    trace: ExecutionTrace | None = None,
) -> Executed:
    """Run this rank's program of the plan over its microbatches, on the context's device.

    The objective is the sum of all losses and named sums: every factor of it, such as 1 / counted tokens of the global
    batch or a loss scale, is in the weights and shares of the batches. A plan without backward runs under no_grad. The
    first execution with batches of new shapes is a collective of the pipeline ranks (`connect`).
    """
    if len(batches) != plan.microbatches:
        raise PlanError(
            "pipeline.wrong-microbatch-count",
            f"the plan is for {plan.microbatches} microbatches, {len(batches)} were given",
        )
    names = connect(plan, stages, ctx, batches)
    losses = torch.zeros(plan.microbatches, len(batches[0].tokens), dtype=torch.float64, device=ctx.device)
    run = Execution(
        plan, stages, ctx, batches, Executed(losses, {name: losses.new_zeros(len(losses)) for name in names}), trace
    )
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
    return run.done


def connect(
    plan: Plan, stages: Mapping[int, Stage], ctx: ParallelContext, batches: Sequence[MicroBatch]
) -> tuple[str, ...]:
    """Give each stage its boundaries, for all shapes of the batches; returns the names of all sums.

    No gradient goes back to stages that, with all those before them, have no trainable parameter. Collective over the
    pipeline ranks, for shapes that are new. The ranks of a pipeline have batches of equal shapes.
    """
    for batch in batches:
        if all(batch.shapes in stage.links for stage in stages.values()):
            continue
        mine = {number: stage.metadata(batch) for number, stage in stages.items()}
        ranks = gather_json(mine, ctx.pipeline, ctx.device)
        found = {int(number): metadata for rank in ranks for number, metadata in rank.items()}
        names = tuple(sorted({name for metadata in found.values() for name in metadata["sums"]}))
        trained = min((number for number, metadata in found.items() if metadata["trainable"]), default=plan.num_stages)
        boundaries = {
            number: tuple(
                BoundaryTensor(tuple(shape), getattr(torch, dtype), grad and trained < number)
                for shape, dtype, grad in metadata["boundary"]
            )
            for number, metadata in found.items()
        }
        if boundaries[0]:
            problem = "the part of stage 0 takes tensors, but there is no stage before it"
            raise PlanError("pipeline.boundary-mismatch", problem)
        for number, stage in stages.items():
            last = number == plan.num_stages - 1
            after = () if last else boundaries[number + 1]
            stage.links[batch.shapes] = Links(number, last, boundaries[number], after, names)
    return next(iter(stages.values())).links[batches[0].shapes].sums


def contributes_loss(plan: Plan, ctx: ParallelContext) -> bool:
    """Whether this rank contributes its losses to a sum over the world.

    On the last stage, one of the ranks that compute with the same tokens, and so have the same losses, contributes.
    """
    return ctx.same_tokens.rank == 0 and ctx.pipeline.rank == plan.rank_of(plan.num_stages - 1)


def local_totals(done: Executed, ctx: ParallelContext) -> Tensor:
    """This rank's part of the totals: float64 [1 + n], all losses, then each named sum; to be summed over the world.

    Ranks that compute with the same tokens have the same values, so only the first of them contributes.
    """
    mine = torch.stack([done.losses.sum(), *(values.sum() for values in done.sums.values())])
    return mine * float(ctx.same_tokens.rank == 0)


def _deliver(run: Execution, op: Op, stage: int, index: int, tensors: tuple[Tensor, ...]) -> None:
    """Pass results to the action (op, stage) that consumes them: directly if it is on this rank, else by sends."""
    if run.plan.rank_of(stage) == run.ctx.pipeline.rank:
        run.inbox[op, stage, index] = tuple(map(Pending, tensors))
    else:
        run.outbox[op, stage, index] = tensors


def _receive(run: Execution, op: Op, action: Action) -> tuple[Tensor, ...]:
    """Wait for the tensors that an action consumes."""
    return tuple(pending.wait() for pending in run.inbox.pop((op, action.stage, action.microbatch)))


def _forward(run: Execution, action: Action) -> None:
    stage, index = run.stages[action.stage], action.microbatch
    inputs = _receive(run, Op.F, action) if action.stage else ()
    with run.span(action):
        out = stage.forward(index, inputs, run.batches[index])
    for name, value in out.sums.items():
        run.done.sums[name][index] += value
    if out.losses is not None:
        run.done.losses[index] = out.losses
    else:
        _deliver(run, Op.F, action.stage + 1, index, out.tensors)


def _backward(run: Execution, action: Action, *, final: bool) -> None:
    """Run B, or I, which is B without the gradients of matrices."""
    stage = run.stages[action.stage]
    grads = () if action.stage == run.plan.num_stages - 1 else _receive(run, Op.B, action)
    with run.span(action):
        if action.op is Op.B:
            grads = stage.backward(action.microbatch, grads, final=final)
        else:
            grads = stage.input_backward(action.microbatch, grads)
    if action.stage:
        _deliver(run, Op.B, action.stage - 1, action.microbatch, grads)


def _communicate(run: Execution, step: Step) -> None:
    """Post a step's sends and receives together; the module docstring says when each is waited for.

    Where all parameters of the stages before are frozen, no gradient is computed or sent.
    """
    for sent in run.sending:
        sent.wait()
    sends, recvs, counts = [], [], {}
    for action in step:
        op, stage, index = action
        forward, peer = op in _TO_NEXT, run.plan.peer_of(action)
        if op in SENDS:
            consumer = (Op.F if forward else Op.B, stage + 1 if forward else stage - 1, index)
            sends += [(x.contiguous(), peer) for x in run.outbox.pop(consumer)]
        else:
            expected = _expected(run, stage, index, forward=forward)
            recvs += [(torch.empty(x.shape, dtype=x.dtype, device=run.ctx.device), peer) for x in expected]
            counts[Op.F if forward else Op.B, stage, index] = len(expected)
    run.sending, received = post(sends, recvs, run.ctx.pipeline)
    arrived = iter(received)
    run.inbox.update({key: tuple(islice(arrived, count)) for key, count in counts.items()})


def _expected(run: Execution, stage: int, index: int, *, forward: bool) -> Boundary:
    """The tensors that a stage receives: its boundary, or the gradients that the next stage gives back."""
    batch = run.batches[index]
    if forward:
        return run.stages[stage].links[batch.shapes].before
    return tuple(x for x in run.stages[stage].links[batch.shapes].after if x.grad)
