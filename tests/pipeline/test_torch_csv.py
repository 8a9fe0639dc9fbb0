"""Reading and checking schedule files written by the schedule classes of torch.distributed.pipelining."""

from __future__ import annotations

import csv
import io
import random
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as theirs

from engine.errors import PlanError
from engine.pipeline.actions import Op, Plan, Step
from engine.pipeline.check import check
from engine.pipeline.passes import compute_only
from engine.pipeline.schedules import SCHEDULES
from engine.pipeline.torch_csv import read_torch_csv
from tests.support.errors import raises

# torch class -> (stages on rank 0 of 4, the engine's schedule that is the same)
CLASSES = {
    "ScheduleInterleaved1F1B": ((0, 4), "interleaved"),
    "ScheduleZBVZeroBubble": ((0, 7), "zb-v"),
    "ScheduleDualPipeV": ((0, 7), "dualpipe-v"),
    "ScheduleLoopedBFS": ((0, 4), None),
    "ScheduleInterleavedZeroBubble": ((0, 4), None),
}


def torch_csv(name: str, kind: str) -> str:
    """The output of the class's _dump_csv for 4 ranks, 8 stages and 8 microbatches, without a process group."""
    of_rank_0 = [
        SimpleNamespace(stage_index=i, num_stages=8, group_size=4, group_rank=0, is_first=i == 0, is_last=i == 7)
        for i in CLASSES[name][0]
    ]
    for stage in of_rank_0:
        stage.submod = None
    schedule = getattr(theirs, name)(of_rank_0, 8, loss_fn=lambda output, target: output)
    rows = schedule.pipeline_order if kind == "compute_only" else schedule.pipeline_order_with_comms
    file = io.StringIO()
    csv.writer(file).writerows(rows[rank] for rank in sorted(rows))
    return file.getvalue()


def no_weights(plan: Plan) -> list[list[Step]]:
    return [[step for step in program if step[0].op is not Op.W] for program in plan.programs]


@pytest.mark.parametrize("kind", ["compute_only", "compute_comms"])
@pytest.mark.parametrize("name", CLASSES)
def test_what_torch_writes_is_read_and_right(name: str, kind: str) -> None:
    text = torch_csv(name, kind)
    assert ("SEND" in text) == ("REDUCE_GRAD" in text) == ("UNSHARD" in text) == (kind == "compute_comms")
    plan = read_torch_csv(text, name)
    check(plan)
    assert (plan.num_ranks, plan.num_stages, plan.microbatches, plan.backward) == (4, 8, 8, True)
    ours = CLASSES[name][1]
    if ours is not None:  # two independent implementations of the same schedule
        mine = SCHEDULES[ours].make(4, 2, 8)
        assert plan.placement == mine.placement
        assert no_weights(compute_only(plan)) == no_weights(mine)
        if ours != "zb-v":  # torch's ZB-V ends its weight gradients in another order
            assert compute_only(plan).programs == mine.programs


def test_messages_are_taken_as_they_are() -> None:
    plan = read_torch_csv(
        "0UNSHARD,0F0,0SEND_F0,, 0RECV_B0 ,0B0,0REDUCE_GRAD,0RESHARD\n1RECV_F0,1F0,1B0,1SEND_B0\n", "x"
    )
    assert str(plan) == (
        "plan x microbatches=1 placement=0,1 backward=yes\n"
        "rank 0: 0F0 0SEND_F0 0RECV_B0 0B0 0REDUCE\n"
        "rank 1: 1RECV_F0 1F0 1B0 1SEND_B0"
    )
    with raises(PlanError, "pipeline.action-missing", "1REDUCE"):
        check(plan)
    # Without any REDUCE_GRAD the pass adds REDUCE, and without any message it adds all communication.
    assert str(read_torch_csv("0F0,0SEND_F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0", "x")).count("REDUCE") == 2
    check(read_torch_csv("0F0,,,0B0,0REDUCE_GRAD\n,1F0,1B0", "x"))
    check(read_torch_csv("0F0,1F0,1B0,0B0,0REDUCE_GRAD,1REDUCE_GRAD", "x"))
    check(read_torch_csv("0F0\n1F0", "forwards"))
    overlap = read_torch_csv("0F0,(0F1; 0B0)OVERLAP_F_B,0B1", "x")
    assert str(overlap).splitlines()[1] == "rank 0: 0F0 0F1 0B0 0B1 0REDUCE"


def test_a_plan_that_deadlocks_is_rejected() -> None:
    """The order of pytorch#172668: both send first."""
    text = "0F0,0F1,0SEND_F0,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n1RECV_F0,1F0,1B0,1SEND_B0,1RECV_F1,1F1,1B1,1SEND_B1"
    plan = read_torch_csv(text, "x")
    with raises(PlanError, "pipeline.deadlock"):
        check(plan)


@pytest.mark.parametrize("name", CLASSES)
def test_a_missing_cell_is_rejected(name: str) -> None:
    """A duplicate cell is rejected too; torch itself accepts both silently in files with communication."""
    rng, rows = random.Random(1), [row.split(",") for row in torch_csv(name, "compute_comms").splitlines()]
    for _ in range(40):
        row = rng.randrange(len(rows))
        column = rng.choice([i for i, cell in enumerate(rows[row]) if cell and "SHARD" not in cell])
        for cells in ([], [rows[row][column]] * 2):
            broken = [list(each) for each in rows]
            broken[row][column : column + 1] = cells
            with raises(PlanError, "pipeline.action-twice" if cells else "pipeline.action-missing"):
                check(read_torch_csv("\n".join(",".join(each) for each in broken), "x"))


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("0F0,0X0", "pipeline.csv-cell-not-valid", "0 1 0X0"),
        ("0F0,0B0\n,1F0,,1B", "pipeline.csv-cell-not-valid", "1 3 0 1B"),
        ("0F0,(0F1;0B)OVERLAP_F_B", "pipeline.csv-cell-not-valid", "0 1 0F1 0B"),
        ("0F0,(0F1;0B0)", "pipeline.csv-cell-not-valid", "0 1 0F1 0B0"),
        ('0F0,"0B0"', "pipeline.csv-cell-not-valid", "0 1 0B0"),
        ("0F0,0REDUCE_GRAD0", "pipeline.csv-cell-not-valid", "0 1"),
        ("0F0,0B0\n0F1,1F0", "pipeline.csv-cell-not-valid", "1 0 0F1 0F0"),
        ("0F0,1B0", "pipeline.csv-cell-not-valid", "0 1 1B0"),
        ("0F0,2F0", "pipeline.csv-cell-not-valid", "0 1 2F0"),
        ("0F0\n\n1F0", "pipeline.plan-shape-wrong", "0 2 3"),
        ("\n0F0", "pipeline.plan-shape-wrong", "1 2"),
        ("", "pipeline.csv-empty", ""),
        ("0UNSHARD,,\n", "pipeline.csv-empty", ""),
        ("0B0,0F0", "pipeline.not-orderable", "0"),
        # and the check does not use memory for all the missing microbatches
        ("0F0,0B0,0F999999999,0B999999999", "pipeline.action-missing", "0F1"),
    ],
)
def test_what_the_reader_says(text: str, code: str, named: str) -> None:
    with raises(PlanError, code, *named.split()):
        check(read_torch_csv(text, "x"))


def test_the_ops_of_torch_are_all_known() -> None:
    """A new version of torch with a new action shows here first."""
    known = {str(op) for op in Op} - {"REDUCE"} | {"REDUCE_GRAD", "UNSHARD", "RESHARD", "OVERLAP_F_B"}
    assert {kind.value for kind in theirs._ComputationType} == known
