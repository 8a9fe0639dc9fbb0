"""Reads schedule files of torch.distributed.pipelining (`_dump_csv`) into plans that `check` can prove.

One row per rank, in order; the cells of a row are the actions of the rank in program order, empty cells are idle time:

    0F0,0F1,,0B0,,0B1
    ,1F0,1B0,1F1,1B1

torch writes two kinds of files. A file without messages (compute_only) gets them from the engine's passes. A file with
SEND and RECV cells (compute_comms) is read unchanged, each message as a separate step; torch does not check such files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from engine.errors import PlanError
from engine.pipeline.actions import COMMUNICATION, Action, Op, Plan, Step, parse_action
from engine.pipeline.passes import add_reduce, complete, compute_only

_OVERLAP = re.compile(r"\((.*)\)OVERLAP_F_B")
_WEIGHTS = re.compile(r"[0-9]+(UNSHARD|RESHARD)")
_FORWARD = (Op.F, Op.SEND_F, Op.RECV_F)


class _Cell(NamedTuple):
    """An action and its cell in the file."""

    row: int
    column: int
    text: str
    action: Action


def read_torch_csv(text: str, name: str) -> Plan:
    """The plan of a schedule file, with communication and REDUCE, not yet checked. Raises PlanError for a bad cell.

    A stage is on the rank that has its F cells. UNSHARD and RESHARD are dropped: here stages hold their weights. The
    parts of an OVERLAP_F_B cell run one after another. REDUCE_GRAD becomes REDUCE; a file without any gets them.
    """
    rows = [line.split(",") for line in text.rstrip().splitlines()]
    cells = list(_cells(rows, name))
    if not cells:
        raise PlanError(
            "pipeline.csv-empty",
            f"torch CSV {name!r} has no actions: expected one row per rank with cells such as 2F0 or 0B1",
        )
    programs: list[list[Step]] = [[] for _ in rows]
    for cell in cells:
        programs[cell.row].append((cell.action,))
    plan = Plan(
        name,
        microbatches=1 + max(cell.action.microbatch for cell in cells),
        placement=_placement(cells, name),
        programs=tuple(map(tuple, programs)),
        backward=any(cell.action.op not in _FORWARD for cell in cells),
    )
    ops = {cell.action.op for cell in cells}
    if not ops & COMMUNICATION:
        return complete(compute_only(plan))
    return add_reduce(plan) if plan.backward and Op.REDUCE not in ops else plan


def _cells(rows: list[list[str]], name: str) -> Iterator[_Cell]:
    """Every action of the file that the engine has, row by row."""
    for row, words in enumerate(rows):
        for column, word in enumerate(map(str.strip, words)):
            overlap = _OVERLAP.fullmatch(word)
            for part in overlap[1].split(";") if overlap else [word]:
                if _WEIGHTS.fullmatch(part) or not word:
                    continue
                try:
                    action = parse_action(part.strip().replace("REDUCE_GRAD", "REDUCE"))
                except PlanError as error:
                    raise _cell_error(name, _Cell(row, column, word, Action(Op.F, 0)), str(error)) from None
                yield _Cell(row, column, word, action)


def _placement(cells: list[_Cell], name: str) -> tuple[int, ...]:
    """The rank of each stage: the row with its F cells, which must be a single one."""
    forwards: dict[int, _Cell] = {}
    for cell in cells:
        op, stage, _ = cell.action
        if op is Op.F and forwards.setdefault(stage, cell).row != cell.row:
            first = forwards[stage]
            problem = f"stage {stage} is already on rank {first.row} ({first.text!r}), and a stage is on one rank only"
            raise _cell_error(name, cell, problem)
    for cell in cells:
        # Stages are numbered without gaps, so the previous one must exist too.
        for stage in (cell.action.stage, cell.action.stage - 1):
            if stage >= 0 and stage not in forwards:
                raise _cell_error(name, cell, f"no row has an F of stage {stage}, so there is no rank to place it on")
    return tuple(forwards[stage].row for stage in range(len(forwards)))


def _cell_error(name: str, cell: _Cell, problem: str) -> PlanError:
    return PlanError(
        "pipeline.csv-cell-not-valid",
        f"torch CSV {name!r} row {cell.row} column {cell.column} (from 0) {cell.text!r}: {problem}",
    )
