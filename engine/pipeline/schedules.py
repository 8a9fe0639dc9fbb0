"""Schedules: pure functions (ranks, chunks, microbatches) -> compute-only plan, and `build`, which makes one runnable.

To add one: write the function, add its entry to SCHEDULES. Communication, batching and REDUCE come from passes.py;
`build` has check.py prove the result, so a wrong schedule never reaches a rank.

Every schedule runs the backwards of a stage in the order of the microbatches. Gradients are summed in that order, so
a change of schedule changes no bit of the result.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from engine.errors import PlanError
from engine.pipeline.actions import Action, Op, Plan, Step
from engine.pipeline.check import check
from engine.pipeline.passes import complete

Schedule = Callable[[int, int, int], Plan]  # (ranks, chunks, microbatches): chunks = stages per rank


def gpipe(ranks: int, chunks: int, microbatches: int) -> Plan:
    """All forwards, then all backwards. The simplest, and it keeps all `microbatches` alive."""
    _require_one_chunk("gpipe", ranks, chunks, microbatches)
    programs = [_ops(Op.F, rank, range(microbatches)) + _ops(Op.B, rank, range(microbatches)) for rank in range(ranks)]
    return Plan("gpipe", microbatches, tuple(range(ranks)), tuple(programs))


def one_f_one_b(ranks: int, chunks: int, microbatches: int) -> Plan:
    """1F1B (PipeDream-flush): the bubble of GPipe, but rank r keeps at most ranks - r microbatches alive.

    Warm-up: as many forwards as there are ranks below, so that the first gradient comes back just when it is needed.
    Then one forward, one backward in turn, then the backwards that are left.
    """
    _require_one_chunk("1f1b", ranks, chunks, microbatches)
    programs = []
    for rank in range(ranks):
        warm_up = min(microbatches, ranks - rank - 1)
        program = _ops(Op.F, rank, range(warm_up))
        for done in range(microbatches - warm_up):
            program += _ops(Op.F, rank, [warm_up + done]) + _ops(Op.B, rank, [done])
        programs.append(program + _ops(Op.B, rank, range(microbatches - warm_up, microbatches)))
    return Plan("1f1b", microbatches, tuple(range(ranks)), tuple(programs))


def forward_only(ranks: int, chunks: int, microbatches: int) -> Plan:
    """Forwards without backwards, for evaluation."""
    _require_one_chunk("forward_only", ranks, chunks, microbatches)
    programs = tuple(_ops(Op.F, rank, range(microbatches)) for rank in range(ranks))
    return Plan("forward_only", microbatches, tuple(range(ranks)), programs, backward=False)


SCHEDULES: dict[str, Schedule] = {"gpipe": gpipe, "1f1b": one_f_one_b}  # what a training run can choose from


def build(name: str, ranks: int, chunks: int, microbatches: int) -> Plan:
    """The plan of schedule `name` (of SCHEDULES, or "forward_only"), with communication, proved and ready to run."""
    known = {**SCHEDULES, "forward_only": forward_only}
    schedule = known.get(name)
    if schedule is None:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)
        raise PlanError(f"unknown schedule {name!r}: did you mean {near[0]!r}? Known: {', '.join(known)}")
    plan = complete(schedule(ranks, chunks, microbatches))
    check(plan)
    return plan


def _ops(op: Op, stage: int, microbatches: Iterable[int]) -> tuple[Step, ...]:
    """One step of `op` on `stage` for each of the microbatches."""
    return tuple((Action(op, stage, microbatch),) for microbatch in microbatches)


def _require_one_chunk(name: str, ranks: int, chunks: int, microbatches: int) -> None:
    """Refuses sizes that a schedule with one stage per rank cannot have."""
    if ranks < 1 or microbatches < 1:
        raise PlanError(f"schedule {name!r} with ranks = {ranks}, microbatches = {microbatches}: both must be >= 1")
    if chunks != 1:
        raise PlanError(
            f"schedule {name!r} with chunks = {chunks}: it places exactly one stage on each rank. Set chunks to 1, or "
            f"choose a schedule for several chunks"
        )
