"""A pipeline schedule as data: actions, steps, plans, and their text form.

Goal: one list is generated, checked, drawn, simulated and run; there is no second copy of any schedule.

An `Action` is one operation of a rank. A `Step` is one entry of a rank's program: a single computation, a single
REDUCE, or one or more communication actions that are posted together (one batch_isend_irecv) and waited for together. A
`Plan` holds the steps of every rank in program order, and the placement of stages on ranks. A rank may hold any number
of stages (chunks) in any placement, looped and V-shaped included, but each stage is on exactly one rank.

Text form, one header and one line per rank; `parse_plan(str(plan)) == plan`:

    plan 1f1b microbatches=1 placement=0,1 backward=yes
    rank 0: 0F0 (0SEND_F0;0RECV_B0) 0B0 0REDUCE
    rank 1: 1RECV_F0 1F0 1B0 1REDUCE 1SEND_B0

Invariant: every Plan object is well-formed (each stage, rank and microbatch it names exists; each step is a valid
combination of actions). `check.check` proves the rest: complete, in order, matched, free of deadlock.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from engine.errors import PlanError


class Op(StrEnum):
    """Kind of action. B is the whole backward; I and W are its input-gradient and weight-gradient halves."""

    F = "F"
    B = "B"
    I = "I"  # noqa: E741 - the literature's letter
    W = "W"
    SEND_F = "SEND_F"  # sends the output of `stage` to stage + 1
    RECV_F = "RECV_F"  # receives the input of `stage` from stage - 1
    SEND_B = "SEND_B"  # sends the gradient of the input of `stage` to stage - 1
    RECV_B = "RECV_B"  # receives the gradient of the output of `stage` from stage + 1
    REDUCE = "REDUCE"  # the gradients of `stage` are complete on this rank: start their reduction over data ranks


SENDS = frozenset({Op.SEND_F, Op.SEND_B})
RECEIVES = frozenset({Op.RECV_F, Op.RECV_B})
COMMUNICATION = SENDS | RECEIVES

# op -> (op at the other end, its stage relative to this one)
_PARTNER = {
    Op.SEND_F: (Op.RECV_F, +1),
    Op.RECV_F: (Op.SEND_F, -1),
    Op.SEND_B: (Op.RECV_B, -1),
    Op.RECV_B: (Op.SEND_B, +1),
}


class Action(NamedTuple):
    """One operation on one stage and one microbatch; `microbatch` is -1 for REDUCE, which concerns all of them."""

    op: Op
    stage: int
    microbatch: int = -1

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.microbatch if self.microbatch >= 0 else ''}"


Step = tuple[Action, ...]

# At most nine digits: no plan needs more, and int() raises a ValueError for numbers of thousands of digits.
_NUMBER = "(0|[1-9][0-9]{0,8})"
_ACTION = re.compile(f"{_NUMBER}(SEND_F|RECV_F|SEND_B|RECV_B|REDUCE|F|B|I|W){_NUMBER}?")
_HEADER = re.compile(rf"plan (\S+) microbatches={_NUMBER} placement=([0-9]{{1,9}}(?:,[0-9]{{1,9}})*) backward=(yes|no)")


def parse_action(text: str) -> Action:
    """The action that prints as `text`, such as `2F0`, `0SEND_F1` or `3REDUCE`."""
    found = _ACTION.fullmatch(text)
    # Exactly one of "is REDUCE" and "names a microbatch" holds.
    if found is None or (found[2] == Op.REDUCE) == (found[3] is not None):
        raise PlanError(
            "pipeline.action-not-valid",
            f"{text!r} is not an action: expected <stage><op><microbatch> with op one of "
            f"{', '.join(op for op in Op if op is not Op.REDUCE)}, or <stage>REDUCE; "
            "for example 2F0, 0SEND_F1, 3REDUCE",
        )
    return Action(Op(found[2]), int(found[1]), int(found[3]) if found[3] is not None else -1)


def partner_of(action: Action) -> Action:
    """The action at the other end of a communication action: a send's receive, a receive's send."""
    op, offset = _PARTNER[action.op]
    return Action(op, action.stage + offset, action.microbatch)


def format_step(step: Step) -> str:
    """`2F0` for one action, `(0SEND_F1;0RECV_B0)` for actions that are posted together."""
    return str(step[0]) if len(step) == 1 else f"({';'.join(map(str, step))})"


def parse_step(text: str) -> Step:
    """The step that prints as `text`."""
    inner = text[1:-1] if text.startswith("(") and text.endswith(")") else text
    return tuple(parse_action(part) for part in inner.split(";"))


@dataclass(frozen=True)
class Plan:
    """The programs of all ranks of one pipeline for one optimizer step.

    name: the schedule it comes from, one word.  microbatches: their number.  placement: stage -> rank.
    programs: for each rank its steps in order.  backward: False for evaluation, which runs forwards only.
    """

    name: str
    microbatches: int
    placement: tuple[int, ...]
    programs: tuple[tuple[Step, ...], ...]
    backward: bool = True

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\S+", self.name):
            raise PlanError(
                "pipeline.plan-shape-wrong", f"plan name {self.name!r} must be one word: it is a field of the text form"
            )
        if self.microbatches < 1:
            raise PlanError(
                "pipeline.plan-shape-wrong",
                f"plan {self.name!r} has microbatches = {self.microbatches}; at least 1 is needed",
            )
        if set(self.placement) != set(range(self.num_ranks)) or not self.placement:
            raise PlanError(
                "pipeline.plan-shape-wrong",
                f"plan {self.name!r} has placement {self.placement} for {self.num_ranks} programs: every stage must be "
                f"on a rank that has a program, and every rank must hold a stage",
            )
        for rank, program in enumerate(self.programs):
            for position, step in enumerate(program):
                problem = self._step_problem(step)
                if problem:
                    shown = format_step(step) if step else "()"
                    raise PlanError(
                        "pipeline.step-not-valid", f"plan {self.name!r} rank {rank} step {position} {shown}: {problem}"
                    )

    def _step_problem(self, step: Step) -> str | None:
        """Why `step` is not valid in a plan of this shape, or None."""
        if not step:
            return "a step holds at least one action; remove the empty one"
        if len(step) > 1 and any(action.op not in COMMUNICATION for action in step):
            return "only communication actions can be posted together; give the others a step each"
        num_stages, microbatches = len(self.placement), self.microbatches
        for op, stage, microbatch in step:
            if not 0 <= stage < num_stages:
                return f"stage {stage} is outside the {num_stages} stages"
            if op is Op.REDUCE:
                if microbatch != -1:
                    return "REDUCE concerns all microbatches and names none"
            elif not 0 <= microbatch < microbatches:
                return f"microbatch {microbatch} is outside the {microbatches} microbatches"
            elif op in _PARTNER and not 0 <= stage + _PARTNER[op][1] < num_stages:
                return f"{stage}{op}{microbatch} has no partner: stage {stage} is the end of the pipeline on that side"
        return None

    @property
    def num_ranks(self) -> int:
        return len(self.programs)

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    def rank_of(self, stage: int) -> int:
        """The rank that holds `stage`."""
        return self.placement[stage]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages (chunks) on `rank`, in pipeline order."""
        return tuple(stage for stage, holder in enumerate(self.placement) if holder == rank)

    def peer_of(self, action: Action) -> int:
        """The rank at the other end of a communication action."""
        return self.placement[action.stage + _PARTNER[action.op][1]]

    def walk(self) -> Iterator[tuple[int, int, Action]]:
        """Every action as (rank, position of its step, action), rank by rank in program order."""
        for rank, program in enumerate(self.programs):
            for position, step in enumerate(program):
                for action in step:
                    yield rank, position, action

    def __str__(self) -> str:
        placement = ",".join(map(str, self.placement))
        backward = "yes" if self.backward else "no"
        header = f"plan {self.name} microbatches={self.microbatches} placement={placement} backward={backward}"
        lines = (" ".join([f"rank {rank}:", *map(format_step, program)]) for rank, program in enumerate(self.programs))
        return "\n".join([header, *lines])


def parse_plan(text: str) -> Plan:
    """The plan that prints as `text`. Blank lines and the amount of space between steps do not matter."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    header = _HEADER.fullmatch(lines[0]) if lines else None
    if header is None:
        raise PlanError(
            "pipeline.plan-text-not-valid",
            f"{lines[0] if lines else ''!r} is not the header of a plan: expected "
            f"'plan <name> microbatches=<n> placement=<rank>,<rank>,... backward=yes|no'",
        )
    programs = []
    for rank, line in enumerate(lines[1:]):
        label = f"rank {rank}:"
        if not line.startswith(label):
            raise PlanError(
                "pipeline.plan-text-not-valid",
                f"line {line!r} of a plan should start with {label!r}: one line per rank, in order",
            )
        programs.append(tuple(parse_step(word) for word in line.removeprefix(label).split()))
    placement = tuple(int(rank) for rank in header[3].split(","))
    return Plan(header[1], int(header[2]), placement, tuple(programs), backward=header[4] == "yes")


def grid(plan: Plan, marks: Sequence[tuple[int, int]] = (), span: int = 4, limit: int = 16) -> str:
    """The programs as a table for error messages: a row per rank, a column per step, each (rank, step) mark in >...<.

    Shows up to `span` columns and ranks on each side of the marks, and at most `limit` of either, so that the message
    stays readable for large plans. A column is a position in the program, not a time.
    """
    longest = max(len(program) for program in plan.programs)
    ranks = _window([rank for rank, _ in marks], plan.num_ranks, span, limit)
    # A mark may be one past the end of a program, where an action is missing.
    steps = _window([step for _, step in marks], max([longest, *(step + 1 for _, step in marks)]), span, limit)
    table = [["step", *map(str, steps)]]
    for rank in ranks:
        program, row = plan.programs[rank], [f"rank {rank}"]
        for step in steps:
            cell = format_step(program[step]) if step < len(program) else ""
            row.append(f">{cell}<" if (rank, step) in marks else cell)
        table.append(row)
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    if len(ranks) < plan.num_ranks or steps.start > 0 or steps.stop < longest:
        lines.append(f"(part of {plan.num_ranks} ranks x {longest} steps)")
    return "\n".join(lines)


def _window(marks: Sequence[int], length: int, span: int, limit: int) -> range:
    """The indices of 0..length-1 to show around `marks`."""
    start = max(0, min(marks, default=0) - span)
    stop = min(length, (max(marks) + span + 1) if marks else length)
    return range(start, min(stop, start + limit))
