"""List schedules: in simulated time, each free rank starts the ready action that its priority rule prefers."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from engine.pipeline.actions import Action, Op, Plan, Step
from engine.pipeline.schedules import Placement
from engine.pipeline.shares import ROUNDING, share_costs
from engine.pipeline.simulate import Costs


@dataclass(frozen=True)
class _Rule:
    """Priorities of a rank that has several ready actions.

    forward_first: F before I while memory allows.  deep_first: of several chunks, the one nearest to the last stage.
    patience: a W starts only if no F or I is known to become ready within this fraction of its duration.
    max_alive: activations of one stage that a rank may hold.  taper: rank r may hold `taper` x r fewer.
    """

    forward_first: bool
    deep_first: bool
    patience: float
    max_alive: int
    taper: int


def list_schedules(
    placement: Placement, ranks: int, microbatches: int, costs: Costs, memory_cap: float | None
) -> Iterator[Plan]:
    """One plan for each rule."""
    chunks = len(placement) // ranks
    most = microbatches * chunks
    if memory_cap is not None:
        most = min(most, max(chunks, int(memory_cap * chunks * (1 + ROUNDING))))
    limits = {min(most, chunks * count) for count in (ranks, ranks + 1, 3 * ranks // 2, 2 * ranks - 1)} | {most}
    stage_costs = share_costs(costs, ranks, len(placement))
    seen: set[tuple[tuple[Step, ...], ...]] = set()
    for forward_first, deep_first, patience, max_alive, taper in product(
        (False, True), (True, False) if chunks > 1 else (True,), (0.0, 1.0), sorted(limits), (0, 1)
    ):
        rule = _Rule(forward_first, deep_first, patience, max_alive, taper)
        plan = _ListRun(placement, ranks, microbatches, stage_costs, rule).run()
        if plan.programs not in seen:
            seen.add(plan.programs)
            yield plan


class _ListRun:
    """One run of a rule: in simulated time, each free rank starts the ready action that the rule prefers.

    It cannot get stuck: a forward starts only if memory for one activation of each later chunk of its rank remains, so
    the microbatch that is furthest along can always reach the last stage and is freed by its backward.
    """

    def __init__(self, placement: Placement, ranks: int, microbatches: int, costs: Costs, rule: _Rule):
        self.placement, self.microbatches, self.costs, self.rule = placement, microbatches, costs, rule
        self.stages = [[s for s, holder in enumerate(placement) if holder == rank] for rank in range(ranks)]
        self.max_alive = [max(len(held), rule.max_alive - rule.taper * rank) for rank, held in enumerate(self.stages)]
        self.arrived = {  # when the input of F or I of each (stage, microbatch) is on its rank
            Op.F: [[0.0 if stage == 0 else math.inf] * microbatches for stage in range(len(placement))],
            Op.I: [[math.inf] * microbatches for _ in placement],
        }
        self.done = {op: [0] * len(placement) for op in (Op.F, Op.I, Op.W)}  # microbatches of each stage
        self.programs: list[list[Step]] = [[] for _ in range(ranks)]

    def run(self) -> Plan:
        """Process events in time order: a rank looks for work when it ends an action or receives a message."""
        free = [0.0] * len(self.programs)
        events = [(0.0, rank) for rank in range(len(self.programs))]
        while events:
            now, rank = heapq.heappop(events)
            action = self._choose(rank, now) if free[rank] <= now else None
            if action is None:
                continue
            op, stage, microbatch = action
            free[rank] = end = now + self.costs.of(action)
            self.programs[rank].append((action,))
            self.done[op][stage] += 1
            heapq.heappush(events, (end, rank))
            if op is Op.F and stage + 1 == len(self.placement):  # the backward follows: the loss needs no other rank
                self.arrived[Op.I][stage][microbatch] = end
            elif op is not Op.W and (op is Op.F or stage):
                target = stage + 1 if op is Op.F else stage - 1
                when = end + self.costs.comm * (self.placement[target] != rank)
                self.arrived[op][target][microbatch] = when
                heapq.heappush(events, (when, self.placement[target]))
        return Plan("list", self.microbatches, self.placement, tuple(map(tuple, self.programs)))

    def _choose(self, rank: int, now: float) -> Action | None:
        """The action that a free rank starts now; None to wait."""
        stages, done = self.stages[rank], self.done
        free = self.max_alive[rank] - sum(done[Op.F][stage] - done[Op.W][stage] for stage in stages)
        forwards, inputs, weights = [], [], []
        soon = math.inf  # when the next F or I is known to be ready
        for chunk, stage in enumerate(stages):
            forward, back, weight = done[Op.F][stage], done[Op.I][stage], done[Op.W][stage]
            if forward < self.microbatches and free >= len(stages) - chunk:
                when = self.arrived[Op.F][stage][forward]
                if when <= now:
                    forwards.append((-stage if self.rule.deep_first else stage, Action(Op.F, stage, forward)))
                soon = min(soon, when)
            if back < forward:
                when = self.arrived[Op.I][stage][back]
                if when <= now:
                    inputs.append(((back, -stage), Action(Op.I, stage, back)))
                soon = min(soon, when)
            if weight < back:
                weights.append(((weight, -stage), Action(Op.W, stage, weight)))
        if forwards and (self.rule.forward_first or not inputs):
            return min(forwards)[1]
        if inputs:
            return min(inputs)[1]
        action = min(weights)[1] if weights else None
        return action if action and now + self.rule.patience * self.costs.of(action) <= soon else None
