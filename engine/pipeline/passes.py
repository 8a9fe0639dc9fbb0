"""Passes: pure functions plan -> plan that turn a compute-only schedule into a plan that can be run.

Order, and why:

1. `add_communication` puts every receive right before, and every send right after, the computation it serves.
2. `batch_communication` joins what then stands side by side into one step that is posted together. Without it 1F1B
   deadlocks under zero buffering: rank r waits in SEND_F for r+1, which waits in SEND_B for r.
3. `add_reduce` comes last: a REDUCE between a send and a receive would split their batch and bring the deadlock back.

Known limit: a receive right before its use is late for interleaved 1F1B (chunks > 1, microbatches > ranks), where the
last rank would wait in a send to the first while that waits for it; `check` refuses such a plan. Those schedules need
their receives placed where the sender makes the message.

A schedule writes none of this. No pass proves anything: `check.check` does, on the result.
"""

from __future__ import annotations

from dataclasses import replace

from engine.errors import PlanError
from engine.pipeline.actions import COMMUNICATION, Action, Op, Plan, Step, is_communication

_BACKWARD_START = frozenset({Op.B, Op.I})  # needs the gradient of the stage's output, makes that of its input
_WEIGHT_GRADIENT = frozenset({Op.B, Op.W})  # adds to the gradients of the stage's weights


def complete(plan: Plan) -> Plan:
    """All passes in their order: a compute-only plan becomes one that can be checked and run."""
    return add_reduce(batch_communication(add_communication(plan)))


def add_communication(plan: Plan) -> Plan:
    """Adds RECV_F before and SEND_F after each F, RECV_B before and SEND_B after each B or I, each as its own step.

    Only where the neighbouring stage is on another rank: between stages on the same rank the tensor just stays there.
    """
    for rank, position, action in plan.walk():
        if action.op in COMMUNICATION:
            raise PlanError(
                f"plan {plan.name!r} rank {rank} step {position}: {action} is already there; add_communication takes "
                f"a compute-only plan"
            )

    def surround(step: Step) -> list[Step]:
        op, stage, microbatch = step[0]
        if op is Op.F:
            receive, send = Op.RECV_F, Op.SEND_F
            source, target = stage - 1, stage + 1
        elif op in _BACKWARD_START:
            receive, send = Op.RECV_B, Op.SEND_B
            source, target = stage + 1, stage - 1
        else:
            return [step]
        before: list[Step] = [(Action(receive, stage, microbatch),)] if _is_remote(plan, stage, source) else []
        after: list[Step] = [(Action(send, stage, microbatch),)] if _is_remote(plan, stage, target) else []
        return [*before, step, *after]

    programs = tuple(tuple(new for step in program for new in surround(step)) for program in plan.programs)
    return replace(plan, programs=programs)


def _is_remote(plan: Plan, stage: int, neighbour: int) -> bool:
    """Whether `neighbour` exists and is on another rank than `stage`."""
    return 0 <= neighbour < plan.num_stages and plan.rank_of(neighbour) != plan.rank_of(stage)


def batch_communication(plan: Plan) -> Plan:
    """Joins communication steps that follow each other directly into one step, in the order in which they stand."""

    def join(program: tuple[Step, ...]) -> tuple[Step, ...]:
        steps: list[Step] = []
        for step in program:
            if steps and is_communication(step) and is_communication(steps[-1]):
                steps[-1] += step
            else:
                steps.append(step)
        return tuple(steps)

    return replace(plan, programs=tuple(join(program) for program in plan.programs))


def add_reduce(plan: Plan) -> Plan:
    """Adds one REDUCE for each stage, right after the last B or W of the stage.

    Directly after it, before the communication that follows, so that the sum of the gradients overlaps the waiting.
    """

    def reduce(program: tuple[Step, ...]) -> tuple[Step, ...]:
        last = {step[0].stage: position for position, step in enumerate(program) if step[0].op in _WEIGHT_GRADIENT}
        steps: list[Step] = []
        for position, step in enumerate(program):
            steps.append(step)
            if last.get(step[0].stage) == position:
                steps.append((Action(Op.REDUCE, step[0].stage),))
        return tuple(steps)

    for rank, position, action in plan.walk():
        if action.op is Op.REDUCE:
            raise PlanError(
                f"plan {plan.name!r} rank {rank} step {position}: {action} is already there; add_reduce takes a plan "
                f"without REDUCE"
            )
    return replace(plan, programs=tuple(reduce(program) for program in plan.programs))
