"""Searched schedules: the best plan a heuristic finds for given costs and a memory cap. Pure Python, deterministic.

Never worse under `simulate` than the best named schedule that fits the cap, because the search starts from those and
from list schedules: in simulated time, each free rank starts the ready action that its rule prefers. Local search
then improves the best few by moving single actions and keeping moves that do not lengthen the step. Finding the optimal
schedule is NP-hard; the result need not be optimal, and `lower_bound` bounds the distance.

Units: costs and memory are for one rank's share of the model (engine.pipeline.shares).

Invariant: on every stage F, I and W each run in the order of the microbatches, as in the named schedules, so that
gradients are summed in the same order and the result is bitwise the same under every schedule.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from engine.errors import PlanError
from engine.pipeline.actions import Plan
from engine.pipeline.improve import improve, merge_backward_halves
from engine.pipeline.list_schedules import list_schedules
from engine.pipeline.passes import compute_only
from engine.pipeline.schedules import SCHEDULES, Placement, build, complete_and_check, looped, v_shaped
from engine.pipeline.shares import ROUNDING, fits, lower_bound, share_costs, share_memory, share_time
from engine.pipeline.simulate import Costs

_STARTS = 3  # number of plans that local search improves
_CHUNKS = (1, 2)  # numbers of chunks to try when none is given


def search(
    ranks: int,
    microbatches: int,
    costs: Costs,
    *,
    chunks: int | None = None,
    placement: str | None = None,
    memory_cap: float | None = None,
    seed: int = 0,
    iterations: int | None = None,
) -> Plan:
    """The fastest plan found whose peak memory is at most `memory_cap` on every rank, checked and ready to run.

    chunks: stages per rank; None tries one and two.  placement: "looped", "v", or None for both.  costs, memory_cap:
    for one rank's share of the model (module docstring).  iterations: moves tried on each of the best starts; None:
    4000, fewer for large plans.
    """
    if min(ranks, microbatches, chunks or 1) < 1:
        raise PlanError(
            "pipeline.degree-below-one",
            f"search: ranks {ranks}, microbatches {microbatches}, chunks {chunks} must be >= 1",
        )
    share_costs(costs, ranks, ranks)  # raises for costs that do not fit, before any work
    wheres = placements(ranks, chunks, placement)
    bound = min(lower_bound(where, microbatches, share_costs(costs, ranks, len(where))) for where in wheres)
    plans = [*named_schedules(ranks, microbatches, chunks, placement)]
    if not any(fits(plan, memory_cap) and share_time(plan, costs) <= bound * (1 + ROUNDING) for plan in plans):
        for where in wheres:
            plans += list_schedules(where, ranks, microbatches, costs, memory_cap)
    fitting = [plan for plan in plans if fits(plan, memory_cap)]
    if not fitting:
        least = min(max(share_memory(plan)) for plan in plans)
        raise PlanError(
            "pipeline.cap-too-small",
            f"no schedule of {microbatches} microbatches on {ranks} ranks fits a memory cap of {memory_cap:g} "
            f"microbatches of one rank's share; the least known is {least:g}. Set the cap to that or more",
        )
    # Sorting is stable: of equally fast plans a named one comes first.
    ranked = sorted(fitting, key=lambda plan: share_time(plan, costs))
    chooser = random.Random(seed)
    starts = _distinct(ranked)[:_STARTS] if share_time(ranked[0], costs) > bound * (1 + ROUNDING) else []
    improved = [improve(compute_only(plan), costs, memory_cap, chooser, iterations) for plan in starts]
    best = min(
        (ranked[0], *improved), key=lambda plan: share_time(plan, costs) * (1 + ROUNDING * (plan is not ranked[0]))
    )
    if best is not ranked[0] or best.name == "list":
        best = merge_backward_halves(best, costs)
    return complete_and_check(replace(compute_only(best), name="searched"))


def named_schedules(
    ranks: int, microbatches: int, chunks: int | None = None, placement: str | None = None
) -> Iterator[Plan]:
    """Every named schedule on the requested placements."""
    wanted = set(placements(ranks, chunks, placement))
    for name, schedule in SCHEDULES.items():
        for count in _CHUNKS if chunks is None else (chunks,):
            if schedule.chunks in (None, count) and schedule.placement(ranks, count) in wanted:
                yield build(name, ranks, count, microbatches)


def placements(ranks: int, chunks: int | None = None, placement: str | None = None) -> list[Placement]:
    """Straight (looped with one chunk), looped and V placements with `chunks` chunks; PlanError if there is none."""
    found = [
        shape(ranks, count)
        for count in (_CHUNKS if chunks is None else (chunks,))
        for kind, shape in (("looped", looped), ("v", v_shaped))
        if placement in (None, kind) and (kind == "looped" or count == 2)
    ]
    if not found:
        raise PlanError(
            "pipeline.placement-unknown",
            f"placement {placement!r} with chunks = {chunks}: choose looped with any number of chunks, or v with 2",
        )
    return list(dict.fromkeys(found))


def _distinct(plans: list[Plan]) -> list[Plan]:
    """The plans without duplicates, the best of each placement first: the best start need not be the fastest plan."""
    first = {plan.placement: plan for plan in reversed(plans)}
    rest = {plan.programs: plan for plan in plans if all(plan is not other for other in first.values())}
    return [*(plan for plan in plans if plan is first[plan.placement]), *rest.values()]
