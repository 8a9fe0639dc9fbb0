"""Schedules, passes and the check of plans.

`rendezvous` below is an independent check: it runs a plan rank by rank with unbuffered messages and shares no code with
check.py. Both must agree, on correct plans and on broken ones.
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.errors import PlanError
from engine.pipeline import check as check_module
from engine.pipeline.actions import Action, Op, Plan, Step, grid, parse_action, parse_plan, parse_step, partner_of
from engine.pipeline.check import check
from engine.pipeline.passes import add_communication, add_reduce, complete, compute_only
from engine.pipeline.schedules import (
    SCHEDULES,
    Schedule,
    build,
    find_schedule,
    first_microbatch,
    forward_only,
    gpipe,
    looped,
    one_f_one_b,
)
from engine.pipeline.simulate import peak_memory, simulate
from tests.support.errors import raises

# --- an independent check ---------------------------------------------------------------------------------------------


class PlanFailure(Exception):
    """The reason why a plan fails."""


class Rendezvous:
    """Runs a plan with rendezvous messages: a communication step ends when every message has met its partner."""

    def __init__(self, plan: Plan):
        self.plan, self.at = plan, [0] * plan.num_ranks
        self.has: set[tuple[str, int, int]] = set()  # computed or received tensors; each stage is on one rank only
        self.posted: dict[tuple[str, int, int], list[Action]] = {}  # ("send" | "receive", from, to) -> in order
        self.open: list[list[tuple[Action, tuple[str, int, int], int]] | None] = [None] * plan.num_ranks

    def run(self) -> str:
        try:
            while sum(self.advance(rank) for rank in range(self.plan.num_ranks)):
                pass
            if any(at < len(program) for at, program in zip(self.at, self.plan.programs)):
                return "deadlock"
            self.verify_end()
        except PlanFailure as broken:
            return str(broken)
        return "ok"

    def advance(self, rank: int) -> bool:
        if self.at[rank] == len(self.plan.programs[rank]):
            return False
        step = self.plan.programs[rank][self.at[rank]]
        if not step[0].op.name.startswith(("SEND", "RECV")):
            self.compute(rank, *step[0])
        elif self.open[rank] is None:
            self.open[rank] = [self.post(rank, action) for action in step]
            return True
        elif not all(len(self.posted.get(other(key), [])) > index for _, key, index in self.open[rank]):
            return False
        else:
            for action, key, index in self.open[rank]:
                self.meet(action, self.posted[other(key)][index])
            self.open[rank] = None
        self.at[rank] += 1
        return True

    def post(self, rank: int, action: Action) -> tuple[Action, tuple[str, int, int], int]:
        op, stage, mb = action
        if self.plan.placement[stage] != rank:
            raise PlanFailure("misplaced")
        peer = self.plan.placement[stage + (1 if op in ("SEND_F", "RECV_B") else -1)]
        if op in ("SEND_F", "SEND_B"):
            self.need("output" if op == "SEND_F" else "input gradient", stage, mb)
            key = ("send", rank, peer)
        else:
            key = ("receive", peer, rank)
        self.posted.setdefault(key, []).append(action)
        return action, key, len(self.posted[key]) - 1

    def meet(self, action: Action, partner: Action) -> None:
        kinds = {action.op, partner.op}
        near = abs(action.stage - partner.stage) == 1 and action.microbatch == partner.microbatch
        forwards = kinds == {"SEND_F", "RECV_F"}
        up = [a.stage for a in (action, partner) if a.op in ("RECV_F", "SEND_B")]
        down = [a.stage for a in (action, partner) if a.op in ("SEND_F", "RECV_B")]
        if not near or not (forwards or kinds == {"SEND_B", "RECV_B"}) or len(up) != 1 or up[0] != down[0] + 1:
            raise PlanFailure("mismatch")
        if action.op in ("RECV_F", "RECV_B"):
            self.make("input" if forwards else "output gradient", action.stage, action.microbatch)

    def compute(self, rank: int, op: str, stage: int, mb: int) -> None:
        place, last = self.plan.placement, len(self.plan.placement) - 1
        if place[stage] != rank:
            raise PlanFailure("misplaced")
        if op == "F":
            if stage > 0:
                self.need("input", stage, mb)
            self.make("output", stage, mb)
            if stage < last and place[stage + 1] == rank:
                self.make("input", stage + 1, mb)
        elif op in ("B", "I"):
            self.need("output", stage, mb)
            if stage < last:
                self.need("output gradient", stage, mb)
            self.make("input gradient", stage, mb)
            if stage > 0 and place[stage - 1] == rank:
                self.make("output gradient", stage - 1, mb)
            self.make("half" if op == "I" else "whole", stage, mb)
        elif op == "W":
            self.need("half", stage, mb)
            self.make("whole", stage, mb)
        else:
            for each in range(self.plan.microbatches):
                self.need("whole", stage, each)
            self.make("reduced", stage, 0)

    def need(self, *tensor: object) -> None:
        if tensor not in self.has:
            raise PlanFailure("order")

    def make(self, name: str, stage: int, mb: int) -> None:
        if (name, stage, mb) in self.has:
            raise PlanFailure("twice")
        self.has.add((name, stage, mb))

    def verify_end(self) -> None:
        for stage in range(len(self.plan.placement)):
            for mb in range(self.plan.microbatches):
                if not {("output", stage, mb), ("whole" if self.plan.backward else "output", stage, mb)} <= self.has:
                    raise PlanFailure("incomplete")
            if self.plan.backward and ("reduced", stage, 0) not in self.has:
                raise PlanFailure("incomplete")


def other(key: tuple[str, int, int]) -> tuple[str, int, int]:
    return ("receive" if key[0] == "send" else "send", *key[1:])


def rendezvous(plan: Plan) -> str:
    """ "ok", or the reason why the plan fails."""
    return Rendezvous(plan).run()


def verdict(plan: Plan) -> str:
    """check's answer: "ok", or the first line of its error; asserts that the grid marks the spot."""
    try:
        check(plan)
    except PlanError as error:
        lines = str(error).splitlines()
        table = lines[next(i for i, line in enumerate(lines) if line.startswith("step ")) :]
        assert any(re.search(r">.*<", line) for line in table), str(error)
        return lines[0]
    return "ok"


# --- communication as in Megatron: an alternative to the passes -------------------------------------------------------


def just_in_time(plan: Plan, *, batched: bool) -> Plan:
    """Add each receive right before its use and each send right after its computation, as separate steps.

    batched: adjacent messages are posted together.
    """

    def message(op: Op, action: Action, other: int) -> list[Step]:
        apart = 0 <= other < plan.num_stages and plan.placement[other] != plan.placement[action.stage]
        return [(Action(op, action.stage, action.microbatch),)] if apart else []

    def surrounded(action: Action) -> list[Step]:
        above, below = action.stage - 1, action.stage + 1
        if action.op is Op.F:
            return [*message(Op.RECV_F, action, above), (action,), *message(Op.SEND_F, action, below)]
        if action.op is Op.W:
            return [(action,)]
        return [*message(Op.RECV_B, action, below), (action,), *message(Op.SEND_B, action, above)]

    programs: list[tuple[Step, ...]] = []
    for program in plan.programs:
        steps: list[Step] = []
        for step in (new for (action,) in program for new in surrounded(action)):
            if batched and steps and all("_" in action.op for action in (*steps[-1], *step)):
                steps[-1] += step
            else:
                steps.append(step)
        programs.append(tuple(steps))
    return replace(plan, programs=tuple(programs))


# --- plans written by hand -------------------------------------------------------------------------------------------

V_SHAPED = parse_plan("""
plan v microbatches=2 placement=0,1,1,0 backward=yes
rank 0: 0F0 0F1 3F0 3B0 3F1 3B1 0B0 0B1
rank 1: 1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1
""")

ZERO_BUBBLE = parse_plan("""
plan zb-h1 microbatches=3 placement=0,1 backward=yes
rank 0: 0F0 0F1 0I0 0F2 0I1 0W0 0I2 0W1 0W2
rank 1: 1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2
""")

# Rank 0 sends to rank 1 and receives from rank 2 in one batch, and the received message depends on the sent one.
LOOP = parse_plan("""
plan loop microbatches=1 placement=0,1,2,0 backward=no
rank 0: 0F0 3F0
rank 1: 1F0
rank 2: 2F0
""")


GOLDEN = {
    ("gpipe", 2, 1, 3): """
plan gpipe microbatches=3 placement=0,1 backward=yes
rank 0: 0F0 0F1 0F2 0B0 0B1 0B2
rank 1: 1F0 1F1 1F2 1B0 1B1 1B2
""",
    ("1f1b", 4, 1, 4): """
plan 1f1b microbatches=4 placement=0,1,2,3 backward=yes
rank 0: 0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3
rank 1: 1F0 1F1 1F2 1B0 1F3 1B1 1B2 1B3
rank 2: 2F0 2F1 2B0 2F2 2B1 2F3 2B2 2B3
rank 3: 3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3
""",
    ("interleaved", 2, 2, 4): """
plan interleaved microbatches=4 placement=0,1,0,1 backward=yes
rank 0: 0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3
rank 1: 1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3
""",
    ("interleaved", 2, 2, 1): """
plan interleaved microbatches=1 placement=0,1,0,1 backward=yes
rank 0: 0F0 2F0 2B0 0B0
rank 1: 1F0 3F0 3B0 1B0
""",
    ("zb-h1", 3, 1, 4): """
plan zb-h1 microbatches=4 placement=0,1,2 backward=yes
rank 0: 0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3
rank 1: 1F0 1F1 1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3
rank 2: 2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3
""",
    ("zb-v", 2, 2, 4): """
plan zb-v microbatches=4 placement=0,1,1,0 backward=yes
rank 0: 0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0 0W0 3F2 3I2 3W2 0I1 0W1 3F3 3I3 3W3 0I2 0W2 0I3 0W3
rank 1: 1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1F3 1I1 1W1 2F3 2I2 2W2 1I2 2I3 1I3 1W2 2W3 1W3
""",
    ("dualpipe-v", 2, 2, 5): """
plan dualpipe-v microbatches=5 placement=0,1,1,0 backward=yes
rank 0: 0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1 3F2 0B0 0F4 3B2 3F3 0B1 3B3 3F4 0B2 3B4 0I3 0W3 0I4 0W4
rank 1: 1F0 2F0 1F1 2F1 1F2 2B0 2F2 1B0 1F3 2B1 2F3 1B1 1F4 2B2 2F4 1B2 2B3 1B3 2I4 1I4 2W4 1W4
""",
}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case[0])
def test_schedule_as_text(case: tuple[str, int, int, int]) -> None:
    name, *sizes = case
    assert str(SCHEDULES[name].make(*sizes)) == GOLDEN[case].strip()
    assert compute_only(build(*case)) == SCHEDULES[name].make(*sizes)  # the passes do not move computations


def test_plans_as_text() -> None:
    """Both ends of a message come after the computations of its time slot, in one batch where possible."""
    plan = build("1f1b", 3, 1, 3)
    assert str(plan) == (
        "plan 1f1b microbatches=3 placement=0,1,2 backward=yes\n"
        "rank 0: 0F0 0SEND_F0 0F1 0SEND_F1 0F2 0SEND_F2 0RECV_B0 0B0 0RECV_B1 0B1 0RECV_B2 0B2 0REDUCE\n"
        "rank 1: 1RECV_F0 1F0 (1RECV_F1;1SEND_F0) 1F1 (1RECV_F2;1SEND_F1) 1RECV_B0 1B0 1SEND_B0 1F2"
        " (1SEND_F2;1RECV_B1) 1B1 1SEND_B1 1RECV_B2 1B2 1REDUCE 1SEND_B2\n"
        "rank 2: 2RECV_F0 2F0 2RECV_F1 2B0 2SEND_B0 2F1 2B1 (2RECV_F2;2SEND_B1) 2F2 2B2 2REDUCE 2SEND_B2"
    )
    assert str(first_microbatch(plan)) == (
        "plan 1f1b microbatches=1 placement=0,1,2 backward=yes\n"
        "rank 0: 0F0 0SEND_F0 0RECV_B0 0B0\n"
        "rank 1: 1RECV_F0 1F0 1SEND_F0 1RECV_B0 1B0 1SEND_B0\n"
        "rank 2: 2RECV_F0 2F0 2B0 2SEND_B0"
    )
    check(add_reduce(first_microbatch(build("zb-v", 3, 2, 4))))
    plan = build("zb-v", 2, 2, 3)
    assert str(plan).splitlines()[2] == (  # nothing is sent between stages 1 and 2; gradients leave after I, not W
        "rank 1: 1RECV_F0 1F0 1RECV_F1 2F0 (1RECV_F2;2SEND_F0) 1F1 2F1 (2RECV_B0;2SEND_F1) 2I0 2W0 1F2 2RECV_B1 1I0"
        " 1SEND_B0 1W0 2F2 2SEND_F2 2I1 2W1 2RECV_B2 1I1 1SEND_B1 2I2 1I2 1SEND_B2 1W1 2W2 2REDUCE 1W2 1REDUCE"
    )
    assert str(forward_only(plan, 3)) == (  # in groups of two, so that no more than two wait between chunks
        "plan forward_only microbatches=3 placement=0,1,1,0 backward=no\n"
        "rank 0: 0F0 0SEND_F0 0F1 0SEND_F1 3RECV_F0 3F0 3RECV_F1 3F1 0F2 0SEND_F2 3RECV_F2 3F2\n"
        "rank 1: 1RECV_F0 1F0 1RECV_F1 1F1 2F0 2SEND_F0 2F1 2SEND_F1 1RECV_F2 1F2 2F2 2SEND_F2"
    )


# --- every size, against the formulas of the papers -------------------------------------------------------------------

FAMILIES = [(name, chunks) for name, s in SCHEDULES.items() for chunks in ([s.chunks] if s.chunks else (1, 2, 3, 4))]
# F, I and W of one chunk take 1 each. The value of dualpipe-v is half of its authors' (p - 1)(F&B + B - 3W): theirs is
# for pairs that start and end together; here the parts run one after another, and each sends its result at once.
IDLE: dict[str, Callable[[int], int]] = {
    "gpipe": lambda p: 3 * (p - 1),  # (p - 1)(F + B)
    "1f1b": lambda p: 3 * (p - 1),
    "interleaved": lambda p: 3 * (p - 1),  # of a chunk, so 1 / chunks of that of 1F1B
    "zb-h1": lambda p: p - 1,  # (p - 1)(F + I - W)
    "zb-v": lambda p: p - 1,  # only at the start: all ranks wait for it at the barrier before the optimizer
    "dualpipe-v": lambda p: p - 1,
}
# (ranks, chunks, microbatches, rank) -> microbatches of one chunk alive at the peak, and on the worst rank
PEAK: dict[str, Callable[[int, int, int, int], int]] = {
    "gpipe": lambda p, v, m, r: m,
    "1f1b": lambda p, v, m, r: p - r,
    # p + (p - 1) / v full stages on rank 0; groups are larger than p where p does not divide m
    "interleaved": lambda p, v, m, r: min(m * v, (v - 1) * -(-m // max(1, m // p)) + 2 * p - 1 - 2 * r),
    "zb-h1": lambda p, v, m, r: p,
    "zb-v": lambda p, v, m, r: 2 * p,
    "dualpipe-v": lambda p, v, m, r: 2 * p + 1,
}


def fills(name: str, ranks: int, microbatches: int) -> bool:
    """Whether the formulas apply: there are enough microbatches to fill the pattern."""
    return {
        "gpipe": True,
        "1f1b": microbatches >= ranks,
        "interleaved": microbatches >= ranks,
        "zb-h1": microbatches >= ranks,
    }.get(name, microbatches >= 2 * ranks)


@pytest.mark.parametrize(("name", "chunks"), FAMILIES)
def test_every_size_is_right(name: str, chunks: int) -> None:
    for ranks in range(1, 9):
        for microbatches in range(1, 17):
            sizes = (ranks, chunks, microbatches)
            plan = build(name, *sizes)  # build checks
            if (3 * ranks + microbatches) % 7 == 0 or microbatches == 1:
                assert rendezvous(plan) == "ok", sizes
            weights: dict[int, list[int]] = {stage: [] for stage in range(plan.num_stages)}
            for _, _, (op, stage, microbatch) in plan.walk():
                if op in (Op.B, Op.W):
                    weights[stage].append(microbatch)
            # The same order in every schedule: gradient sums are bitwise equal.
            assert all(order == list(range(microbatches)) for order in weights.values()), sizes
            peaks = peak_memory(plan)
            expected = [PEAK[name](*sizes, rank) for rank in range(ranks)]
            assert max(peaks) <= max(expected), sizes
            if fills(name, ranks, microbatches):
                assert simulate(plan).idle == (IDLE[name](ranks),) * ranks, sizes
                assert peaks == expected if name in ("gpipe", "1f1b", "interleaved") else max(peaks) == max(expected)
            elif name == "1f1b":
                assert peaks == [min(microbatches, ranks - rank) for rank in range(ranks)]


def test_more_chunks_less_idle() -> None:
    """Idle time per rank's share, at equal numbers of layers: each schedule after the first two reduces it."""
    idle = {(name, v): simulate(build(name, 4, v, 16)).idle[0] / v for name, v in FAMILIES}
    assert idle["gpipe", 1] == idle["1f1b", 1] == 9 and idle["interleaved", 2] == 4.5 and idle["interleaved", 4] == 2.25
    assert idle["interleaved", 3] == idle["zb-h1", 1] == 3 and idle["zb-v", 2] == idle["dualpipe-v", 2] == 1.5


@pytest.mark.parametrize(("name", "chunks"), FAMILIES)
def test_forwards_alone_on_every_placement(name: str, chunks: int) -> None:
    for ranks, microbatches in [(1, 1), (2, 5), (3, 3), (5, 7), (8, 1), (8, 12)]:
        plan = forward_only(build(name, ranks, chunks, 1), microbatches)
        assert rendezvous(plan) == "ok"
        assert peak_memory(plan) == [1.0] * ranks


def test_plans_of_a_thousand_gpus_are_quick() -> None:
    """Seconds, not minutes: every rank builds and checks the plan before a run starts."""
    start = time.process_time()
    build("interleaved", 16, 4, 64)
    assert time.process_time() - start < 10


def test_v_shaped_placement() -> None:
    plan = complete(V_SHAPED)
    check(plan)
    assert rendezvous(plan) == "ok"
    assert str(plan).splitlines()[2] == (  # nothing is sent between stages 1 and 2, both on rank 1
        "rank 1: 1RECV_F0 1F0 1RECV_F1 2F0 2SEND_F0 1F1 2F1 (2RECV_B0;2SEND_F1) 2B0 1B0 (2RECV_B1;1SEND_B0) 2B1 "
        "2REDUCE 1B1 1REDUCE 1SEND_B1"
    )
    assert plan.stages_of(0) == (0, 3) and plan.stages_of(1) == (1, 2) and plan.num_stages == 4
    assert peak_memory(plan) == [3, 4]


def test_split_backward() -> None:
    plan = complete(ZERO_BUBBLE)
    check(plan)
    assert rendezvous(plan) == "ok"
    assert str(plan).splitlines()[1] == (  # REDUCE waits for the last W
        "rank 0: 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0I0 0F2 (0SEND_F2;0RECV_B1) 0I1 0W0 0RECV_B2 0I2 0W1 0W2 0REDUCE"
    )
    assert peak_memory(plan) == [3, 2]  # an activation lives until W, not I
    assert peak_memory(plan, kept_for_w=0.0) == [2, 1]


def test_memory_cap() -> None:
    for name, chunks in FAMILIES:
        plan = build(name, 3, chunks, 7)
        peak = max(peak_memory(plan))
        check(plan, memory_cap=peak)
        with raises(PlanError, "pipeline.cap-exceeded", f"{peak - 1:g}"):
            check(plan, memory_cap=peak - 1)
    with pytest.raises(PlanError) as error:
        check(build("1f1b", 2, 1, 4), memory_cap=1)
    assert str(error.value).splitlines()[0] == (
        "plan '1f1b' rank 0 step 2 0F1: 2 microbatches of one stage are alive on rank 0 here, and 2 at its peak, but "
        "memory_cap = 1: choose a schedule that keeps fewer, or raise the cap"
    )
    assert ">0F1<" in str(error.value)


# --- deadlock --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_unbatched_1f1b_deadlocks(ranks: int) -> None:
    """Messages posted one by one, right where they are needed, deadlock: this is why the pass uses time slots."""
    plan = add_reduce(just_in_time(one_f_one_b(ranks, 1, 4), batched=False))
    assert rendezvous(plan) == "deadlock"
    with raises(PlanError, "pipeline.deadlock") as error:
        check(plan)
    if ranks == 2:
        assert str(error.value) == (
            "plan '1f1b' rank 0 step 3 0SEND_F1: deadlock with zero buffering: each of these ranks waits for a step "
            "that the next one never reaches\n"
            "  rank 0 step 3 0SEND_F1 waits for rank 1 step 4 1RECV_F1\n"
            "  rank 1 step 3 1SEND_B0 waits for rank 0 step 4 0RECV_B0\n"
            "step    0         1         2    3           4           5    6    7         8\n"
            "rank 0  0F0       0SEND_F0  0F1  >0SEND_F1<  >0RECV_B0<  0B0  0F2  0SEND_F2  0RECV_B1\n"
            "rank 1  1RECV_F0  1F0       1B0  >1SEND_B0<  >1RECV_F1<  1F1  1B1  1SEND_B1  1RECV_F2\n"
            "(part of 2 ranks x 17 steps)"
        )


def contracted_is_acyclic(plan: Plan) -> bool:
    """The stricter criterion: all steps connected by messages are contracted into one node."""
    spot_of = {action: (rank, position) for rank, position, action in plan.walk()}
    node: dict[tuple[int, int], tuple[int, int]] = {spot: spot for spot in spot_of.values()}

    def root(spot: tuple[int, int]) -> tuple[int, int]:
        return spot if node[spot] == spot else root(node[spot])

    for action, spot in spot_of.items():
        if action.op.startswith(("SEND", "RECV")):
            node[root(spot)] = root(spot_of[partner_of(action)])
    edges: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for rank, position in node:
        if position:
            edges.setdefault(root((rank, position)), set()).add(root((rank, position - 1)))
    try:
        TopologicalSorter(edges).prepare()
    except CycleError:
        return False
    return True


def test_no_false_alarm_for_batches() -> None:
    plan = just_in_time(LOOP, batched=True)
    assert "(0SEND_F0;3RECV_F0)" in str(plan)
    assert not contracted_is_acyclic(plan)
    assert rendezvous(plan) == "ok"
    check(plan)


@pytest.mark.parametrize(("name", "chunks"), FAMILIES)
def test_plans_pass_the_stricter_criterion_too(name: str, chunks: int) -> None:
    """A batch waits only for batches of its slot, so no rank hangs even if all ranks must end each slot together."""
    for ranks, microbatches in [(2, 3), (3, 7), (5, 4)]:
        assert contracted_is_acyclic(build(name, ranks, chunks, microbatches))


def random_plan(rng: random.Random) -> Plan:
    """A plan with a random placement, a random valid order of computations, random batches, and some swaps."""
    ranks, chunks, microbatches = rng.randint(2, 4), rng.choice([1, 1, 2]), rng.randint(1, 4)
    placement = list(range(ranks)) * chunks
    if rng.random() < 0.5:
        rng.shuffle(placement)
    stages, tidy = len(placement), rng.choice([1.0, 0.9, 0.5])
    split = rng.random() < 0.3
    after: dict[Action, set[Action]] = {}
    for stage in range(stages):
        for mb in range(microbatches):
            grad = Op.I if split else Op.B
            after[Action(Op.F, stage, mb)] = {Action(Op.F, stage - 1, mb)} if stage else set()
            after[Action(grad, stage, mb)] = {
                Action(grad, stage + 1, mb) if stage + 1 < stages else Action(Op.F, stage, mb)
            }
            if split:
                after[Action(Op.W, stage, mb)] = {Action(Op.I, stage, mb)}
    programs: list[list[Step]] = [[] for _ in range(ranks)]
    while after:
        ready = sorted(action for action, needs in after.items() if not needs)
        tidily = rng.random() < tidy
        pick = min(ready, key=lambda a: (a.microbatch, rng.random())) if tidily else rng.choice(ready)
        programs[placement[pick.stage]].append((pick,))
        del after[pick]
        for needs in after.values():
            needs.discard(pick)
    plan = Plan("random", microbatches, tuple(placement), tuple(map(tuple, programs)))
    how = rng.choice(["alone", "batched", "slots"])
    plan = add_reduce(add_communication(plan) if how == "slots" else just_in_time(plan, batched=how == "batched"))
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        plan = swap(plan, rng.randrange(ranks), rng.randrange(1000), None)
    return plan


def swap(plan: Plan, rank: int, first: int, second: int | None) -> Plan:
    """Swap two steps of a rank; second=None: the step after the first."""
    program = list(plan.programs[rank])
    i = first % len(program)
    j = (i + 1 if second is None else second) % len(program)
    program[i], program[j] = program[j], program[i]
    return with_program(plan, rank, program)


def with_program(plan: Plan, rank: int, program: list[Step]) -> Plan:
    return replace(plan, programs=(*plan.programs[:rank], tuple(program), *plan.programs[rank + 1 :]))


def assert_agreement(plan: Plan) -> str:
    """Assert that check and `rendezvous` agree; returns check's answer.

    The reasons must be the same only for a deadlock: `rendezvous` may hang before an order or matching error.
    """
    answer, happened = verdict(plan), rendezvous(plan)
    assert (answer == "ok") == (happened == "ok"), (answer, happened, str(plan))
    if "deadlock" in answer:
        assert happened == "deadlock", (answer, str(plan))
    return answer


def test_check_agrees_with_the_second_opinion_on_random_plans() -> None:
    rng = random.Random(20240607)
    seen: Counter[str] = Counter()
    for _ in range(1000):
        answer = assert_agreement(random_plan(rng))
        seen[next(word for word in ("ok", "deadlock", "message", "must come after") if word in answer)] += 1
    assert min(seen.values()) > 40 and len(seen) == 4, seen  # each kind of answer occurred often


# --- broken plans ----------------------------------------------------------------------------------------------------

RIGHT = [build(name, p, chunks, m) for name, chunks in FAMILIES for p, m in [(1, 2), (2, 1), (2, 3), (3, 4), (4, 3)]]
RIGHT += [forward_only(plan, m) for plan in RIGHT[1::5] for m in (1, 3)]
RIGHT += [complete(V_SHAPED), complete(ZERO_BUBBLE), complete(LOOP), just_in_time(LOOP, batched=True)]

spots = st.sampled_from(RIGHT).flatmap(
    lambda plan: st.integers(0, plan.num_ranks - 1).flatmap(
        lambda rank: st.tuples(st.just(plan), st.just(rank), st.integers(0, len(plan.programs[rank]) - 1))
    )
)


@settings(max_examples=200, deadline=None)
@given(spots, st.integers(0, 100))
def test_any_drop_is_rejected(spot: tuple[Plan, int, int], which: int) -> None:
    plan, rank, position = spot
    program = list(plan.programs[rank])
    step = list(program[position])
    dropped = step.pop(which % len(step))
    program[position : position + 1] = [tuple(step)] if step else []
    broken = with_program(plan, rank, program)
    answer = assert_agreement(broken)
    assert re.search(r"\w+ is missing", answer) and (str(dropped) in answer or dropped.op in (Op.I, Op.W)), answer


@settings(max_examples=200, deadline=None)
@given(spots, st.integers(0, 1000), st.integers(0, 1000))
def test_any_duplicate_is_rejected(spot: tuple[Plan, int, int], which: int, target: int) -> None:
    plan, rank, position = spot
    program = list(plan.programs[rank])
    action = program[position][which % len(program[position])]
    program.insert(target % (len(program) + 1), (action,))
    assert f"{action} is there twice" in verdict(with_program(plan, rank, program))


@settings(max_examples=200, deadline=None)
@given(spots, st.data())
def test_trading_actions_between_ranks_is_rejected(spot: tuple[Plan, int, int], data: st.DataObject) -> None:
    plan, rank, position = spot
    other = data.draw(st.integers(0, plan.num_ranks - 1))
    assume(other != rank)
    there = data.draw(st.integers(0, len(plan.programs[other]) - 1))
    programs = [list(program) for program in plan.programs]
    programs[rank][position], programs[other][there] = programs[other][there], programs[rank][position]
    answer = verdict(replace(plan, programs=tuple(map(tuple, programs))))
    assert re.search(r"\w+ is on rank \d, but stage \d+ is on rank \d", answer)


@settings(max_examples=400, deadline=None)
@given(spots, st.integers(0, 1000))
def test_a_swap_is_rejected_if_and_only_if_it_breaks_something(spot: tuple[Plan, int, int], target: int) -> None:
    plan, rank, position = spot
    assert_agreement(swap(plan, rank, position, target))


@settings(max_examples=150, deadline=None)
@given(spots, st.randoms(use_true_random=False))
def test_order_inside_a_batch_counts(spot: tuple[Plan, int, int], rng: random.Random) -> None:
    plan, rank, position = spot
    program = list(plan.programs[rank])
    program[position] = tuple(rng.sample(program[position], len(program[position])))
    assert_agreement(with_program(plan, rank, program))


def test_order_inside_a_batch_is_matched() -> None:
    """Two messages of one batch on one channel: only their order distinguishes them."""
    text = """plan x microbatches=2 placement=0,1 backward=no
    rank 0: 0F0 0F1 (0SEND_F0;0SEND_F1)
    rank 1: (1RECV_F0;1RECV_F1) 1F0 1F1"""
    check(parse_plan(text))
    with raises(PlanError, "pipeline.messages-mismatched", "rank 0", "rank 1", "0SEND_F0", "1RECV_F1"):
        check(parse_plan(text.replace("(1RECV_F0;1RECV_F1)", "(1RECV_F1;1RECV_F0)")))


# --- every error, with its code and values ---------------------------------------------------------------------------

PAIR = """plan 1f1b microbatches=1 placement=0,1 backward=yes
rank 0: 0F0 (0SEND_F0;0RECV_B0) 0B0 0REDUCE
rank 1: 1RECV_F0 1F0 1B0 1REDUCE 1SEND_B0"""
PAIR_SPLIT = PAIR.replace("0B0", "0I0 0W0").replace("1B0", "1I0 1W0")
ONE_RANK = """plan local microbatches=1 placement=0,0 backward=yes
rank 0: 0F0 1F0 1B0 1REDUCE 0B0 0REDUCE"""
ONE_RANK_SPLIT = """plan local microbatches=1 placement=0,0 backward=yes
rank 0: 0F0 1F0 1I0 0I0 1W0 1REDUCE 0W0 0REDUCE"""

STUCK = """plan stuck microbatches=1 placement=0,1 backward=yes
rank 0: 0F0 0B0
rank 1: 1B0 1F0"""

CHECK_ERRORS = [
    # plan text, old text, its replacement, code of the error, values in the message
    (PAIR, "0B0 0REDUCE", "0B0 0REDUCE 1F0", "pipeline.action-misplaced", "0 4 1F0 1"),
    (PAIR, "0F0", "0F0 0F0", "pipeline.action-twice", "0 1 0F0"),
    (PAIR, " 1F0", "", "pipeline.action-missing", "1F0"),
    (PAIR, " 1B0", "", "pipeline.action-missing", "1B0"),
    (PAIR, "0B0", "0I0", "pipeline.action-missing", "0 2 0I0 0W0"),
    (PAIR, " 1REDUCE", "", "pipeline.action-missing", "1REDUCE"),
    (PAIR, "1RECV_F0 ", "", "pipeline.action-missing", "1RECV_F0 1 0 0SEND_F0"),
    (PAIR, "backward=yes", "backward=no", "pipeline.action-too-much", "0RECV_B0"),
    (PAIR, "0B0", "0I0 0W0 0B0", "pipeline.action-too-much", "0B0"),
    (ONE_RANK, "1F0", "0SEND_F0 1F0", "pipeline.action-too-much", "0SEND_F0 0 1"),
    (PAIR, "1RECV_F0 1F0", "1F0 1RECV_F0", "pipeline.order-wrong", "1 0 1F0 1RECV_F0"),
    (PAIR, "0F0 (0SEND_F0;0RECV_B0)", "(0SEND_F0;0RECV_B0) 0F0", "pipeline.order-wrong", "0SEND_F0 0F0"),
    (ONE_RANK, "0F0 1F0", "1F0 0F0", "pipeline.order-wrong", "1F0 0F0"),
    (PAIR, "1F0 1B0", "1B0 1F0", "pipeline.order-wrong", "1B0 1F0"),
    (PAIR, "(0SEND_F0;0RECV_B0) 0B0", "0SEND_F0 0B0 0RECV_B0", "pipeline.order-wrong", "0B0 0RECV_B0"),
    (PAIR, "1B0 1REDUCE 1SEND_B0", "1SEND_B0 1B0 1REDUCE", "pipeline.order-wrong", "1SEND_B0 1B0"),
    (PAIR_SPLIT, "1I0 1W0", "1W0 1I0", "pipeline.order-wrong", "1W0 1I0"),
    (PAIR, "1B0 1REDUCE", "1REDUCE 1B0", "pipeline.order-wrong", "1REDUCE 1B0"),
    (PAIR_SPLIT, "1W0 1REDUCE", "1REDUCE 1W0", "pipeline.order-wrong", "1REDUCE 1W0"),
    (ONE_RANK_SPLIT, "1I0 0I0", "0I0 1I0", "pipeline.order-wrong", "0I0 1I0"),
    (ONE_RANK, "1B0 1REDUCE 0B0", "0B0 1B0 1REDUCE", "pipeline.order-wrong", "0B0 1B0"),
]


@pytest.mark.parametrize(("text", "old", "new", "code", "named"), CHECK_ERRORS)
def test_what_check_says(text: str, old: str, new: str, code: str, named: str) -> None:
    check(parse_plan(text))
    assert old in text
    plan = parse_plan(text.replace(old, new, 1))
    with raises(PlanError, code, *named.split()) as error:
        check(plan)
    assert ">" in str(error.value).splitlines()[-1] or ">" in str(error.value).splitlines()[-2]  # the spot is marked
    assert rendezvous(plan) != "ok" or code == "pipeline.action-too-much"


def test_what_check_says_on_a_mismatch() -> None:
    right = add_reduce(just_in_time(gpipe(2, 1, 2), batched=True))
    check(right)
    plan = parse_plan(str(right).replace("1RECV_F0 1F0 1RECV_F1 1F1", "1RECV_F1 1F1 1RECV_F0 1F0"))
    assert rendezvous(plan) == "mismatch"
    with pytest.raises(PlanError) as error:
        check(plan)
    assert str(error.value) == (
        "plan 'gpipe' rank 0 step 1 0SEND_F0: message 0 from rank 0 to rank 1 is sent by 0SEND_F0, but received by "
        "1RECV_F1 (rank 1 step 0): messages are matched by their order alone, so both ranks must list them in the same "
        "order\n"
        "step    0           1           2         3                    4    5\n"
        "rank 0  0F0         >0SEND_F0<  0F1       (0SEND_F1;0RECV_B0)  0B0  0RECV_B1\n"
        "rank 1  >1RECV_F1<  1F1         1RECV_F0  1F0                  1B0  1SEND_B0\n"
        "(part of 2 ranks x 9 steps)"
    )


def small_plan(**change: object) -> Plan:
    fields = {"name": "x", "microbatches": 1, "placement": (0,), "programs": (((Action(Op.F, 0, 0),),),)}
    return Plan(**{**fields, **change})  # type: ignore[arg-type]


def steps(*texts: str) -> tuple[tuple[Step, ...], ...]:
    return (tuple(parse_step(text) for text in texts),)


@pytest.mark.parametrize(
    ("make", "code", "named"),
    [
        (lambda: parse_action("2X0"), "pipeline.action-not-valid", "2X0 2F0"),
        (lambda: parse_action("0F"), "pipeline.action-not-valid", "0F"),
        (lambda: parse_action("0REDUCE1"), "pipeline.action-not-valid", "0REDUCE1"),
        (lambda: parse_action("F0 "), "pipeline.action-not-valid", "F0"),
        (lambda: parse_action("9" * 5000 + "F0"), "pipeline.action-not-valid", ""),
        (lambda: parse_step("(0F1;)"), "pipeline.action-not-valid", ""),
        (lambda: small_plan(name="a b"), "pipeline.plan-shape-wrong", "'a b'"),
        (lambda: small_plan(microbatches=0), "pipeline.plan-shape-wrong", "0 1"),
        (lambda: small_plan(placement=(0, 1)), "pipeline.plan-shape-wrong", "0 1"),
        (lambda: small_plan(placement=(), programs=()), "pipeline.plan-shape-wrong", "0"),
        (lambda: small_plan(programs=(((),),)), "pipeline.step-not-valid", "0"),
        (lambda: small_plan(programs=steps("0F0", "(0F0;0B0)")), "pipeline.step-not-valid", "1 0F0 0B0"),
        (lambda: small_plan(programs=steps("1F0")), "pipeline.step-not-valid", "1F0 1"),
        (lambda: small_plan(programs=steps("0F1")), "pipeline.step-not-valid", "0F1 1"),
        (lambda: small_plan(programs=(((Action(Op.REDUCE, 0, 0),),),)), "pipeline.step-not-valid", "REDUCE"),
        (lambda: small_plan(programs=steps("0SEND_F0")), "pipeline.step-not-valid", "0SEND_F0 0"),
        (lambda: small_plan(programs=steps("0RECV_F0")), "pipeline.step-not-valid", "0RECV_F0"),
        (lambda: parse_plan(""), "pipeline.plan-text-not-valid", ""),
        (lambda: parse_plan("plan x microbatches=1"), "pipeline.plan-text-not-valid", "1"),
        (lambda: parse_plan(PAIR.replace("rank 1", "rank 2")), "pipeline.plan-text-not-valid", "1"),
        (lambda: add_communication(complete(one_f_one_b(2, 1, 1))), "pipeline.already-there", "1 0SEND_F0"),
        (lambda: add_reduce(complete(one_f_one_b(2, 1, 1))), "pipeline.already-there", "4 0REDUCE"),
        (
            lambda: complete(parse_plan(STUCK)),
            "pipeline.not-orderable",
            "0B0 1B0 1 0 1F0",
        ),
        (lambda: complete(parse_plan(STUCK.replace("0F0 ", ""))), "pipeline.not-orderable", "0 0B0 0F0"),
        (lambda: simulate(parse_plan(STUCK)), "pipeline.not-orderable", "stuck check"),
        (lambda: build("1f1b", 0, 1, 4), "pipeline.degree-below-one", "1f1b 0 1 4"),
        (lambda: build("interleaved", 2, 0, 4), "pipeline.degree-below-one", "2 0 4"),
        (
            lambda: build("1f1b", 2, 3, 4),
            "pipeline.chunks-do-not-fit",
            "3 1",
        ),
        (
            lambda: build("zb-v", 2, 1, 4),
            "pipeline.chunks-do-not-fit",
            "1 2",
        ),
        (lambda: build("1F1B", 2, 1, 4), "pipeline.unknown-schedule", "1F1B 1f1b"),
        (lambda: find_schedule("zbv"), "pipeline.unknown-schedule", "zbv zb-v"),
        (lambda: build("gpip", 2, 1, 4), "pipeline.unknown-schedule", "gpip gpipe"),
    ],
)
def test_what_the_others_say(make: Callable[[], object], code: str, named: str) -> None:
    with raises(PlanError, code, *named.split()):
        make()


def test_build_rejects_a_wrong_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(ranks: int, chunks: int, microbatches: int) -> Plan:
        plan = gpipe(ranks, chunks, microbatches)
        return with_program(plan, 0, list(reversed(plan.programs[0])))

    monkeypatch.setitem(SCHEDULES, "wrong", Schedule(wrong, looped, 1))
    with raises(PlanError, "pipeline.not-orderable"):
        build("wrong", 2, 1, 2)


# --- text and grid ---------------------------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any well-formed plan, correct or not."""
    ranks, microbatches = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    extra = draw(st.lists(st.integers(0, ranks - 1), max_size=4))
    placement = draw(st.permutations([*range(ranks), *extra]))
    stages, mbs = st.integers(0, len(placement) - 1), st.integers(0, microbatches - 1)
    compute = st.builds(Action, st.sampled_from([Op.F, Op.B, Op.I, Op.W]), stages, mbs)
    single = st.one_of(compute, st.builds(Action, st.just(Op.REDUCE), stages, st.just(-1))).map(
        lambda action: (action,)
    )
    step: st.SearchStrategy[Step] = single
    if len(placement) > 1:
        down = st.builds(Action, st.sampled_from([Op.SEND_F, Op.RECV_B]), st.integers(0, len(placement) - 2), mbs)
        up = st.builds(Action, st.sampled_from([Op.RECV_F, Op.SEND_B]), st.integers(1, len(placement) - 1), mbs)
        step = st.one_of(single, st.lists(st.one_of(up, down), min_size=1, max_size=3).map(tuple))
    programs = draw(st.lists(st.lists(step, max_size=6).map(tuple), min_size=ranks, max_size=ranks))
    name = draw(st.from_regex(r"[a-z0-9_\-]{1,8}", fullmatch=True))
    return Plan(name, microbatches, tuple(placement), tuple(programs), draw(st.booleans()))


@settings(max_examples=60, deadline=None)
@given(plans())
def test_text_round_trip(plan: Plan) -> None:
    assert parse_plan(str(plan)) == plan
    assert hash(parse_plan(str(plan))) == hash(plan)
    for _, _, action in plan.walk():
        assert parse_action(str(action)) == action
    grid(plan, [(plan.num_ranks - 1, len(plan.programs[-1]))])  # a mark past the end is no error


def test_actions_print_as_the_field_writes_them() -> None:
    assert str(Action(Op.F, 2, 0)) == f"{Action(Op.F, 2, 0)}" == "2F0"
    assert str(Action(Op.SEND_F, 0, 1)) == "0SEND_F1"
    assert str(Action(Op.REDUCE, 3)) == "3REDUCE"
    assert partner_of(parse_action("0SEND_F1")) == parse_action("1RECV_F1")
    assert partner_of(parse_action("1SEND_B4")) == parse_action("0RECV_B4")


def test_grid() -> None:
    plan = build("1f1b", 32, 1, 64)
    assert grid(parse_plan(PAIR), [(1, 5)]) == (
        "step    1                    2    3        4         5\n"
        "rank 0  (0SEND_F0;0RECV_B0)  0B0  0REDUCE\n"
        "rank 1  1F0                  1B0  1REDUCE  1SEND_B0  ><\n"
        "(part of 2 ranks x 5 steps)"
    )
    shown = grid(plan, [(20, 100)])
    assert ">" in shown and "rank 16 " in shown and "rank 24 " in shown and "rank 25 " not in shown
    assert len(grid(plan, [(0, 0), (31, 100)]).splitlines()) == 18  # never more than 16 ranks


def test_a_bug_in_the_check_would_be_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the deadlock proof, the comparison with `rendezvous` must fail; else it would prove nothing."""
    monkeypatch.setattr(check_module, "_check_deadlock", lambda plan, partners: None)
    with pytest.raises(AssertionError):
        test_check_agrees_with_the_second_opinion_on_random_plans()
