"""The measured timeline of one training step: every rank's computations on one clock, for `engine schedule --from`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from engine.distributed.collectives import gather_json, post
from engine.distributed.context import ParallelContext
from engine.pipeline.actions import Plan, parse_action
from engine.pipeline.executor import ExecutionTrace
from engine.pipeline.simulate import Event, Timeline
from engine.pipeline.timeline import TIMELINE_FILE, to_json
from engine.util.files import write_synced

_ROUNDS = 8


def write_timeline(run_dir: Path, plan: Plan, trace: ExecutionTrace, ctx: ParallelContext, step: int) -> None:
    """Write RUN/timeline.json from the traces of the pipeline with data and tensor rank 0. Collective."""
    offset = clock_offset(ctx)
    mine = [(str(action), start - offset, end - offset) for action, start, end in trace.events()]
    lanes = gather_json(mine, ctx.pipeline, ctx.device)
    if ctx.rank == 0:
        zero = min((start for lane in lanes for _, start, _ in lane), default=0.0)
        timeline = Timeline(plan, tuple(_events(lane, zero) for lane in lanes))
        write_synced(run_dir / TIMELINE_FILE, json.dumps(to_json(timeline, step)).encode())


def _events(lane: list[tuple[str, float, float]], zero: float) -> tuple[Event, ...]:
    return tuple(Event(parse_action(action), start - zero, end - zero) for action, start, end in lane)


def clock_offset(ctx: ParallelContext) -> float:
    """Seconds by which this rank's clock is ahead of the clock of its pipeline's first rank. Collective.

    Every rank answers the first rank's messages with its time. The fastest of several rounds counts, and the answer is
    taken to be made halfway between request and reply (Cristian 1989). The error is at most half of that round trip. 0
    on the first rank.
    """
    axis = ctx.pipeline
    offset = 0.0
    clock = torch.zeros(1, dtype=torch.float64, device=ctx.device)
    for other in range(1, axis.size):
        best = float("inf")
        for _ in range(_ROUNDS):
            if axis.rank == 0:
                asked = time.perf_counter()
                post([(clock, other)], [], axis)[0][0].wait()
                theirs = float(post([], [(clock, other)], axis)[1][0].wait().item())
                took = time.perf_counter() - asked
                if took < best:
                    best, offset = took, theirs - (asked + took / 2)
            elif axis.rank == other:
                post([], [(clock, 0)], axis)[1][0].wait().item()
                clock.fill_(time.perf_counter())
                post([(clock, 0)], [], axis)[0][0].wait()
        if axis.rank == 0:
            clock.fill_(offset)
            post([(clock, other)], [], axis)[0][0].wait()
        elif axis.rank == other:
            offset = float(post([], [(clock, 0)], axis)[1][0].wait().item())
    return offset if axis.rank else 0.0
