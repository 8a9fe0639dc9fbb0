"""Table and picture of `engine schedule`: plans by name, from files or from runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.pipeline.actions import Plan
from engine.pipeline.schedules import SCHEDULES, build
from engine.pipeline.search import search
from engine.pipeline.shares import lower_bound, share_costs, share_memory
from engine.pipeline.simulate import Costs, Event, Timeline, simulate
from engine.pipeline.timeline import measured_costs, read_timeline

if TYPE_CHECKING:
    from rich.console import Console

SEARCHED = "searched"
NAMES = (*SCHEDULES, SEARCHED)
_DEFAULT_CHUNKS = 2  # for schedules that take any number


@dataclass(frozen=True)
class TimelineRow:
    """A row of the table: label, timeline, and a lower bound on the time of any plan with the same placement."""

    label: str
    timeline: Timeline
    bound: float

    @property
    def plan(self) -> Plan:
        return self.timeline.plan

    def title(self, unit: str) -> str:
        """Title of its picture."""
        timeline = self.timeline
        time = f"{timeline.time:.4g}{f' {unit}' if unit else ''}"
        return (
            f"{self.label}: time {time}, bubble {timeline.bubble:.1%}, peak memory {max(share_memory(self.plan)):.3g}"
        )


def plan_of(
    name: str,
    ranks: int,
    microbatches: int,
    chunks: int | None,
    costs: Costs,
    *,
    memory_cap: float | None = None,
    seed: int = 0,
    iterations: int | None = None,
) -> Plan:
    """Build the plan of one of NAMES. `chunks` is used by schedules that take any number of chunks."""
    if name == SEARCHED:
        return search(
            ranks, microbatches, costs, chunks=chunks, memory_cap=memory_cap, seed=seed, iterations=iterations
        )
    return build(name, ranks, SCHEDULES[name].chunks or chunks or _DEFAULT_CHUNKS, microbatches)


def simulated(label: str, plan: Plan, costs: Costs) -> TimelineRow:
    """Simulate a plan. costs: of a rank's share of the model (shares.share_costs)."""
    stage_costs = share_costs(costs, plan.num_ranks, plan.num_stages)
    return TimelineRow(label, simulate(plan, stage_costs), _bound(plan, stage_costs))


def _bound(plan: Plan, stage_costs: Costs) -> float:
    return lower_bound(plan.placement, plan.microbatches, stage_costs, plan.backward)


def measured(run: Path) -> tuple[list[TimelineRow], Costs]:
    """(rows, costs in ms): the measured step of a run, and its plan simulated with the measured costs."""
    seconds, step = read_timeline(run)
    lanes = tuple(tuple(Event(e.action, e.start * 1e3, e.end * 1e3) for e in lane) for lane in seconds.lanes)
    timeline = replace(seconds, lanes=lanes)
    costs, name = measured_costs(timeline), timeline.plan.name
    bound = _bound(timeline.plan, costs)
    entries = [
        TimelineRow(f"{name}, step {step} measured", timeline, bound),
        TimelineRow(f"{name} simulated with its costs", simulate(timeline.plan, costs), bound),
    ]
    return entries, costs


def show(entries: Sequence[TimelineRow], console: Console, unit: str = "", memory_cap: float | None = None) -> None:
    """Print time, lower bound, bubble and memory of each row as a table. unit: of the times."""
    from rich.table import Table

    table = Table("schedule", "ranks x stages", f"time{f' ({unit})' if unit else ''}", "lower bound", "bubble")
    table.add_column("peak memory of each rank")
    for entry in entries:
        peaks = share_memory(entry.plan)
        memory = " ".join(f"{peak:.3g}" for peak in peaks)
        if len(peaks) > 8:
            memory = f"{min(peaks):.3g} to {max(peaks):.3g}"
        if memory_cap is not None and max(peaks) > memory_cap * (1 + 1e-9):
            memory += f" (above the cap {memory_cap:g})"
        timeline = entry.timeline
        shape = f"{entry.plan.num_ranks} x {entry.plan.num_stages / entry.plan.num_ranks:.3g}"
        table.add_row(
            entry.label, shape, f"{timeline.time:.4g}", f"{entry.bound:.4g}", f"{timeline.bubble:.1%}", memory
        )
    console.print(table)


def save(plan: Plan, path: Path) -> None:
    """Write the plan's text, including its communication."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{plan}\n", encoding="utf-8")


def picture(entries: Sequence[TimelineRow], output: Path, unit: str = "") -> tuple[Path, Path]:
    """Draw the rows to a PNG and an SVG file of that name; returns both paths."""
    from engine.pipeline.draw import draw

    paths = (output.with_suffix(".png"), output.with_suffix(".svg"))
    for path in paths:
        draw([(entry.title(unit), entry.timeline) for entry in entries], path, unit)
    return paths
