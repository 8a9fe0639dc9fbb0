"""Costs, memory and time per rank's share of the model, comparable between schedules with any number of stages.

Schedules with different numbers of stages are compared on the same model. So costs and memory are for one rank's share,
1 / ranks of the model: F of a share takes `f`, F of one of its chunks f / chunks, and memory counts microbatches of one
share.
"""

from __future__ import annotations

from engine.errors import PlanError
from engine.pipeline.actions import Action, Op, Plan
from engine.pipeline.schedules import Placement
from engine.pipeline.simulate import Costs, peak_memory, simulate

ROUNDING = 1e-9  # relative: times are sums of floats, taken in different orders
OPS = (Op.F, Op.I, Op.W)


def share_costs(costs: Costs, ranks: int, stages: int) -> Costs:
    """Costs of each of `stages` stages, from costs of one rank's share.

    A single number is the cost of 1 / ranks of the model. A list of n numbers gives the costs of n equal parts of the
    model, in order (n a multiple of ranks); a stage larger or smaller than a part costs the sum or the fraction.
    """

    def spread(name: str, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(values) == 1:
            return (values[0] * ranks / stages,)
        if len(values) % ranks and len(values) != stages:
            raise PlanError(
                "pipeline.costs-not-valid",
                f"cost {name} has {len(values)} numbers for {ranks} ranks: give one, for a rank's share of the model, "
                f"or one for each of {ranks}, {2 * ranks}, ... equal parts of it",
            )
        parts = len(values)
        if parts % stages == 0:
            size = parts // stages
            return tuple(sum(values[s * size : (s + 1) * size]) for s in range(stages))
        # In units of 1 / (parts * stages) of the model, so that all boundaries are integers.
        pieces = [values[x // stages] / stages for x in range(parts * stages)]
        return tuple(sum(pieces[s * parts : (s + 1) * parts]) for s in range(stages))

    costs = Costs(spread("f", costs.f), spread("i", costs.i), spread("w", costs.w), costs.comm)
    costs.check(stages)
    return costs


def share_memory(plan: Plan) -> list[float]:
    """For each rank the most activations alive at once, in microbatches of one rank's share of the model."""
    return peak_memory(plan, (plan.num_ranks / plan.num_stages,))


def lower_bound(placement: Placement, microbatches: int, costs: Costs, backward: bool = True) -> float:
    """A lower bound on the step time of any plan on this placement.

    The maximum over ranks of the earliest start of its first forward plus all its computation. costs: of the stages.
    """
    ops = OPS if backward else (Op.F,)
    bound = earliest = 0.0  # earliest: when the first microbatch can be at the stage
    for stage, rank in enumerate(placement):
        if rank not in placement[:stage]:
            held = [s for s, holder in enumerate(placement) if holder == rank]
            work = sum(costs.of(Action(op, s, 0)) for op in ops for s in held)
            bound = max(bound, earliest + work * microbatches)
        away = placement[stage + 1 : stage + 2] != (rank,)
        earliest += costs.of(Action(Op.F, stage, 0)) + costs.comm * away
    return bound


def share_time(plan: Plan, costs: Costs) -> float:
    """Duration of a step, from costs of one rank's share."""
    return simulate(plan, share_costs(costs, plan.num_ranks, plan.num_stages)).time


def fits(plan: Plan, memory_cap: float | None) -> bool:
    """Whether no rank keeps more activations than the cap, in microbatches of one rank's share."""
    return memory_cap is None or max(share_memory(plan)) <= memory_cap * (1 + ROUNDING)
