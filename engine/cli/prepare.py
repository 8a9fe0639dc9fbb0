"""`engine prepare`; its options and their checks are engine/data/prepare/options.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from engine.cli.common import parse, stops_on_signals
from engine.errors import EXIT_OK
from engine.util.signals import Interrupts

if TYPE_CHECKING:
    from engine.data.read.progress import Progress, ProgressEvent, StepEvent


@stops_on_signals
def run(args: list[str], stop: Interrupts) -> int:
    """Run the verb; returns the exit code."""
    from engine.data.prepare.options import PrepareOptions
    from engine.data.prepare.run import prepare

    options = parse(PrepareOptions, args, "prepare")
    if options.workers > 0:
        from engine.distributed.env import limit_encoder_threads

        limit_encoder_threads(options.workers)
    with _progress_later() as progress:
        report = prepare(options, progress=progress, note=print, stop=stop)
    from engine.cli.prepare_console import show_prepared

    show_prepared(report)
    return EXIT_OK


@contextlib.contextmanager
def _progress_later() -> Iterator[Callable[[ProgressEvent | StepEvent], None]]:
    """prepare_progress, loaded (it needs rich) with the first event: by then other threads are at work."""
    with contextlib.ExitStack() as stack:
        shows: list[Progress] = []

        def progress(event: ProgressEvent | StepEvent) -> None:
            from engine.cli.prepare_console import prepare_progress

            if not shows:
                shows.append(stack.enter_context(prepare_progress()))
            shows[0](event)

        yield progress
