"""Schedule files of torch.distributed.pipelining, written by torch's own schedule classes, read and proved."""

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

# class of torch -> (stages on rank 0 of 4, the schedule of ours that does the same)
CLASSES = {
    "ScheduleInterleaved1F1B": ((0, 4), "interleaved"),
    "ScheduleZBVZeroBubble": ((0, 7), "zb-v"),
    "ScheduleDualPipeV": ((0, 7), "dualpipe-v"),
    "ScheduleLoopedBFS": ((0, 4), None),
    "ScheduleInterleavedZeroBubble": ((0, 4), None),
}


def torch_csv(name: str, kind: str) -> str:
    """What _dump_csv of the class writes for 4 ranks, 8 stages and 8 microbatches, without a process group."""
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
    if ours is not None:  # two hands have written the same schedule
        mine = SCHEDULES[ours].make(4, 2, 8)
        assert plan.placement == mine.placement
        assert no_weights(compute_only(plan)) == no_weights(mine)
        if ours != "zb-v":  # whose weight gradients torch ends in another order
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
    with pytest.raises(PlanError, match="1REDUCE is missing"):
        check(plan)
    # Without any REDUCE_GRAD our pass adds them, and without any message all communication.
    assert str(read_torch_csv("0F0,0SEND_F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0", "x")).count("REDUCE") == 2
    check(read_torch_csv("0F0,,,0B0,0REDUCE_GRAD\n,1F0,1B0", "x"))
    check(read_torch_csv("0F0,1F0,1B0,0B0,0REDUCE_GRAD,1REDUCE_GRAD", "x"))
    check(read_torch_csv("0F0\n1F0", "forwards"))
    overlap = read_torch_csv("0F0,(0F1; 0B0)OVERLAP_F_B,0B1", "x")
    assert str(overlap).splitlines()[1] == "rank 0: 0F0 0F1 0B0 0B1 0REDUCE"


def test_what_deadlocks_is_refused() -> None:
    """The order of pytorch#172668: both send first."""
    text = "0F0,0F1,0SEND_F0,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n1RECV_F0,1F0,1B0,1SEND_B0,1RECV_F1,1F1,1B1,1SEND_B1"
    plan = read_torch_csv(text, "x")
    with pytest.raises(PlanError, match="deadlock with zero buffering"):
        check(plan)


@pytest.mark.parametrize("name", CLASSES)
def test_a_cell_less_is_refused(name: str) -> None:
    """And so is a cell that is there twice: what torch itself takes without a word in files with communication."""
    rng, rows = random.Random(1), [row.split(",") for row in torch_csv(name, "compute_comms").splitlines()]
    for _ in range(40):
        row = rng.randrange(len(rows))
        column = rng.choice([i for i, cell in enumerate(rows[row]) if cell and "SHARD" not in cell])
        for cells in ([], [rows[row][column]] * 2):
            broken = [list(each) for each in rows]
            broken[row][column : column + 1] = cells
            with pytest.raises(PlanError, match=r"is missing|is there twice"):
                check(read_torch_csv("\n".join(",".join(each) for each in broken), "x"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0X0", r"torch CSV 'x' row 0 column 1 \(from 0\) '0X0': '0X0' is not an action"),
        ("0F0,0B0\n,1F0,,1B", r"row 1 column 3 \(from 0\) '1B': '1B' is not an action"),
        ("0F0,(0F1;0B)OVERLAP_F_B", r"row 0 column 1 \(from 0\) '\(0F1;0B\)OVERLAP_F_B': '0B' is not an action"),
        ("0F0,(0F1;0B0)", r"row 0 column 1 \(from 0\) '\(0F1;0B0\)': '\(0F1;0B0\)' is not an action"),
        ('0F0,"0B0"', r"row 0 column 1 \(from 0\) '\"0B0\"': '\"0B0\"' is not an action"),
        ("0F0,0REDUCE_GRAD0", r"row 0 column 1 .* is not an action"),
        ("0F0,0B0\n0F1,1F0", r"row 1 column 0 \(from 0\) '0F1': stage 0 is on rank 0 already \('0F0'\)"),
        ("0F0,1B0", r"row 0 column 1 \(from 0\) '1B0': no row has an F of stage 1"),
        ("0F0,2F0", r"row 0 column 1 \(from 0\) '2F0': no row has an F of stage 1"),
        ("0F0\n\n1F0", r"has placement \(0, 2\) for 3 programs: .* every rank must hold a stage"),
        ("\n0F0", r"has placement \(1,\) for 2 programs"),
        ("", r"torch CSV 'x' has no actions: expected one row per rank"),
        ("0UNSHARD,,\n", r"torch CSV 'x' has no actions"),
        ("0B0,0F0", r"rank 0 step 0: the computations cannot be ordered"),
        ("0F0,0B0,0F999999999,0B999999999", r"0F1 is missing"),  # and it does not take all memory to find out
    ],
)
def test_what_the_reader_says(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check(read_torch_csv(text, "x"))


def test_the_ops_of_torch_are_all_known() -> None:
    """A new version of torch with a new action shows here first."""
    known = {str(op) for op in Op} - {"REDUCE"} | {"REDUCE_GRAD", "UNSHARD", "RESHARD", "OVERLAP_F_B"}
    assert {kind.value for kind in theirs._ComputationType} == known
