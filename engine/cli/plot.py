"""`engine plot`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from engine.errors import EXIT_OK


@dataclass
class PlotOptions:
    """Draw the loss curve of one or more runs (training and validation) from their metrics.jsonl."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders"""
    output: Path = Path("loss.png")
    """PNG or SVG file"""


def run(args: list[str]) -> int:
    """Run the verb; returns the exit code."""

    from engine.monitor.plot import plot_loss

    o = tyro.cli(PlotOptions, args=args, prog="engine plot")
    for note in plot_loss(o.runs, o.output):
        print(f"note: {note}")
    print(f"wrote {o.output}")
    return EXIT_OK
