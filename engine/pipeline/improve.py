"""Local search on a plan: move single actions over a few neighbours and keep moves that do not lengthen the step."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from engine.pipeline.actions import Action, Op, Plan, Step
from engine.pipeline.shares import OPS, ROUNDING, lower_bound, share_costs, share_time
from engine.pipeline.simulate import Costs

_PATIENCE = 20  # late acceptance: a change is compared with the time this many changes ago
_REACH = 6  # an action moves over at most this many others
_WORK = 4_000_000  # actions timed per start, if the number of iterations is not given
_MOST = 4000  # most iterations in that case


class _TimedPlan:
    """A plan as integers, to try thousands of small changes; it computes the same times as `simulate`.

    An action is (op * stages + stage) * microbatches + microbatch, op 0, 1, 2 for F, I, W; B becomes I and W. Each
    waits for at most one action of another rank (or chunk). `move` keeps it after its own F or I and in the order of
    microbatches.
    """

    def __init__(self, plan: Plan, costs: Costs, memory_cap: float | None):
        self.plan, self.bound = plan, lower_bound(plan.placement, plan.microbatches, costs)
        self.per_op = plan.num_stages * plan.microbatches
        chunks = plan.num_stages / plan.num_ranks
        self.max_alive = math.inf if memory_cap is None else memory_cap * chunks * (1 + ROUNDING)
        self.actions = [
            Action(op, s, m) for op in OPS for s in range(plan.num_stages) for m in range(plan.microbatches)
        ]
        self.length = [costs.of(action) for action in self.actions]
        self.source, self.delay = [-1] * len(self.actions), [0.0] * len(self.actions)
        for number, (op, stage, _) in enumerate(self.actions):
            other = {Op.F: stage - 1, Op.I: stage + 1, Op.W: -1}[op]
            if 0 <= other < plan.num_stages:
                self.source[number] = number + (other - stage) * plan.microbatches
                self.delay[number] = costs.comm * (plan.rank_of(other) != plan.rank_of(stage))
        self.programs = [[n for step in program for n in self._numbers(step[0])] for program in plan.programs]
        self.start, self.end = [0.0] * len(self.actions), [0.0] * len(self.actions)

    def _numbers(self, action: Action) -> list[int]:
        ops = (1, 2) if action.op is Op.B else (OPS.index(action.op),)
        return [op * self.per_op + action.stage * self.plan.microbatches + action.microbatch for op in ops]

    def as_plan(self, programs: list[list[int]]) -> Plan:
        """The plan of these programs."""
        return replace(self.plan, programs=tuple(tuple((self.actions[n],) for n in program) for program in programs))

    def time(self) -> float:
        """Duration of the step, infinite on deadlock. Also sets `start` and `end` of each action."""
        self.end = [-1.0] * len(self.actions)
        start, end, source, delay, length = self.start, self.end, self.source, self.delay, self.length
        at, free = [0] * len(self.programs), [0.0] * len(self.programs)
        going = True
        while going:
            going = False
            for rank, program in enumerate(self.programs):
                position, now = at[rank], free[rank]
                for number in program[position:]:
                    other = source[number]
                    if other >= 0:
                        arrival = end[other]
                        if arrival < 0:
                            break
                        arrival += delay[number]
                        if arrival > now:
                            now = arrival
                    start[number] = now
                    end[number] = now = now + length[number]
                    position += 1
                if position > at[rank]:
                    at[rank], free[rank], going = position, now, True
        return max(free) if all(map(len, self.programs)) and at == list(map(len, self.programs)) else math.inf

    def critical(self) -> list[tuple[int, int]]:
        """(rank, position) of actions on a critical path, from the last one back.

        Only actions that start when the previous one on their rank ends: a change elsewhere cannot shorten the step.
        """
        rank = max(range(len(self.programs)), key=lambda r: self.end[self.programs[r][-1]])
        at = len(self.programs[rank]) - 1
        found = []
        while True:
            number = self.programs[rank][at]
            if at and self.end[self.programs[rank][at - 1]] >= self.start[number]:
                found.append((rank, at))
                at -= 1
            elif self.source[number] >= 0:
                number = self.source[number]
                rank = self.plan.rank_of(self.actions[number].stage)
                at = self.programs[rank].index(number)
            else:
                return found

    def move(self, rank: int, source: int, target: int) -> bool:
        """Move an action in its program; False, and no change, if that breaks an order or the rank's memory cap."""
        program = self.programs[rank]
        number = program[source]
        op, stage, microbatch = self.actions[number]
        for other in program[min(source, target) : max(source, target) + 1]:
            passed = self.actions[other]
            if other != number and passed.stage == stage and (passed.op is op or passed.microbatch == microbatch):
                return False
        program.insert(target, program.pop(source))
        if self._alive(program) <= self.max_alive:
            return True
        program.insert(source, program.pop(target))
        return False

    def _alive(self, program: list[int]) -> int:
        """Most activations alive at once, in stages."""
        alive = most = 0
        for number in program:
            if number < self.per_op:
                alive += 1
                most = max(most, alive)
            elif number >= 2 * self.per_op:
                alive -= 1
        return most


def improve(plan: Plan, costs: Costs, memory_cap: float | None, chooser: random.Random, iterations: int | None) -> Plan:
    """Move single actions of the critical path over a few neighbours; returns the best plan found.

    Late acceptance: a change is kept if the step is no longer than it was `_PATIENCE` changes ago, so that the search
    can leave a local minimum.
    """
    timed = _TimedPlan(plan, share_costs(costs, plan.num_ranks, plan.num_stages), memory_cap)
    if iterations is None:
        iterations = min(_MOST, _WORK // len(timed.actions))
    time = least = timed.time()
    best = [list(program) for program in timed.programs]
    past = [time] * _PATIENCE
    chain = timed.critical()
    for turn in range(iterations):
        if least <= timed.bound * (1 + ROUNDING) or not chain:
            break
        rank, later = chooser.choice(chain)
        places = (later, max(0, later - chooser.randint(1, _REACH)))
        source, target = places if chooser.random() < 0.5 else places[::-1]
        if not timed.move(rank, source, target):
            continue
        new = timed.time()
        if new <= max(time, past[turn % _PATIENCE]) * (1 + ROUNDING):
            time, chain = new, timed.critical()
            if time < least * (1 - ROUNDING):
                least, best = time, [list(program) for program in timed.programs]
        else:
            timed.programs[rank].insert(source, timed.programs[rank].pop(target))
        past[turn % _PATIENCE] = time
    return timed.as_plan(best)


def merge_backward_halves(plan: Plan, costs: Costs) -> Plan:
    """Merge adjacent I and W into one B, stage by stage, where that does not lengthen the step.

    A whole backward costs less than its two halves, but it sends the gradient to the previous stage later.
    """
    time = share_time(plan, costs)
    for stage in range(plan.num_stages):
        program: list[Step] = []
        for step in plan.programs[plan.rank_of(stage)]:
            follows = bool(program) and program[-1][0] == Action(Op.I, stage, step[0].microbatch)
            if follows and step[0] == Action(Op.W, stage, step[0].microbatch):
                program[-1] = (Action(Op.B, stage, step[0].microbatch),)
            else:
                program.append(step)
        rank = plan.rank_of(stage)
        merged = replace(plan, programs=(*plan.programs[:rank], tuple(program), *plan.programs[rank + 1 :]))
        if share_time(merged, costs) <= time * (1 + ROUNDING):
            plan = merged
    return plan
