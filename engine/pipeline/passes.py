"""Passes: pure functions plan -> plan that turn a compute-only schedule into a plan that can be run.

`add_communication` runs the computations of all ranks in lockstep, one time slot each. It posts both ends of a message
at the end of the slot that produces it: on sender and receiver in the batch of the same slot. A batch waits only for
batches of the same slot, so every schedule whose computations can be ordered gets a plan without deadlock, even without
buffers. Posting each receive just before its use would be too late for schedules with several stages on a rank: the
last rank would wait in a send to the first, which waits for the last.

Schedules contain no communication. Passes prove nothing: `check.check` does, on the result.
"""

from __future__ import annotations

from dataclasses import replace

from engine.errors import PlanError
from engine.pipeline.actions import COMMUNICATION, Action, Op, Plan, Step, grid, partner_of

_BACKWARD_START = frozenset({Op.B, Op.I})  # uses the gradient of the stage's output, produces that of its input
_WEIGHT_GRADIENT = frozenset({Op.B, Op.W})  # adds to the gradients of the stage's weights


def complete(plan: Plan) -> Plan:
    """All passes in their order: a compute-only plan becomes one that can be checked and run."""
    plan = add_communication(plan)
    return add_reduce(plan) if plan.backward else plan


def compute_only(plan: Plan, microbatches: int | None = None) -> Plan:
    """A plan without communication and REDUCE, the input of the passes. microbatches: keep only the first ones."""
    kept = plan.microbatches if microbatches is None else microbatches

    def keep(step: Step) -> bool:
        return step[0].op not in COMMUNICATION and 0 <= step[0].microbatch < kept

    return replace(plan, microbatches=kept, programs=tuple(tuple(filter(keep, p)) for p in plan.programs))


def add_communication(plan: Plan) -> Plan:
    """Add SEND_F and RECV_F for each F, SEND_B and RECV_B for each B or I whose neighbour stage is on another rank.

    Stages on the same rank exchange no message. Raises PlanError if the computations of the ranks wait for each other
    in a cycle, or for a computation that is missing.
    """
    for rank, position, action in plan.walk():
        if action.op in COMMUNICATION or action.op is Op.REDUCE:
            raise PlanError(
                "pipeline.already-there",
                f"plan {plan.name!r} rank {rank} step {position}: {action} is already there; add_communication takes "
                f"a compute-only plan",
            )
    programs: list[list[Step]] = [[] for _ in plan.programs]
    cursor = [0] * plan.num_ranks
    made: set[tuple[bool, int, int]] = set()  # (is forward, stage, microbatch)
    left = sum(map(len, plan.programs))
    while left:
        slot = [
            (rank, program[at][0])
            for rank, (program, at) in enumerate(zip(plan.programs, cursor))
            if at < len(program) and all(need in made for need in _needs(plan, program[at][0]))
        ]
        if not slot:
            raise _stuck(plan, cursor, made)
        batches: dict[int, list[Action]] = {}
        for rank, action in slot:
            programs[rank].append((action,))
            cursor[rank] += 1
            made.add((action.op is Op.F, action.stage, action.microbatch))
            for send in _messages(plan, action):
                batches.setdefault(rank, []).append(send)
                batches.setdefault(plan.peer_of(send), []).append(partner_of(send))
        for rank, batch in batches.items():
            programs[rank].append(tuple(batch))
        left -= len(slot)
    return replace(plan, programs=tuple(map(tuple, programs)))


def _needs(plan: Plan, action: Action) -> list[tuple[bool, int, int]]:
    """(is forward, stage, microbatch) of the tensors an action needs, made on any rank. W follows its I on its rank."""
    op, stage, microbatch = action
    if op is Op.F:
        return [(True, stage - 1, microbatch)] if stage else []
    needs = [(True, stage, microbatch)]
    if op in _BACKWARD_START and stage + 1 < plan.num_stages:
        needs.append((False, stage + 1, microbatch))
    return needs


def _messages(plan: Plan, action: Action) -> list[Action]:
    """The send that follows a computation, if its neighbour exists and is on another rank."""
    op, stage, microbatch = action
    if op is Op.W:
        return []
    neighbour = stage + 1 if op is Op.F else stage - 1
    if not 0 <= neighbour < plan.num_stages or plan.rank_of(neighbour) == plan.rank_of(stage):
        return []
    return [Action(Op.SEND_F if op is Op.F else Op.SEND_B, stage, microbatch)]


def _stuck(plan: Plan, cursor: list[int], made: set[tuple[bool, int, int]]) -> PlanError:
    """The error for computations that cannot be ordered; it names the action that each rank waits for."""
    spots, lines = [], []
    for rank, (program, at) in enumerate(zip(plan.programs, cursor)):
        if at < len(program):
            forward, stage, microbatch = next(n for n in _needs(plan, program[at][0]) if n not in made)
            wanted = Action(Op.F if forward else Op.B, stage, microbatch)
            spots.append((rank, at))
            lines.append(f"  rank {rank} step {at} {program[at][0]} waits for {wanted} on rank {plan.rank_of(stage)}")
    rank, at = spots[0]
    problem = "the computations cannot be ordered: each rank waits for one that comes later or is missing"
    text = "\n".join([f"plan {plan.name!r} rank {rank} step {at}: {problem}", *lines, grid(plan, spots)])
    return PlanError("pipeline.not-orderable", text)


def add_reduce(plan: Plan) -> Plan:
    """Add one REDUCE for each stage, right after the last B or W of the stage.

    It comes before the communication that follows, so that the gradient reduction overlaps the wait for messages.
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
                "pipeline.already-there",
                f"plan {plan.name!r} rank {rank} step {position}: {action} is already there; add_reduce takes a plan "
                f"without REDUCE",
            )
    return replace(plan, programs=tuple(reduce(program) for program in plan.programs))
