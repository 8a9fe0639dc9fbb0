"""`engine schedule`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from engine.cli.common import Help, parse
from engine.errors import EXIT_OK, ConfigError, FieldError, PlanError
from engine.pipeline.schedules import SCHEDULES, load_plan


@dataclass
class ScheduleOptions:
    """Check, simulate, draw, compare and search pipeline schedules.

    A schedule is named, searched, read from a file (--plan) or measured in a run (--from). Costs and memory are those
    of a rank's share of the model (1 / ranks of it), so all schedules can be compared.
    """

    name: Annotated[str, tyro.conf.arg(help=f"{', '.join(SCHEDULES)} or searched; empty: 1f1b")] = ""
    ranks: int = 4
    """number of pipeline ranks"""
    microbatches: int = 8
    """number of micro-batches per step"""
    chunks: int = 0
    """pipeline stages on each rank; 0: as the schedule needs, 2 for interleaved, the better of 1 and 2 for searched"""
    costs: str = ""
    """times of forward, input gradient and weight gradient of a rank's share of the model, and of a message, such as
    f=1,i=1,w=1,comm=0.1 (not set: comm 0, others 1; in any unit); f=1:1:1:1.5 for equal parts of the model in order, as
    many as ranks or a multiple"""
    memory_cap: float | None = None
    """maximum activations on a rank, in micro-batches of a rank's share: a limit for searched, a remark for other
    schedules"""
    compare: tuple[str, ...] = ()
    """names of schedules to draw below each other, instead of --name"""
    plan: Path | None = None
    """file with a plan to check and draw: text from --save, or a .csv of torch.distributed.pipelining"""
    run: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """run folder: draw its measured step above the simulation with the measured costs; schedules that are named are
    simulated with these costs too, for the run's ranks and micro-batches"""
    output: Path = Path("schedule.png")
    """picture; both a .png and a .svg file are written"""
    save: Path | None = None
    """write the plan to this file, for --plan here or --parallel.schedule in training"""
    text: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print the plan"""
    seed: int = 0
    """seed of the search; the same seed finds the same plan"""
    iterations: int | None = None
    """changes that the search tries on each of its best starts; not set: 4000, and fewer for large plans; more may find
    a shorter plan"""


HELP = Help(
    examples=(
        (
            "Compare four schedules on 4 ranks with 16 micro-batches",
            "engine schedule --compare gpipe 1f1b interleaved zb-v --ranks 4 --microbatches 16",
        ),
        (
            "Search a plan that keeps at most 4 micro-batches of activations, and save it for training",
            "engine schedule --name searched --memory-cap 4 --save plan.txt",
        ),
    ),
    groups={
        "plan": ("name", "compare", "plan", "run", "ranks", "microbatches", "chunks"),
        "simulation": ("costs", "memory_cap"),
        "search": ("seed", "iterations"),
        "output": ("output", "save", "text"),
    },
)


def run(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    import functools

    from rich.console import Console

    from engine.cli import schedule_pages as report
    from engine.pipeline.simulate import Costs

    o = parse(ScheduleOptions, args, "schedule", HELP)
    if errors := list(_schedule_errors(o)):
        raise ConfigError(errors)
    names = o.compare or ((o.name,) if o.name else () if o.plan or o.run else ("1f1b",))
    entries, costs, unit = [], Costs.parse(o.costs), ""
    ranks, microbatches = o.ranks, o.microbatches
    if o.run is not None:
        entries, costs, unit = *report.measured(o.run), "ms"
        ranks, microbatches = entries[0].plan.num_ranks, entries[0].plan.microbatches
    plan_of = functools.partial(report.plan_of, memory_cap=o.memory_cap, seed=o.seed, iterations=o.iterations)
    plans = [plan_of(name, ranks, microbatches, o.chunks or None, costs) for name in names]
    plans += [load_plan(o.plan)] if o.plan else []
    entries += [report.simulated(plan.name, plan, costs) for plan in plans]
    report.show(entries, Console(highlight=False), unit, o.memory_cap)
    if o.text:
        print("\n\n".join(map(str, dict.fromkeys(entry.plan for entry in entries))))
    written = [*report.picture(entries, o.output, unit)]
    if o.save is not None:
        report.save(entries[-1].plan, o.save)
        written.append(o.save)
    print(f"wrote {', '.join(map(str, written))}")
    return EXIT_OK


def _schedule_errors(o: ScheduleOptions) -> Iterator[FieldError]:
    """The errors of the options of `engine schedule`."""
    import difflib

    from engine.cli.schedule_pages import NAMES
    from engine.pipeline.shares import share_costs
    from engine.pipeline.simulate import Costs

    for option, name in [("--name", o.name), *(("--compare", name) for name in o.compare)]:
        if name and name not in NAMES:
            near = difflib.get_close_matches(name.lower(), NAMES, n=1, cutoff=0.0)[0]
            yield FieldError(
                "cli.unknown-choice", option, name, f"is none of {', '.join(NAMES)}", f"Did you mean {near}?"
            )
    counts = {"--ranks": (o.ranks, 1), "--microbatches": (o.microbatches, 1), "--chunks": (o.chunks, 0)}
    counts["--iterations"] = (o.iterations or 0, 0)
    bad = [
        FieldError("cli.too-small", k, v, f"is below {least}", f"Use {least} or more.")
        for k, (v, least) in counts.items()
        if v < least
    ]
    yield from bad
    needed = SCHEDULES[o.name].chunks if o.name in SCHEDULES and not o.compare else None
    if o.chunks > 0 and needed is not None and o.chunks != needed:
        text = f"{o.name} places {needed} stage{'s' if needed > 1 else ''} on each rank"
        yield FieldError(
            "cli.chunks-of-the-schedule",
            "--chunks",
            o.chunks,
            text,
            "Omit it, or choose interleaved, which takes any number.",
        )
    try:
        costs = Costs.parse(o.costs)
        if not bad and not (o.plan or o.run):
            share_costs(costs, o.ranks, o.ranks)
    except PlanError as error:
        yield FieldError("cli.bad-costs", "--costs", o.costs, str(error), "Write them as f=1,i=1,w=0.5,comm=0.1.")
    if o.memory_cap is not None and not o.memory_cap > 0:
        yield FieldError(
            "cli.not-above-zero",
            "--memory-cap",
            o.memory_cap,
            "is not above 0",
            "Give a number of micro-batches, or omit it for no cap.",
        )
    yield from _excluded(o)


def _excluded(o: ScheduleOptions) -> Iterator[FieldError]:
    """Errors of options that exclude each other, and of file names."""
    if o.output.suffix not in (".png", ".svg"):
        yield FieldError(
            "cli.no-picture-format",
            "--output",
            str(o.output),
            "is neither a .png nor a .svg file",
            "End it in .png; both are written.",
        )
    if o.name and o.compare:
        yield FieldError("cli.excludes", "--name", o.name, "excludes --compare", "Give one of them.")
    if o.costs and o.run:
        yield FieldError(
            "cli.excludes", "--costs", o.costs, "excludes --from, which has measured costs", "Give one of them."
        )
    if o.save is not None and len(o.compare) + bool(o.name) + bool(o.plan) > 1:
        yield FieldError(
            "cli.several-plans",
            "--save",
            str(o.save),
            "takes one plan, but several are given",
            "Save each plan with a separate --name.",
        )
