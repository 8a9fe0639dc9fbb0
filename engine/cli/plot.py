"""`engine plot`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from engine.cli.common import Help, parse
from engine.errors import EXIT_OK


@dataclass
class PlotOptions:
    """Draw the training and validation loss of one or more runs.

    Reads the metrics.jsonl of each run folder.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders, one curve each"""
    output: Path = Path("loss.png")
    """PNG or SVG file to write"""


HELP = Help(
    examples=(
        ("Draw the loss of one run", "engine plot runs/demo"),
        ("Compare two runs in one picture", "engine plot runs/baseline runs/demo --output compare.svg"),
    ),
)


def run(args: list[str]) -> int:
    """Run the command; returns the exit code."""

    from engine.monitor.plot import plot_loss

    o = parse(PlotOptions, args, "plot", HELP)
    for note in plot_loss(o.runs, o.output):
        print(f"note: {note}")
    print(f"wrote {o.output}")
    return EXIT_OK
