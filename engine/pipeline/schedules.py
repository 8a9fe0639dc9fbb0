"""Schedules: pure functions (ranks, chunks, microbatches) -> compute-only plan, and `build`, which makes one runnable.

To add one: write the function, add its entry to SCHEDULES. Communication, batching and REDUCE come from passes.py;
`build` checks the result with check.py, so a wrong schedule never reaches a rank.

Every schedule runs the backwards of a stage (its W where they are split) in the order of the microbatches. Gradients
are summed in that order, so the result is bitwise the same under every schedule.

No schedule needs a minimum number of microbatches. A pattern that needs more is generated for more, and the surplus
microbatches are dropped. The rest stays in order, because actions of different microbatches are independent.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from engine.errors import PlanError
from engine.pipeline.actions import COMMUNICATION, Action, Op, Plan, Step, parse_plan
from engine.pipeline.check import check
from engine.pipeline.passes import complete, compute_only
from engine.pipeline.torch_csv import read_torch_csv

Placement = tuple[int, ...]  # stage -> rank


def looped(ranks: int, chunks: int) -> Placement:
    """Stage s on rank s mod ranks: the pipeline passes all ranks `chunks` times."""
    return tuple(range(ranks)) * chunks


def v_shaped(ranks: int, chunks: int) -> Placement:
    """Down the ranks and back up: rank 0 holds the first and the last stage."""
    return (*range(ranks), *reversed(range(ranks)))


def gpipe(ranks: int, chunks: int, microbatches: int) -> Plan:
    """All forwards, then all backwards (Huang et al. 2019). The simplest; it keeps all `microbatches` alive."""
    programs = [_ops(Op.F, rank, range(microbatches)) + _ops(Op.B, rank, range(microbatches)) for rank in range(ranks)]
    return Plan("gpipe", microbatches, looped(ranks, chunks), tuple(programs))


def one_f_one_b(ranks: int, chunks: int, microbatches: int) -> Plan:
    """1F1B (PipeDream-flush): the bubble of GPipe, but rank r keeps at most ranks - r microbatches alive.

    Warm-up: one forward per later rank, so that the first gradient arrives just when it is needed. Then one forward and
    one backward in turn, then the remaining backwards.
    """
    programs = []
    for rank in range(ranks):
        forwards, backwards = _ops(Op.F, rank, range(microbatches)), _ops(Op.B, rank, range(microbatches))
        programs.append(_alternate(forwards, backwards, warm_up=ranks - rank - 1))
    return Plan("1f1b", microbatches, looped(ranks, chunks), tuple(programs))


def interleaved(ranks: int, chunks: int, microbatches: int) -> Plan:
    """Interleaved 1F1B (Narayanan et al. 2021): 1 / chunks of the bubble of 1F1B, for chunks times the messages.

    Microbatches run in groups of `ranks`: a group through the first chunk of a rank, then the same group through the
    second, ...; backwards take the chunks in the opposite order. Warm-up: all chunks but the last for one group, and
    two forwards for each later rank. If `ranks` does not divide the microbatches, groups are slightly larger, as equal
    as possible: the bubble does not change, but the larger groups keep more activations.
    """
    groups = max(1, microbatches // ranks)
    bounds = [group * microbatches // groups for group in range(groups + 1)]
    order = [(chunk, m) for begin, end in pairwise(bounds) for chunk in range(chunks) for m in range(begin, end)]
    largest = max(end - begin for begin, end in pairwise(bounds))
    programs = []
    for rank in range(ranks):
        forwards = tuple((Action(Op.F, chunk * ranks + rank, m),) for chunk, m in order)
        backwards = tuple((Action(Op.B, (chunks - 1 - chunk) * ranks + rank, m),) for chunk, m in order)
        programs.append(_alternate(forwards, backwards, warm_up=2 * (ranks - rank - 1) + (chunks - 1) * largest))
    return Plan("interleaved", microbatches, looped(ranks, chunks), tuple(programs))


def zb_h1(ranks: int, chunks: int, microbatches: int) -> Plan:
    """ZB-H1 (Qi et al. 2023): 1F1B with the backward split, a third of its bubble when F, I and W cost the same.

    The previous rank waits for I, no rank for W: rank r defers up to r weight gradients to times when it would be idle.
    Rank r holds ranks - r microbatches for their backward and r for their W, so no rank holds more than 1F1B.
    """
    programs = []
    for rank in range(ranks):
        forward, done, weights = min(microbatches, ranks - rank - 1), 0, 0
        program = list(_ops(Op.F, rank, range(forward)))
        while weights < microbatches:
            if forward < microbatches:
                program += _ops(Op.F, rank, [forward])
                forward += 1
            if done < microbatches:
                program += _ops(Op.I, rank, [done])
                done += 1
            if done - weights > rank or done == microbatches:
                program += _ops(Op.W, rank, [weights])
                weights += 1
        programs.append(tuple(program))
    return Plan("zb-h1", microbatches, looped(ranks, chunks), tuple(programs))


def zb_v(ranks: int, chunks: int, microbatches: int) -> Plan:
    """ZB-V (Qi et al. 2024): two chunks on a V, no bubble when F, I and W cost the same, the memory of 1F1B.

    Written as phases of rank r: F and I on its downward stage of the V, f and i on its upward stage, W on either.
    Warm-up: downward forwards until the first microbatch reaches the upward stage; then upward and downward in turn;
    then upward forwards with their whole backward. Steady: one of each. Cool-down: I of both halves while others wait,
    W last.
    """
    full = max(microbatches, 2 * ranks - 1)
    programs = []
    for rank in range(ranks):
        below = ranks - rank
        phases = [("F", 2 * below - 1), ("f F", rank), ("f i W", below), ("F I W f i W", full - 2 * below - rank + 1)]
        phases += [("I W f i W", below - 1), ("I i", rank), ("I W", below)]
        programs.append(_phases(phases, rank, ranks))
    return compute_only(Plan("zb-v", full, v_shaped(ranks, chunks), tuple(programs)), microbatches)


def dualpipe_v(ranks: int, chunks: int, microbatches: int) -> Plan:
    """DualPipeV (DeepSeek 2025): two chunks on a V, forwards of one half of the V paired with backwards of the other.

    Paired F and B are adjacent, so that communication inside one can overlap computation of the other. Backwards are
    split only in the warm-up and the cool-down, where W fills the bubble.
    """
    full = max(microbatches, 2 * ranks)
    programs = []
    for rank in range(ranks):
        above, below = rank + 1, ranks - rank - 1
        phases = [("F", 2 * below), ("F f", above), ("i W f", below), ("F b f B", full - 2 * ranks + above)]
        phases += [("b f B", below), ("b B", above // 2), ("b I", above % 2), ("i I", above // 2), ("W I", below)]
        programs.append(_phases(phases, rank, ranks))
    return compute_only(Plan("dualpipe-v", full, v_shaped(ranks, chunks), tuple(programs)), microbatches)


@dataclass(frozen=True)
class Schedule:
    """A named schedule. make: (ranks, chunks, microbatches) -> compute-only plan.

    chunks: number of stages per rank (None: any). placement: (ranks, chunks) -> rank of each stage.
    """

    make: Callable[[int, int, int], Plan]
    placement: Callable[[int, int], Placement]
    chunks: int | None


SCHEDULES: dict[str, Schedule] = {
    "gpipe": Schedule(gpipe, looped, 1),
    "1f1b": Schedule(one_f_one_b, looped, 1),
    "interleaved": Schedule(interleaved, looped, None),
    "zb-h1": Schedule(zb_h1, looped, 1),
    "zb-v": Schedule(zb_v, v_shaped, 2),
    "dualpipe-v": Schedule(dualpipe_v, v_shaped, 2),
}


def find_schedule(name: str) -> Schedule:
    """The schedule of that name; PlanError that suggests the nearest name if there is none."""
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name.lower(), SCHEDULES, n=1, cutoff=0.0)
        raise PlanError(
            "pipeline.unknown-schedule",
            f"unknown schedule {name!r}: did you mean {near[0]!r}? Known: {', '.join(SCHEDULES)}",
        )
    return SCHEDULES[name]


def build(name: str, ranks: int, chunks: int, microbatches: int) -> Plan:
    """The plan of schedule `name`, with communication, checked and ready to run."""
    schedule = find_schedule(name)
    if min(ranks, chunks, microbatches) < 1:
        raise PlanError(
            "pipeline.degree-below-one",
            f"schedule {name!r}: ranks {ranks}, chunks {chunks}, microbatches {microbatches} must be >= 1",
        )
    if schedule.chunks is not None and chunks != schedule.chunks:
        raise PlanError(
            "pipeline.chunks-do-not-fit",
            f"schedule {name!r} with chunks = {chunks}: it places {schedule.chunks} stage(s) on each rank. Set chunks "
            f"to {schedule.chunks}, or choose interleaved, which allows any number",
        )
    return complete_and_check(schedule.make(ranks, chunks, microbatches))


def load_plan(path: Path) -> Plan:
    """Load a plan from a torch CSV (.csv) or from the engine's text form, and check it.

    Messages in the file are kept; if there are none, they are added. Raises PlanError that names the file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            "pipeline.plan-not-readable",
            f"{path}: cannot be read ({error}); give a plan written by `engine schedule --save`, or a torch .csv",
        ) from None
    try:
        plan = read_torch_csv(text, path.stem) if path.suffix == ".csv" else parse_plan(text)
        if not any(action.op in COMMUNICATION for _, _, action in plan.walk()):
            return complete_and_check(compute_only(plan))
        check(plan)
        return plan
    except PlanError as error:
        raise PlanError("pipeline.plan-file-not-valid", f"{path}: {error}") from None


def forward_only(like: Plan, microbatches: int) -> Plan:
    """Forward-only plan on the placement of another plan, for evaluation, checked and ready to run.

    Microbatches run in groups of `num_ranks` through the stages of each rank, so at most one group waits for a stage.
    """
    programs = tuple(
        tuple(
            (Action(Op.F, stage, m),)
            for group in range(0, microbatches, like.num_ranks)
            for stage in like.stages_of(rank)
            for m in range(group, min(group + like.num_ranks, microbatches))
        )
        for rank in range(like.num_ranks)
    )
    return complete_and_check(Plan("forward_only", microbatches, like.placement, programs, backward=False))


def first_microbatch(like: Plan) -> Plan:
    """The plan for its first microbatch only, without REDUCE: for replaying microbatches one by one."""
    plan = complete(compute_only(like, 1))
    programs = tuple(tuple(step for step in program if step[0].op is not Op.REDUCE) for program in plan.programs)
    return replace(plan, programs=programs)


def complete_and_check(plan: Plan) -> Plan:
    """Add communication and REDUCE to a compute-only plan, and check the result (PlanError if it is wrong)."""
    plan = complete(plan)
    check(plan)
    return plan


def _ops(op: Op, stage: int, microbatches: Iterable[int]) -> tuple[Step, ...]:
    """One step of `op` on `stage` for each of the microbatches."""
    return tuple((Action(op, stage, microbatch),) for microbatch in microbatches)


def _alternate(forwards: tuple[Step, ...], backwards: tuple[Step, ...], *, warm_up: int) -> tuple[Step, ...]:
    """`warm_up` forwards, then one forward and one backward in turn, then the remaining backwards."""
    warm_up = min(warm_up, len(forwards))
    pairs = (step for pair in zip(forwards[warm_up:], backwards) for step in pair)
    return (*forwards[:warm_up], *pairs, *backwards[len(forwards) - warm_up :])


def _phases(phases: list[tuple[str, int]], rank: int, ranks: int) -> tuple[Step, ...]:
    """The program of a rank on a V, from (letters, times): F I B on its downward stage, f i b on its upward stage.

    Each letter takes the next microbatch of its kind; W takes the oldest weight gradient that an I has deferred.
    """
    stages = {True: rank, False: 2 * ranks - 1 - rank}
    forwards, backwards = {True: 0, False: 0}, {True: 0, False: 0}
    waiting: list[Action] = []
    steps: list[Step] = []
    for letters, times in phases:
        for letter in letters.split() * max(0, times):
            op, down = Op(letter.upper()), letter.isupper()
            if op is Op.W:
                steps.append((waiting.pop(0),))
                continue
            count = forwards if op is Op.F else backwards
            steps.append((Action(op, stages[down], count[down]),))
            if op is Op.I:
                waiting.append(Action(Op.W, stages[down], count[down]))
            count[down] += 1
    return (*steps, *((weight,) for weight in waiting))
