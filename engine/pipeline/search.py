"""Searched schedules: the best plan a heuristic finds for given costs and a memory cap. Pure Python, deterministic.

Never worse under `simulate` than the best named schedule that fits the cap, because those are where it starts. Beside
them stand list schedules: all ranks run in simulated time, and each rank that is free takes the ready action its rule
likes best. The best few are then improved by moving single actions, keeping what does not make the step longer.
Finding the best schedule is NP-hard; nothing here claims to have found it, `lower_bound` says how far away it may be.

Units. Schedules with different numbers of stages are compared on the same model, so costs and memory are for one
rank's share, 1 / ranks of the model: a rank's share of F takes `f`, a chunk of it f / chunks, and memory counts
microbatches of one share. `share_costs` and `share_memory` are that conversion, for all schedules alike.

Invariant: on every stage F, I and W each run in the order of the microbatches, as in the named schedules, so that
gradients are summed in the same order and no bit of the result depends on the schedule.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from engine.errors import PlanError
from engine.pipeline.actions import Action, Op, Plan, Step
from engine.pipeline.passes import compute_only
from engine.pipeline.schedules import SCHEDULES, Placement, build, looped, prove, v_shaped
from engine.pipeline.simulate import Costs, peak_memory, simulate

_ROUNDING = 1e-9  # relative: times are sums of floats, taken in different orders
_STARTS = 3  # so many plans are improved
_PATIENCE = 20  # so many changes may pass until one has to pay
_REACH = 6  # an action moves over so many others at most
_WORK = 4_000_000  # actions timed while a start is improved, if the number of iterations is not given
_MOST = 4000  # iterations at most then
_OPS = (Op.F, Op.I, Op.W)
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
    """The fastest plan found whose peak memory is at most `memory_cap` on every rank, proved and ready to run.

    chunks: stages a rank; None: one and two are tried.  placement: "looped", "v", or None for both.  costs,
    memory_cap: for one rank's share of the model (see the top).  iterations: moves tried on each of the best starts;
    None: 4000, and fewer for large plans.
    """
    if min(ranks, microbatches, chunks or 1) < 1:
        raise PlanError(f"search: ranks {ranks}, microbatches {microbatches}, chunks {chunks} must be >= 1")
    share_costs(costs, ranks, ranks)  # complains about costs that do not fit before any work
    wheres = placements(ranks, chunks, placement)
    bound = min(lower_bound(where, microbatches, share_costs(costs, ranks, len(where))) for where in wheres)
    plans = [*named(ranks, microbatches, chunks, placement)]
    if not any(_fits(plan, memory_cap) and _time(plan, costs) <= bound * (1 + _ROUNDING) for plan in plans):
        for where in wheres:
            plans += _list_schedules(where, ranks, microbatches, costs, memory_cap)
    fitting = [plan for plan in plans if _fits(plan, memory_cap)]
    if not fitting:
        least = min(max(share_memory(plan)) for plan in plans)
        raise PlanError(
            f"no schedule of {microbatches} microbatches on {ranks} ranks fits a memory cap of {memory_cap:g} "
            f"microbatches of one rank's share; the least that is known is {least:g}. Set the cap to that or more"
        )
    # Sorting is stable: of equals the first stays first, and the named ones come first.
    ranked = sorted(fitting, key=lambda plan: _time(plan, costs))
    chooser = random.Random(seed)
    starts = _distinct(ranked)[:_STARTS] if _time(ranked[0], costs) > bound * (1 + _ROUNDING) else []
    improved = [_improve(compute_only(plan), costs, memory_cap, chooser, iterations) for plan in starts]
    best = min((ranked[0], *improved), key=lambda plan: _time(plan, costs) * (1 + _ROUNDING * (plan is not ranked[0])))
    if best is not ranked[0] or best.name == "list":
        best = _merge(best, costs)
    return prove(replace(compute_only(best), name="searched"))


def named(ranks: int, microbatches: int, chunks: int | None = None, placement: str | None = None) -> Iterator[Plan]:
    """Every named schedule on the placements that are asked for."""
    wanted = set(placements(ranks, chunks, placement))
    for name, schedule in SCHEDULES.items():
        for count in _CHUNKS if chunks is None else (chunks,):
            if schedule.chunks in (None, count) and schedule.placement(ranks, count) in wanted:
                yield build(name, ranks, count, microbatches)


def placements(ranks: int, chunks: int | None = None, placement: str | None = None) -> list[Placement]:
    """Straight (looped with one chunk), looped and V placements with that many chunks; PlanError if there is none."""
    found = [
        shape(ranks, count)
        for count in (_CHUNKS if chunks is None else (chunks,))
        for kind, shape in (("looped", looped), ("v", v_shaped))
        if placement in (None, kind) and (kind == "looped" or count == 2)
    ]
    if not found:
        raise PlanError(
            f"placement {placement!r} with chunks = {chunks}: there is looped, with any number, and v, with 2"
        )
    return list(dict.fromkeys(found))


def share_costs(costs: Costs, ranks: int, stages: int) -> Costs:
    """Costs of each of `stages` stages, from costs of one rank's share.

    One number is what 1 / ranks of the model takes. A list of n numbers says what each of n equal parts of the model
    takes, in order (n a multiple of ranks); stages that are larger or smaller than a part take the sum or the fraction.
    """

    def spread(name: str, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(values) == 1:
            return (values[0] * ranks / stages,)
        if len(values) % ranks and len(values) != stages:
            raise PlanError(
                f"cost {name} has {len(values)} numbers for {ranks} ranks: give one, for a rank's share of the model, "
                f"or one for each of {ranks}, {2 * ranks}, ... equal parts of it"
            )
        parts = len(values)
        if parts % stages == 0:
            size = parts // stages
            return tuple(sum(values[s * size : (s + 1) * size]) for s in range(stages))
        # In units of 1 / (parts * stages) of the model, so that all borders are whole numbers.
        pieces = [values[x // stages] / stages for x in range(parts * stages)]
        return tuple(sum(pieces[s * parts : (s + 1) * parts]) for s in range(stages))

    costs = Costs(spread("f", costs.f), spread("i", costs.i), spread("w", costs.w), costs.comm)
    costs.check(stages)
    return costs


def share_memory(plan: Plan) -> list[float]:
    """For each rank the most activations alive at once, in microbatches of one rank's share of the model."""
    return peak_memory(plan, (plan.num_ranks / plan.num_stages,))


def lower_bound(placement: Placement, microbatches: int, costs: Costs, backward: bool = True) -> float:
    """A time that no plan on this placement can beat: of the ranks, the longest way to its first forward and its work.

    At least the time that the busiest rank computes. `costs` are those of the stages.
    """
    ops = _OPS if backward else (Op.F,)
    bound = way = 0.0  # way: until the first microbatch can be at the stage
    for stage, rank in enumerate(placement):
        if rank not in placement[:stage]:
            held = [s for s, holder in enumerate(placement) if holder == rank]
            work = sum(costs.of(Action(op, s, 0)) for op in ops for s in held)
            bound = max(bound, way + work * microbatches)
        away = placement[stage + 1 : stage + 2] != (rank,)
        way += costs.of(Action(Op.F, stage, 0)) + costs.comm * away
    return bound


def _time(plan: Plan, costs: Costs) -> float:
    return simulate(plan, share_costs(costs, plan.num_ranks, plan.num_stages)).time


def _fits(plan: Plan, memory_cap: float | None) -> bool:
    return memory_cap is None or max(share_memory(plan)) <= memory_cap * (1 + _ROUNDING)


def _distinct(plans: list[Plan]) -> list[Plan]:
    """The plans without repetitions, the best of each placement first: the best start need not be the fastest plan."""
    first = {plan.placement: plan for plan in reversed(plans)}
    rest = {plan.programs: plan for plan in plans if all(plan is not other for other in first.values())}
    return [*(plan for plan in plans if plan is first[plan.placement]), *rest.values()]


# List schedules


@dataclass(frozen=True)
class _Rule:
    """What a rank does next when there is a choice.

    forward_first: F before I while there is room.  deep_first: of several chunks, the one nearest to the end.
    patience: a W is started only if no other action is known to become ready in this share of its time.
    room: activations of one stage a rank may hold.  taper: rank r may hold `taper` x r fewer.
    """

    forward_first: bool
    deep_first: bool
    patience: float
    room: int
    taper: int


def _list_schedules(
    placement: Placement, ranks: int, microbatches: int, costs: Costs, memory_cap: float | None
) -> Iterator[Plan]:
    """One plan for each rule."""
    chunks = len(placement) // ranks
    most = microbatches * chunks
    if memory_cap is not None:
        most = min(most, max(chunks, int(memory_cap * chunks * (1 + _ROUNDING))))
    rooms = {min(most, chunks * room) for room in (ranks, ranks + 1, 3 * ranks // 2, 2 * ranks - 1)} | {most}
    stage_costs = share_costs(costs, ranks, len(placement))
    seen: set[tuple[tuple[Step, ...], ...]] = set()
    for forward_first, deep_first, patience, room, taper in product(
        (False, True), (True, False) if chunks > 1 else (True,), (0.0, 1.0), sorted(rooms), (0, 1)
    ):
        rule = _Rule(forward_first, deep_first, patience, room, taper)
        plan = _ListRun(placement, ranks, microbatches, stage_costs, rule).run()
        if plan.programs not in seen:
            seen.add(plan.programs)
            yield plan


class _ListRun:
    """One run of a rule: simulated time goes on, and each free rank takes the ready action that the rule prefers.

    It cannot get stuck: a forward leaves room for one activation of each later chunk of its rank, so that what is
    furthest along can always go on to the end, and is freed on its way back.
    """

    def __init__(self, placement: Placement, ranks: int, microbatches: int, costs: Costs, rule: _Rule):
        self.placement, self.microbatches, self.costs, self.rule = placement, microbatches, costs, rule
        self.stages = [[s for s, holder in enumerate(placement) if holder == rank] for rank in range(ranks)]
        self.room = [max(len(held), rule.room - rule.taper * rank) for rank, held in enumerate(self.stages)]
        self.arrived = {  # when the input of F or I of each (stage, microbatch) is on its rank
            Op.F: [[0.0 if stage == 0 else math.inf] * microbatches for stage in range(len(placement))],
            Op.I: [[math.inf] * microbatches for _ in placement],
        }
        self.done = {op: [0] * len(placement) for op in (Op.F, Op.I, Op.W)}  # microbatches of each stage
        self.programs: list[list[Step]] = [[] for _ in range(ranks)]

    def run(self) -> Plan:
        """From event to event: a rank looks for work when it ends an action and when a message reaches it."""
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
            if op is Op.F and stage + 1 == len(self.placement):  # it turns round: the loss needs no other rank
                self.arrived[Op.I][stage][microbatch] = end
            elif op is not Op.W and (op is Op.F or stage):
                target = stage + 1 if op is Op.F else stage - 1
                when = end + self.costs.comm * (self.placement[target] != rank)
                self.arrived[op][target][microbatch] = when
                heapq.heappush(events, (when, self.placement[target]))
        return Plan("list", self.microbatches, self.placement, tuple(map(tuple, self.programs)))

    def _choose(self, rank: int, now: float) -> Action | None:
        """What a free rank starts now; None to wait for what comes."""
        stages, done = self.stages[rank], self.done
        room = self.room[rank] - sum(done[Op.F][stage] - done[Op.W][stage] for stage in stages)
        forwards, inputs, weights = [], [], []
        soon = math.inf  # when the next F or I is known to be ready
        for chunk, stage in enumerate(stages):
            forward, back, weight = done[Op.F][stage], done[Op.I][stage], done[Op.W][stage]
            if forward < self.microbatches and room >= len(stages) - chunk:
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


# Local improvement


class _Board:
    """A plan as numbers, to try thousands of small changes: timing as in `simulate`, which has the last word.

    An action is (op * stages + stage) * microbatches + microbatch, op 0, 1, 2 for F, I, W; B becomes I and W. Each
    waits for at most one action of another rank (or chunk); that it comes after its own F or I, and in the order of
    microbatches, `swap` keeps.
    """

    def __init__(self, plan: Plan, costs: Costs, memory_cap: float | None):
        self.plan, self.bound = plan, lower_bound(plan.placement, plan.microbatches, costs)
        self.per_op = plan.num_stages * plan.microbatches
        chunks = plan.num_stages / plan.num_ranks
        self.room = math.inf if memory_cap is None else memory_cap * chunks * (1 + _ROUNDING)
        self.actions = [
            Action(op, s, m) for op in _OPS for s in range(plan.num_stages) for m in range(plan.microbatches)
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
        ops = (1, 2) if action.op is Op.B else (_OPS.index(action.op),)
        return [op * self.per_op + action.stage * self.plan.microbatches + action.microbatch for op in ops]

    def as_plan(self, programs: list[list[int]]) -> Plan:
        """The plan that these programs stand for."""
        return replace(self.plan, programs=tuple(tuple((self.actions[n],) for n in program) for program in programs))

    def time(self) -> float:
        """How long the step takes; infinite if the ranks wait for each other. Leaves start and end of each action."""
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
        """(rank, position) of the actions on a longest chain of what waits for what, from the last one back.

        Those that start right when the one before them on their rank ends: only there can a change shorten the step.
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
        """Moves an action to another place in its program, unless that breaks an order or the room of its rank."""
        program = self.programs[rank]
        number = program[source]
        op, stage, microbatch = self.actions[number]
        for other in program[min(source, target) : max(source, target) + 1]:
            beside = self.actions[other]
            if other != number and beside.stage == stage and (beside.op is op or beside.microbatch == microbatch):
                return False
        program.insert(target, program.pop(source))
        if self._alive(program) <= self.room:
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


def _improve(
    plan: Plan, costs: Costs, memory_cap: float | None, chooser: random.Random, iterations: int | None
) -> Plan:
    """Moves single actions on the longest chain over a few neighbours, and keeps the best plan that comes of it.

    Late acceptance: a change is kept if the step is no longer than it was some changes ago, so that the search can
    leave a place from which every single move leads up.
    """
    board = _Board(plan, share_costs(costs, plan.num_ranks, plan.num_stages), memory_cap)
    if iterations is None:
        iterations = min(_MOST, _WORK // len(board.actions))
    time = least = board.time()
    best = [list(program) for program in board.programs]
    past = [time] * _PATIENCE
    chain = board.critical()
    for turn in range(iterations):
        if least <= board.bound * (1 + _ROUNDING) or not chain:
            break
        rank, later = chooser.choice(chain)
        places = (later, max(0, later - chooser.randint(1, _REACH)))
        source, target = places if chooser.random() < 0.5 else places[::-1]
        if not board.move(rank, source, target):
            continue
        new = board.time()
        if new <= max(time, past[turn % _PATIENCE]) * (1 + _ROUNDING):
            time, chain = new, board.critical()
            if time < least * (1 - _ROUNDING):
                least, best = time, [list(program) for program in board.programs]
        else:
            board.programs[rank].insert(source, board.programs[rank].pop(target))
        past[turn % _PATIENCE] = time
    return board.as_plan(best)


def _merge(plan: Plan, costs: Costs) -> Plan:
    """Writes I and W that follow each other as one B, stage by stage, where that does not make the step longer.

    A whole backward costs a run less than its halves, but the gradient it makes for the stage above leaves later.
    """
    time = _time(plan, costs)
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
        if _time(merged, costs) <= time * (1 + _ROUNDING):
            plan = merged
    return plan
