"""`engine clean`; its options and their checks are engine/data/clean/options.py."""

from __future__ import annotations

from engine.cli.common import parse, stops_on_signals
from engine.errors import EXIT_OK
from engine.util.signals import Interrupts


@stops_on_signals
def run(args: list[str], stop: Interrupts) -> int:
    """Run the verb; returns the exit code."""
    from engine.cli.clean_console import show_clean_report
    from engine.cli.prepare_console import prepare_progress
    from engine.data.clean.options import CleanOptions
    from engine.data.clean.run import clean

    options = parse(CleanOptions, args, "clean")
    with prepare_progress() as progress:
        report = clean(options, progress, stop)
    if report is None:
        out = options.output
        print(f"tasks of {out} are still at work; when they are done, give the same command again to finish it")
    else:
        show_clean_report(report)
    return EXIT_OK
