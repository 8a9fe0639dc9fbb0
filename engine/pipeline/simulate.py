"""Simulated time, bubble and memory of a plan, from the costs of F, I, W and of a message. Pure Python.

The model: a rank computes one action at a time in program order. An action starts when its rank is free and its inputs
have arrived. A message arrives `comm` after the computation that produces it and costs no compute time. B takes as long
as I and W together. Sends never block in this model; `check` proves that the plan does not need them to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from engine.errors import PlanError
from engine.pipeline.actions import Action, Op, Plan
from engine.pipeline.passes import compute_only


@dataclass(frozen=True)
class Costs:
    """Time of F, I and W of each stage and of a message between ranks, all in the same unit.

    f, i, w: one number for all stages, or one for each.
    """

    f: tuple[float, ...] = (1.0,)
    i: tuple[float, ...] = (1.0,)
    w: tuple[float, ...] = (1.0,)
    comm: float = 0.0

    def of(self, action: Action) -> float:
        """Duration of a computation."""
        parts = {Op.F: (self.f,), Op.I: (self.i,), Op.W: (self.w,), Op.B: (self.i, self.w)}[action.op]
        return sum(part[action.stage % len(part)] for part in parts)

    def check(self, num_stages: int) -> None:
        """Raise PlanError unless each cost is one number or one for each stage, finite and not negative."""
        for field in fields(self):
            values = getattr(self, field.name)
            values = values if isinstance(values, tuple) else (values,)
            if len(values) not in (1, num_stages) or not all(0 <= value < math.inf for value in values):
                raise PlanError(
                    "pipeline.costs-not-valid",
                    f"cost {field.name} = {':'.join(map(str, values))}: give one number for all stages or one for each "
                    f"of the {num_stages}, finite and none below 0",
                )

    @classmethod
    def parse(cls, text: str) -> Costs:
        """Parse `f=1,i=1,w=0.5,comm=0.1`; colons separate numbers per stage: `f=1:1:1:2.5`."""
        found: dict[str, tuple[float, ...]] = {}
        for part in filter(None, text.split(",")):
            name, equals, values = part.partition("=")
            try:
                found[name.strip()] = tuple(float(value) for value in values.split(":"))
            except ValueError:
                equals = ""
            if not equals or name.strip() not in ("f", "i", "w", "comm"):
                raise PlanError(
                    "pipeline.costs-not-valid",
                    f"{part!r} in costs {text!r}: expected f=, i=, w= or comm= with numbers, such as f=1,i=1",
                )
        if len(found.get("comm", (0.0,))) > 1:
            raise PlanError("pipeline.costs-not-valid", f"costs {text!r}: comm must be a single number")
        return cls(found.get("f", cls.f), found.get("i", cls.i), found.get("w", cls.w), found.get("comm", (0.0,))[0])


@dataclass(frozen=True)
class Event:
    """One computation on one rank, from start to end."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Start and end of every computation, simulated or measured. lanes: the events of each rank in time order."""

    plan: Plan
    lanes: tuple[tuple[Event, ...], ...]

    @property
    def time(self) -> float:
        """From the first start to the last end on any rank: all ranks wait for the slowest before the optimizer."""
        ends = [event.end for lane in self.lanes for event in lane]
        return max(ends, default=0.0) - min((event.start for lane in self.lanes for event in lane), default=0.0)

    @property
    def busy(self) -> tuple[float, ...]:
        """Time that each rank computes."""
        return tuple(sum(event.end - event.start for event in lane) for lane in self.lanes)

    @property
    def idle(self) -> tuple[float, ...]:
        """Time that each rank does not compute."""
        return tuple(self.time - busy for busy in self.busy)

    @property
    def bubble(self) -> float:
        """Fraction of the ranks' total time in which they do not compute."""
        return sum(self.idle) / (self.time * len(self.lanes)) if self.time else 0.0


def simulate(plan: Plan, costs: Costs | None = None) -> Timeline:
    """The timeline of a plan's computations at these costs. Raises PlanError if they cannot be ordered."""
    costs = costs or Costs()
    costs.check(plan.num_stages)
    programs = [[step[0] for step in program] for program in compute_only(plan).programs]
    lanes: list[list[Event]] = [[] for _ in programs]
    made: dict[tuple[bool, int, int], float] = {}  # (is forward, stage, microbatch) -> end of its computation
    free = [0.0] * plan.num_ranks
    left = sum(map(len, programs))
    while left:
        before = left
        for rank, program in enumerate(programs):
            while len(lanes[rank]) < len(program):
                action = program[len(lanes[rank])]
                ready = _ready(plan, action, made, costs.comm)
                if ready is None:
                    break
                start = max(free[rank], ready)
                free[rank] = start + costs.of(action)
                lanes[rank].append(Event(action, start, free[rank]))
                if action.op is not Op.W:
                    made[action.op is Op.F, action.stage, action.microbatch] = free[rank]
                left -= 1
        if left == before:
            raise PlanError(
                "pipeline.not-orderable", f"plan {plan.name!r}: its computations cannot be ordered; `check` says where"
            )
    return Timeline(plan, tuple(map(tuple, lanes)))


def _ready(plan: Plan, action: Action, made: Mapping[tuple[bool, int, int], float], comm: float) -> float | None:
    """When all inputs of an action are on its rank; None while one has not been computed."""
    op, stage, microbatch = action
    if op is Op.F:
        return _arrival(plan, stage, (True, stage - 1, microbatch), made, comm) if stage else 0.0
    own = made.get((op is not Op.W, stage, microbatch))  # W follows its I, a backward its F
    if own is None or op is Op.W or stage + 1 == plan.num_stages:
        return own
    arrival = _arrival(plan, stage, (False, stage + 1, microbatch), made, comm)
    return None if arrival is None else max(own, arrival)


def _arrival(
    plan: Plan, stage: int, source: tuple[bool, int, int], made: Mapping[tuple[bool, int, int], float], comm: float
) -> float | None:
    when = made.get(source)
    if when is None:
        return None
    return when if plan.rank_of(source[1]) == plan.rank_of(stage) else when + comm


def peak_memory(plan: Plan, sizes: Sequence[float] = (1.0,), kept_for_w: float = 1.0) -> list[float]:
    """For each rank, the most activations alive at once; by default in microbatches of one stage. See `live_memory`."""
    return [max(live, default=0.0) for live in live_memory(plan, sizes, kept_for_w)]


def live_memory(plan: Plan, sizes: Sequence[float] = (1.0,), kept_for_w: float = 1.0) -> list[list[float]]:
    """For each rank, the activations alive after each of its steps; received tensors not yet used are not counted.

    sizes: size of one microbatch's activations on each stage (one number: the same on all). F allocates them, B or W
    frees them; I frees all but the fraction `kept_for_w`. Without backward only one microbatch is alive at a time.
    """
    changes = {Op.F: 1.0, Op.B: -1.0, Op.I: kept_for_w - 1.0, Op.W: -kept_for_w}
    alive: list[list[float]] = []
    for program in plan.programs:
        live, lives = 0.0, []
        for step in program:
            op, stage, _ = step[0]
            change = changes.get(op, 0.0) * sizes[stage % len(sizes)]
            live = live + change if plan.backward or not change else change
            lives.append(live)
        alive.append(lives)
    return alive
