"""Measured timelines: the file that a training run writes, and the costs derived from it. Pure Python.

RUN/timeline.json: {"step": 3, "plan": "plan 1f1b ...", "lanes": [[["0F0", 0.0, 0.0021], ...], ...]}: for every pipeline
rank its computations in the order they ran, with start and end in seconds on one clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from engine.errors import DataError, PlanError
from engine.pipeline.actions import Action, Op, parse_action, parse_plan
from engine.pipeline.passes import compute_only
from engine.pipeline.simulate import Costs, Event, Timeline
from engine.util.files import read_json

TIMELINE_FILE = "timeline.json"


def to_json(timeline: Timeline, step: int) -> dict[str, Any]:
    """The JSON value of TIMELINE_FILE."""
    lanes = [[[str(event.action), event.start, event.end] for event in lane] for lane in timeline.lanes]
    return {"step": step, "plan": str(timeline.plan), "lanes": lanes}


def from_json(data: Mapping[str, Any]) -> tuple[Timeline, int]:
    """Parse a timeline and its step; DataError unless its events are those of the plan, with valid times."""
    try:
        plan, step = parse_plan(data["plan"]), int(data["step"])
        lanes = tuple(
            tuple(Event(parse_action(text), float(start), float(end)) for text, start, end in lane)
            for lane in data["lanes"]
        )
    except (PlanError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            "pipeline.timeline-not-valid", f"not a measured timeline ({type(error).__name__}: {error})"
        ) from None
    wanted = [[step[0] for step in program] for program in compute_only(plan).programs]
    if [[event.action for event in lane] for lane in lanes] != wanted:
        raise DataError(
            "pipeline.timeline-not-valid",
            "not a measured timeline: the actions of its lanes are not those of its plan",
        )
    for rank, lane in enumerate(lanes):
        last = -math.inf
        for event in lane:
            if not (last <= event.start <= event.end < math.inf):
                raise DataError(
                    "pipeline.timeline-not-valid",
                    f"not a measured timeline: rank {rank} has {event.action} from {event.start} to {event.end} after "
                    f"an action that ended at {last}; each must start after the previous one and end after its start",
                )
            last = event.end
    return Timeline(plan, lanes), step


def read_timeline(run: Path) -> tuple[Timeline, int]:
    """Read the timeline of a run folder; DataError that names the file if it is missing or not valid."""
    path = run / TIMELINE_FILE
    if not path.exists():
        raise DataError(
            "pipeline.timeline-missing",
            f"{run}: no {TIMELINE_FILE}; give the folder of a run that recorded a timeline (monitor.timeline_step)",
        )
    try:
        return from_json(read_json(path, links=False))
    except (ValueError, DataError) as error:
        raise DataError("pipeline.timeline-not-valid", f"{path}: {error}") from None


def measured_costs(timeline: Timeline) -> Costs:
    """Costs of each stage, and of a message, as medians over the microbatches, so that one slow action does not matter.

    For a stage with whole backwards, I and W are half of B each: only the sum was measured, and `simulate` uses only
    the sum. The cost of a message is the median time from the end of the action that produces a tensor to the start of
    the action on another rank that consumes it. Only actions whose rank was idle count: elsewhere the message was not
    the bottleneck.
    """
    ends = {event.action: event.end for lane in timeline.lanes for event in lane}
    taken: dict[tuple[Op, int], list[float]] = {}
    waits = []
    for rank, lane in enumerate(timeline.lanes):
        idle_since = -math.inf
        for event in lane:
            taken.setdefault((event.action.op, event.action.stage), []).append(event.end - event.start)
            sent = _remote_input_end(timeline, event.action, rank, ends)
            if sent is not None and sent > idle_since:
                waits.append(max(0.0, event.start - sent))
            idle_since = event.end

    def of(op: Op, stage: int) -> float:
        whole = [time / 2 for time in taken.get((Op.B, stage), ())]
        return median(taken.get((op, stage)) or (whole if op is not Op.F else ()) or [0.0])

    f, i, w = (tuple(of(op, stage) for stage in range(timeline.plan.num_stages)) for op in (Op.F, Op.I, Op.W))
    return Costs(f, i, w, median(waits) if waits else 0.0)


def _remote_input_end(timeline: Timeline, action: Action, rank: int, ends: Mapping[Action, float]) -> float | None:
    """When another rank finished computing an input of the action; None if it needs no input from another rank."""
    op, stage, microbatch = action
    neighbour = {Op.F: stage - 1, Op.W: -1}.get(op, stage + 1)
    if not 0 <= neighbour < timeline.plan.num_stages or timeline.plan.rank_of(neighbour) == rank:
        return None
    makers = (Op.F,) if op is Op.F else (Op.I, Op.B)
    return next((ends[a] for op in makers if (a := Action(op, neighbour, microbatch)) in ends), None)
