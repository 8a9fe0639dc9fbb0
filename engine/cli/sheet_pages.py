"""What `engine train --dry-run` says about memory: the sheet, whether it fits, changes that make it fit, formulas."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Column, Table

from engine.cli.sheet_options import SheetOptions
from engine.config.derived import Derived
from engine.config.load import Resolved
from engine.config.tree import value_at
from engine.model.build import stage_shapes
from engine.planner.fit import Change, changes_that_fit
from engine.planner.flops import flops_per_token
from engine.planner.formulas import formula
from engine.planner.sheet import RESERVE_GIB, TERMS, RankSheet, biggest, checkpoint_bytes

GIB = 2**30
PEAK_TFLOPS = 989.0  # bf16, dense, of an H100 SXM: for days where monitor.peak_tflops is not set


@dataclass(frozen=True)
class Verdict:
    """Whether the heaviest rank fits a device. needed, available: bytes. changes: that make it fit, if it does not."""

    needed: int
    available: int
    changes: tuple[Change, ...]

    @property
    def fits(self) -> bool:
        """Whether the peak and the reserve are within the memory."""
        return self.needed <= self.available


def on_gpu(resolved: Resolved) -> Resolved:
    """The same run on GPUs: a sheet without them is of the device that train.precision is for."""
    train = resolved.config.train.model_copy(update={"device": "cuda"})
    return replace(resolved, config=resolved.config.model_copy(update={"train": train}))


def judge(resolved: Resolved, found: Sequence[RankSheet], gpu_memory: float) -> Verdict:
    """Compare the heaviest rank with `gpu_memory` GiB, of which RESERVE_GIB are for what the sheet does not count."""
    available, needed = int((gpu_memory - RESERVE_GIB) * GIB), max(sheet.peak.total for sheet in found)
    changes = () if needed <= available else changes_that_fit(resolved.config, resolved.derived, available)
    return Verdict(needed, available, tuple(changes))


def ranks_of(derived: Derived, rank: int) -> tuple[int, int]:
    """The first and last rank of a pipeline rank."""
    first = derived.layout.rank({"pipeline": rank})
    return first, first + derived.layout.world // derived.layout.pipeline - 1


def stages_of(derived: Derived, rank: int) -> str:
    """What the stages of a pipeline rank hold: `embedding, layers 0..3`."""
    texts, shapes = [], stage_shapes(derived.layers)
    for shape in (shapes[stage] for stage in derived.first_plan.stages_of(rank)):
        layers = f"layers {shape.layers.start}..{shape.layers.stop - 1}" if shape.layers else "no layers"
        texts.append(("embedding, " if shape.first else "") + layers + (", head" if shape.last else ""))
    return "; ".join(texts)


def parameters_of(sheet: RankSheet) -> int:
    """Parameters that a rank holds, without padding."""
    return sum(math.prod(spec.local_shape()) for spec in sheet.states.specs)


def table(derived: Derived, found: Sequence[RankSheet]) -> Table:
    """The layout and the memory of each pipeline rank."""
    columns = ("ranks", "stages", Column("parameters", no_wrap=True), "state", "activations", "peak")
    made = Table(*columns, title="Layout, and memory of each rank in GiB")
    made.title_justify = "left"
    for sheet in found:
        first, last = ranks_of(derived, sheet.rank)
        sizes = (sum(sheet.state.values()), sheet.activations, sheet.peak.total)
        memory = (f"{size / GIB:,.3f}" for size in sizes)
        made.add_row(f"{first}..{last}", stages_of(derived, sheet.rank), f"{parameters_of(sheet):,}", *memory)
    return made


def memory_lines(resolved: Resolved, found: Sequence[RankSheet]) -> Iterator[str]:
    """The terms of the heaviest rank, largest first, host memory, and the size of a checkpoint."""
    heaviest = max(found, key=lambda sheet: sheet.peak.total)
    first, last = ranks_of(resolved.derived, heaviest.rank)
    yield f"peak of {heaviest.peak.total / GIB:,.3f} GiB on ranks {first}..{last}: {heaviest.peak.where}"
    for name, size in biggest(heaviest.peak.terms):
        yield f"  {name:<12}{size / GIB:>9,.3f} GiB  {TERMS[name]}"
    host = ", ".join(f"{name} {size / GIB:,.3f} GiB" for name, size in heaviest.host.items())
    yield f"host memory per rank: {host}"
    yield f"checkpoint: {checkpoint_bytes(resolved.config) / GIB:,.3f} GiB"


def days(resolved: Resolved, mfu: float) -> float | None:
    """Days of the run at an MFU in percent of a device's peak; None for a CPU whose peak is not given."""
    cfg, derived = resolved.config, resolved.derived
    peak = cfg.monitor.peak_tflops or (0.0 if cfg.train.precision in ("fp32", "fp64") else PEAK_TFLOPS)
    if not peak:
        return None
    flops = 0.0
    for phase, after in zip(derived.phases.phases, [*derived.phases.phases[1:], None]):
        end = cfg.train.steps if after is None else min(cfg.train.steps, after.first_step - 1)
        steps = max(0, end - phase.first_step + 1)
        flops += steps * phase.tokens * flops_per_token(cfg.model, phase.seq_len)
    return flops / (peak * 1e12 * mfu / 100 * derived.layout.world) / 86400


def day_line(resolved: Resolved, mfu: float) -> Iterator[str]:
    """The line about the length of the run, if the peak of a device is known."""
    if (length := days(resolved, mfu)) is not None:
        peak = resolved.config.monitor.peak_tflops or PEAK_TFLOPS
        whose = "monitor.peak_tflops" if resolved.config.monitor.peak_tflops else "H100, bf16"
        yield f"days: {length:,.2f} at {mfu:g} % MFU of {peak:g} TFLOP/s ({whose}) a rank"


def verdict_lines(verdict: Verdict, gpu_memory: float) -> Iterator[str]:
    """Whether it fits; if not, by how much, and the cheapest changes that make it fit."""
    spare = (verdict.available - verdict.needed) / GIB
    held = f"{verdict.needed / GIB:,.2f} GiB, and {RESERVE_GIB:g} for CUDA, NCCL and fragmentation"
    if verdict.fits:
        yield f"fits into {gpu_memory:g} GiB, {spare:,.2f} are left: {held}"
        return
    yield f"does not fit into {gpu_memory:g} GiB, {-spare:,.2f} too much: {held}"
    if not verdict.changes:
        yield "no change of recomputation, layout or micro-batch makes it fit: use more ranks"
    for number, change in enumerate(verdict.changes, 1):
        yield f"{number}. {' '.join(_words(change))}"
        yield f"   peak {change.peak / GIB:,.2f} GiB, time {change.price:+.1%}"
        yield from (f"   {reason}" for reason in change.reasons)


def _words(change: Change) -> Iterator[str]:
    """The settings of a change as options of the command line."""
    for path, value in change.settings.items():
        yield f"--{path.replace('_', '-')} {str(value).lower()}"


def explained(resolved: Resolved, found: Sequence[RankSheet], term: str) -> Iterator[str]:
    """The formula of a term with the numbers of each pipeline rank."""
    yield f"{term}: {TERMS[term]}"
    for sheet in found:
        first, last = ranks_of(resolved.derived, sheet.rank)
        sizes = {**sheet.peak.terms, **sheet.host, "checkpoint": sheet.checkpoint}
        yield f"ranks {first}..{last}: {sizes.get(term, 0) / GIB:,.3f} GiB"
        yield from (f"  {line}" for line in formula(term, resolved.config, sheet))


def as_fields(
    resolved: Resolved, found: Sequence[RankSheet], options: SheetOptions, verdict: Verdict | None
) -> dict[str, Any]:
    """The dry run as one JSON object; sizes in bytes."""
    cfg, derived = resolved.config, resolved.derived
    result: dict[str, Any] = {
        "ranks": derived.layout.world,
        "layout": derived.layout.degrees,
        "settings": {
            path: {"value": value_at(cfg, path), "from": source}
            for path, source in resolved.sources.items()
            if source != "default"
        },
        "pipeline_ranks": [_sheet_fields(derived, sheet) for sheet in found],
        "checkpoint_bytes": checkpoint_bytes(cfg),
        "tokens": derived.phases.consumed(cfg.train.steps).tokens,
        "days": days(resolved, options.mfu),
        "mfu": options.mfu,
    }
    if options.explain:
        result["explain"] = list(explained(resolved, found, options.explain))
    if verdict is not None:
        result |= {"fits": verdict.fits, "needed_bytes": verdict.needed, "available_bytes": verdict.available}
        result["changes"] = [asdict(change) for change in verdict.changes]
    return result


def _sheet_fields(derived: Derived, sheet: RankSheet) -> Mapping[str, Any]:
    first, last = ranks_of(derived, sheet.rank)
    return {
        "first_rank": first,
        "last_rank": last,
        "stages": list(sheet.stages),
        "parameters": parameters_of(sheet),
        "state": sheet.state,
        "peak_bytes": sheet.peak.total,
        "peak": sheet.peak.terms,
        "where": sheet.peak.where,
        "host": sheet.host,
        "checkpoint_bytes": sheet.checkpoint,
    }
