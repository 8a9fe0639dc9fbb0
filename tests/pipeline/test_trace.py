"""The measured timeline: different clocks of ranks are aligned, and the file holds start and end of each action."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import engine.pipeline.executor as executor_module
import engine.pipeline.trace as trace_module
from engine.distributed.context import ParallelContext
from engine.pipeline.actions import Op
from engine.pipeline.timeline import read_timeline
from engine.pipeline.trace import clock_offset, write_timeline
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import config, layout_of, random_batches
from tests.support.harness import run_ranks


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_ranks_with_wrong_clocks_are_drawn_on_one(schedule: str, tmp_path: Path) -> None:
    """Rank r's clock is 1,000 r seconds ahead; aligned, every F starts after the F of the previous stage ended."""
    cfg = config(4, parallel_pipeline=2, parallel_tensor=2, parallel_schedule=schedule)

    def job(ctx: ParallelContext) -> Any:
        wrong = SimpleNamespace(perf_counter=lambda: time.perf_counter() + 1000.0 * ctx.pipeline.rank)
        trace_module.time = executor_module.time = wrong  # type: ignore[assignment]
        state = setup(cfg, ctx)
        assert train_step(state, random_batches(cfg, ctx, 0)).trace is None
        trace = train_step(state, random_batches(cfg, ctx, 1), traced=True).trace
        assert trace is not None
        write_timeline(tmp_path, state.plan, trace, ctx, step=2)
        return clock_offset(ctx)

    offsets = run_ranks(layout_of(cfg), job)
    assert offsets[:2] == [0.0, 0.0]
    assert offsets[2:] == pytest.approx([1000.0, 1000.0], abs=0.05)
    timeline, step = read_timeline(tmp_path)  # this verifies the order on each rank
    assert step == 2 and 0 < timeline.time < 30
    ends = {event.action: event.end for lane in timeline.lanes for event in lane}
    starts = {event.action: event.start for lane in timeline.lanes for event in lane}
    for action, start in starts.items():
        if action.op is Op.F and action.stage:
            assert start > ends[action._replace(stage=action.stage - 1)] - 0.05
