"""Progress and report of `engine prepare` in the terminal. Does not import torch, which would double the start time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from engine.data.prepare.report import PrepareReport, SplitReport
from engine.data.read.account import ReadSummary
from engine.data.read.progress import Progress, ProgressEvent, StepEvent
from engine.data.tokenize.recipe import Recipe
from engine.data.tokenize.train import Trained


@contextmanager
def prepare_progress(every_s: float = 5.0, quiet: bool = False) -> Iterator[Progress]:
    """Progress callback of data.prepare: a bar on a terminal, else a line every `every_s` seconds; quiet: nothing."""
    console = Console(highlight=False, soft_wrap=True, quiet=quiet)
    shown = {"at": time.perf_counter()}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def show(event: ProgressEvent | StepEvent) -> None:
            if isinstance(event, StepEvent):
                show_step(event)
            else:
                show_bytes(event)

        def show_step(event: StepEvent) -> None:
            if "step" not in tasks:
                tasks["step"] = bar.add_task("", total=None, text="")
            text = f"{event.done:,} of {event.total:,}" if event.total else f"{event.elapsed_s:.0f} s"
            name, total = f"{event.phase}: {event.step}", event.total or None
            bar.update(tasks["step"], description=name, completed=event.done, total=total, text=text)
            if not console.is_terminal and time.perf_counter() - shown["at"] >= every_s:
                shown["at"] = time.perf_counter()
                console.print(f"{name}: {text}" + f", {event.elapsed_s:.0f} s" * bool(event.total))

        def show_bytes(event: ProgressEvent) -> None:
            elapsed = max(event.elapsed_s, 1e-9)
            rate = event.input_bytes_here / elapsed
            text = f"{event.documents:,} documents, {rate / 1e6:.2f} MB/s"
            if event.phase == "train tokenizer":
                text = f"reading {event.input_bytes / 1e6:,.1f} MB, {text}"
            if event.tokens:
                text += f", {event.tokens:,} tokens, {event.tokens_here / elapsed:,.0f} tokens/s"
            if event.phase not in tasks:
                tasks[event.phase] = bar.add_task(event.phase, total=event.input_bytes_total, text="")
            bar.update(tasks[event.phase], completed=event.input_bytes, text=text)
            if not console.is_terminal and time.perf_counter() - shown["at"] >= every_s:
                shown["at"] = time.perf_counter()
                done = event.input_bytes / max(1, event.input_bytes_total)
                left = (event.input_bytes_total - event.input_bytes) / max(rate, 1e-9)
                console.print(f"{event.phase}: {done:.0%}, {text}, {left:.0f} s left")

        yield show


def show_trained(trained: Trained, recipe: Recipe, output: Path) -> None:
    """Print the result of `engine tokenizer train`: the tokenizer, its input, and the seconds of each step."""
    for line in trained.account.lines():
        print(line)
    steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in trained.seconds.items())
    print(f"trained on {trained.documents:,} documents, {trained.text_bytes / 1e6:,.2f} MB of text; seconds: {steps}")
    tokenizer = trained.tokenizer
    print(f"tokenizer {output}: {recipe.kind}, {tokenizer.vocab_size:,} tokens, digest {tokenizer.digest[:16]}")
    if tokenizer.vocab_size < recipe.vocab_size:
        print(f"--vocab-size was {recipe.vocab_size:,}, but the text does not offer more tokens")


def show_prepared(report: PrepareReport) -> None:
    """Print a table of the files that `prepare` wrote, and the documents that it dropped."""
    splits = [split for split in (report.train, report.valid, report.test) if split is not None]
    table = Table("", *(split.prefix for split in splits))
    rows: dict[str, Callable[[SplitReport], str]] = {
        "documents": lambda split: f"{split.documents:,}",
        "empty documents, dropped": lambda split: f"{split.empty_documents:,}",
        "text (MB)": lambda split: f"{split.text_bytes / 1e6:,.2f}",
        "tokens": lambda split: f"{split.tokens:,}",
        "bytes/token": lambda split: f"{split.bytes_per_token:.3f}",
        "longest document": lambda split: f"{split.longest_document_tokens:,} tokens",
        "unknown bytes": lambda split: f"{split.unknown_bytes:,}",
        "unigram entropy (nats)": lambda split: f"{split.unigram_entropy:.4f}",
    }
    for label, figure in rows.items():
        table.add_row(label, *map(figure, splits))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    cross_entropies = {"valid": report.valid_unigram_cross_entropy, "test": report.test_unigram_cross_entropy}
    for name, nats in cross_entropies.items():
        if nats is not None:
            console.print(
                f"{name} cross-entropy under the train unigrams: {nats:.4f} nats/token, the loss of a model that "
                f"ignores the context"
            )
    if report.bos is not None:
        console.print(f"every document starts with token {report.bos}")
    dropped = sum(report.dropped.values())
    rate = report.bytes_in / 1e6 / max(report.elapsed_s, 1e-9)
    console.print(
        f"input: {report.documents_in + dropped:,} documents, {report.bytes_in / 1e6:,.2f} MB; "
        f"kept {report.documents_in:,}, dropped {dropped:,}; "
        f"{report.elapsed_s:.1f} s, {rate:,.2f} MB/s with {report.encoder}"
        + (f" ({report.encoder_note})" if report.encoder_note else ""),
        markup=False,
    )
    for line in ReadSummary(report.dropped, report.noticed, report.examples).lines():
        console.print(line, markup=False)
    if report.skipped:
        console.print(f"dropped documents are listed in {report.skipped}", markup=False)
    console.print(f"tokenizer {report.tokenizer}: {report.vocab_size:,} tokens, digest {report.tokenizer_digest[:16]}")
