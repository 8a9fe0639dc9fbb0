"""The searched schedule: correct, within its cap, never worse than a named one, and better where possible."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import PlanError
from engine.pipeline import search as search_module
from engine.pipeline.actions import Action, Op, Plan
from engine.pipeline.check import check
from engine.pipeline.improve import _TimedPlan
from engine.pipeline.list_schedules import _ListRun, _Rule
from engine.pipeline.passes import compute_only
from engine.pipeline.schedules import build, complete_and_check
from engine.pipeline.search import named_schedules, placements, search
from engine.pipeline.shares import lower_bound, share_costs
from engine.pipeline.shares import share_memory as memory
from engine.pipeline.simulate import Costs, simulate
from tests.support.errors import raises

# The last share holds the output head; a message takes a tenth of a forward; I costs more than W.
HEAD = Costs(f=(1, 1, 1, 1.5), i=(1.2, 1.2, 1.2, 1.7), w=(0.8, 0.8, 0.8, 1.2), comm=0.1)


HEAD_OF_3 = Costs(f=(1, 1, 2), comm=0.3)


def time_of(plan: Plan, costs: Costs) -> float:
    return simulate(plan, share_costs(costs, plan.num_ranks, plan.num_stages)).time


def best_named(ranks: int, microbatches: int, costs: Costs, cap: float | None, chunks: int | None = None) -> float:
    fitting = [plan for plan in named_schedules(ranks, microbatches, chunks) if cap is None or max(memory(plan)) <= cap]
    return min((time_of(plan, costs) for plan in fitting), default=float("inf"))


def keeps_order(plan: Plan) -> bool:
    """Whether each stage adds its gradients in the order of the microbatches."""
    for stage in range(plan.num_stages):
        added = [a.microbatch for _, _, a in plan.walk() if a.stage == stage and a.op in (Op.B, Op.W)]
        if added != list(range(plan.microbatches)):
            return False
    return True


@st.composite
def problems(draw: st.DrawFn) -> dict[str, object]:
    ranks = draw(st.integers(1, 4))
    number = st.integers(0, 8).map(lambda n: n / 4)
    one_or_each = st.one_of(number.map(lambda n: (n,)), st.tuples(*[number] * ranks))
    costs = Costs(draw(one_or_each), draw(one_or_each), draw(one_or_each), draw(number))
    cap = draw(st.none() | st.integers(2, 4 * ranks).map(lambda n: n / 2))
    chunks = draw(st.sampled_from([None, 1, 2, 3]))
    return {"ranks": ranks, "microbatches": draw(st.integers(1, 7)), "costs": costs, "cap": cap, "chunks": chunks}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(problems())
def test_is_never_worse_than_the_best_named_schedule_within_the_cap(problem: dict[str, object]) -> None:
    ranks, microbatches, costs, cap, chunks = (problem[k] for k in ("ranks", "microbatches", "costs", "cap", "chunks"))
    plan = search(ranks, microbatches, costs, chunks=chunks, memory_cap=cap, iterations=60)
    check(plan)
    assert keeps_order(plan)
    assert cap is None or max(memory(plan)) <= cap + 1e-9
    time = time_of(plan, costs)
    assert time <= best_named(ranks, microbatches, costs, cap, chunks) * (1 + 1e-8)
    bound = lower_bound(plan.placement, microbatches, share_costs(costs, ranks, plan.num_stages))
    assert time >= bound * (1 - 1e-9)
    assert plan.placement in placements(ranks, chunks)


def test_is_better_than_every_named_schedule_when_the_last_stage_is_heavier() -> None:
    plan = search(4, 8, HEAD, memory_cap=4)
    assert time_of(plan, HEAD) < 0.985 * best_named(4, 8, HEAD, 4)
    assert max(memory(plan)) <= 4


def test_finds_plans_where_no_named_schedule_fits() -> None:
    costs = Costs()
    assert best_named(4, 8, costs, 2.0) == float("inf")
    tight, wide = (search(4, 8, costs, memory_cap=cap) for cap in (1.0, 2.0))
    assert max(memory(tight)) == 1
    assert 25.5 < time_of(wide, costs) < 36 < time_of(tight, costs)


def test_the_same_seed_finds_the_same_plan() -> None:
    first, again = (search(3, 6, HEAD_OF_3, seed=5, iterations=500) for _ in range(2))
    assert str(first) == str(again)


def test_moves_pay() -> None:
    """The local search must improve on the list schedules alone."""
    costs = Costs(comm=0.3)
    assert time_of(search(4, 8, costs, memory_cap=4), costs) < time_of(
        search(4, 8, costs, memory_cap=4, iterations=0), costs
    )


def test_a_cap_that_nothing_fits_is_reported_with_the_least_that_fits() -> None:
    with raises(PlanError, "pipeline.cap-too-small", "0.5", "1."):
        search(4, 8, Costs(), memory_cap=0.5)
    with raises(PlanError, "pipeline.degree-below-one", "microbatches 0"):
        search(4, 0, Costs())
    with raises(PlanError, "pipeline.placement-unknown", "'v'", 3):
        search(4, 8, Costs(), chunks=3, placement="v")


def test_placements_can_be_chosen() -> None:
    assert search(2, 4, Costs(), chunks=2, placement="v", iterations=10).placement == (0, 1, 1, 0)
    assert search(2, 4, Costs(), chunks=2, placement="looped", iterations=10).placement == (0, 1, 0, 1)
    assert placements(2) == [(0, 1), (0, 1, 0, 1), (0, 1, 1, 0)]


def test_costs_of_a_share_are_spread_over_its_stages() -> None:
    def f(costs: str, ranks: int, stages: int) -> tuple[float, ...]:
        return share_costs(Costs.parse(costs), ranks, stages).f

    assert f("f=3", 4, 4) == (3,) and f("f=3", 4, 8) == (1.5,)
    assert f("f=1:2", 2, 4) == (0.5, 0.5, 1, 1)  # halves of the model -> quarters
    assert f("f=1:2:3:4", 2, 2) == (3, 7)  # quarters -> halves
    assert f("f=1:2:3:4", 2, 6) == pytest.approx((2 / 3, 2 / 3 / 2 + 2 / 3, 4 / 3, 2, 1 + 4 / 3, 8 / 3))
    assert share_costs(Costs.parse("comm=0.5"), 4, 8).comm == 0.5
    with raises(PlanError, "pipeline.costs-not-valid", 3, 2):
        f("f=1:2:3", 2, 2)
    with raises(PlanError, "pipeline.costs-not-valid", "nan"):
        f("f=nan", 2, 2)
    with raises(PlanError, "pipeline.costs-not-valid", "-1"):
        f("f=-1", 2, 2)


def test_the_lower_bound_is_the_way_and_the_work_of_a_rank() -> None:
    costs = Costs(f=(1, 1, 2), comm=0.5)
    assert lower_bound((0, 1, 2), 4, costs) == 2 * 1 + 2 * 0.5 + 4 * 4  # the last rank: two messages, 2 + 1 + 1 each
    assert lower_bound((0, 1, 2), 4, costs, backward=False) == 3 + 4 * 2
    assert lower_bound((0, 1, 1, 0), 4, Costs(f=(1, 1, 1, 9))) == 4 * 14  # rank 0 starts at once


def test_memory_is_in_microbatches_of_a_share() -> None:
    p, m = 4, 12
    assert memory(build("1f1b", p, 1, m)) == [4, 3, 2, 1]
    assert memory(build("gpipe", p, 1, m)) == [m] * p
    assert memory(build("zb-v", p, 2, m)) == [p] * p
    assert max(memory(build("interleaved", p, 2, m))) == p + (p - 1) / 2


@settings(max_examples=30, deadline=None, derandomize=True)
@given(problems(), st.integers(0, 1000))
def test_timed_plans_agree_with_the_simulator(problem: dict[str, object], seed: int) -> None:
    ranks, microbatches, costs = (problem[k] for k in ("ranks", "microbatches", "costs"))
    for plan in named_schedules(ranks, microbatches):
        timed = _TimedPlan(compute_only(plan), share_costs(costs, ranks, plan.num_stages), None)
        chooser = random.Random(seed)
        for _ in range(10):  # random moves: the timing must also hold for bad plans
            rank = chooser.randrange(ranks)
            positions = range(len(timed.programs[rank]))
            timed.move(rank, chooser.choice(positions), chooser.choice(positions))
        moved = timed.as_plan(timed.programs)
        try:
            expected = time_of(moved, costs)
        except PlanError:
            expected = float("inf")
        assert timed.time() == pytest.approx(expected, rel=1e-12)


def test_moves_keep_the_order_of_a_stage_and_the_memory_cap_of_a_rank() -> None:
    timed = _TimedPlan(compute_only(build("zb-h1", 2, 1, 3)), share_costs(Costs(), 2, 2), 2.0)
    before = [list(program) for program in timed.programs]
    for rank, program in enumerate(before):
        for source in range(len(program)):
            for target in range(len(program)):
                if timed.move(rank, source, target):
                    moved = timed.as_plan(timed.programs)
                    assert keeps_order(moved) and max(memory(moved)) <= 2
                    timed.programs[rank] = list(program)
                assert timed.programs == before


def test_rules_never_get_stuck_at_the_smallest_cap() -> None:
    for where in placements(3):
        chunks = len(where) // 3
        for forward_first in (False, True):
            for deep_first in (False, True):
                rule = _Rule(forward_first, deep_first, patience=1.0, max_alive=chunks, taper=1)
                plan = _ListRun(where, 3, 5, Costs(comm=0.5), rule).run()
                assert max(memory(plan)) == 1
                check(complete_and_check(plan))


def test_adjacent_halves_become_whole_backwards_where_that_costs_nothing() -> None:
    plan = search(2, 4, Costs(comm=0.1), chunks=1)
    ops = [a.op for _, _, a in plan.walk() if a.stage == 0]
    assert Op.B in ops  # no rank waits for the input gradient of the first stage
    split = compute_only(plan)
    programs = tuple(
        tuple(
            (Action(op, *step[0][1:]),)
            for step in program
            for op in ((Op.I, Op.W) if step[0].op is Op.B else (step[0].op,))
        )
        for program in split.programs
    )
    costs = Costs(comm=0.1)
    assert time_of(plan, costs) == pytest.approx(time_of(replace(split, programs=programs), costs))


def test_a_named_plan_that_cannot_be_beaten_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    found = search(4, 8, Costs(), chunks=2, placement="v", memory_cap=4)
    assert replace(found, name="zb-v") == build("zb-v", 4, 2, 8)
    monkeypatch.setattr(search_module, "SCHEDULES", {})
    assert time_of(search(4, 8, Costs(), memory_cap=4), Costs()) <= 27  # the list schedules alone do as well as zb-h1
