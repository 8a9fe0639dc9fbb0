"""`engine prepare`; its options and their checks are engine/data/prepare/options.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from engine.cli.common import Help, parse, stops_on_signals
from engine.errors import EXIT_OK
from engine.util.signals import Interrupts

if TYPE_CHECKING:
    from engine.data.read.progress import Progress, ProgressEvent, StepEvent


HELP = Help(
    examples=(
        (
            "Train a tokenizer of 8,000 tokens and tokenise a folder, with 1 % of the documents for validation",
            "engine prepare --input raw --output corpus/web --tokenizer corpus/tokenizer --train-vocab-size 8000 "
            "--valid-fraction 0.01",
        ),
        (
            "Tokenise compressed JSONL with an existing tokenizer and skip malformed lines",
            "engine prepare --input 'raw/*.jsonl.zst' --output corpus/web --tokenizer hf/Llama-3.1-8B --on-error skip",
        ),
    ),
    groups={
        "input": ("input", "include", "exclude", "json_key", "format", "on_error", "max_document_bytes"),
        "output": ("output", "valid_fraction", "test_fraction", "seed", "overwrite"),
        "tokenizer": ("tokenizer", "merges", "lower_case", "train_vocab_size", "train_bytes"),
        "encoding": ("append_eod", "prepend_bos", "parse_special", "encoder", "workers"),
    },
)


@stops_on_signals
def run(args: list[str], stop: Interrupts) -> int:
    """Run the command; returns the exit code."""
    from engine.data.prepare.options import PrepareOptions
    from engine.data.prepare.run import prepare

    options = parse(PrepareOptions, args, "prepare", HELP)
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
    """prepare_progress, imported (with rich) at the first event, when encoder threads are already running."""
    with contextlib.ExitStack() as stack:
        shows: list[Progress] = []

        def progress(event: ProgressEvent | StepEvent) -> None:
            from engine.cli.prepare_console import prepare_progress

            if not shows:
                shows.append(stack.enter_context(prepare_progress()))
            shows[0](event)

        yield progress
