"""`engine prepare`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Optional

import tyro

from engine.cli.common import NO_WORDS, TEXT, Words, ends_on_signals
from engine.errors import EXIT_OK, ConfigError, Fault
from engine.util.signals import Interrupts

if TYPE_CHECKING:
    from engine.data.read.progress import Progress, ProgressEvent, StepEvent


@dataclass
class PrepareOptions:
    """Turn raw text into a tokenizer and memory-mapped train, valid and test files.

    Killed at any moment, the same command goes on where it was (its work is in OUTPUT.parts until it is done).
    """

    input: Words
    """files, folders, globs, pipes, URLs (s3://..., of fsspec) or - for standard input, plain or .gz .zst .bz2 .xz;
    .jsonl: a document a line, .json: an array or one after the other, .csv .tsv .parquet .arrow: a row; else a file,
    or a line of it if its first lines are JSON objects with the key"""
    output: str
    """prefix of what is written: OUTPUT-train.bin/.idx/.json, OUTPUT-valid..., OUTPUT-test..., OUTPUT-tokenizer,
    OUTPUT-report.json, and OUTPUT-skipped.jsonl if something was left out"""
    tokenizer: Path
    """tokenizer to use (tokenizer.json, sentencepiece .model, .tiktoken, tekken.json, vocab.json with merges.txt,
    BERT's vocab.txt, or a folder with one of them), or folder of the one to make with --train-vocab-size"""
    merges: Optional[Path] = None  # noqa: UP045  (see WordTuple)
    """the merges that belong to a vocab.json; left out: merges.txt beside it (NAME-merges.txt for NAME-vocab.json)"""
    lower_case: Optional[bool] = None  # noqa: UP045
    """whether BERT's vocab.txt is for lower case; left out: as tokenizer_config.json says, or its pieces do"""
    train_vocab_size: int = 0
    """train a byte-level BPE of this size on the train documents first; 0: use the one that is there"""
    train_bytes: int = 0
    """train it on so many bytes of text at most, taken evenly from all train documents; 0: on all of them"""
    valid_fraction: float = 0.0
    """share of the documents that goes into the validation files"""
    test_fraction: float = 0.0
    """share of the documents that goes into the test files; the validation documents are the same with and without"""
    include: Words = NO_WORDS
    """inside folders, read only names that match one of these globs, such as '*.py' '*.rst'"""
    exclude: Words = NO_WORDS
    """inside folders, leave out names and subfolders that match one of these"""
    json_key: Words = TEXT
    """key or column of the text, a.b for b in the object a; several are joined by a newline to one document. The value
    may be a list of strings (joined by newlines) or of messages {"role", "content"} (written as "role: content")"""
    format: Literal["", "jsonl", "json", "csv", "parquet", "arrow", "text"] = ""
    """what the inputs are, whatever their names; empty: by the name, and standard input is jsonl"""
    on_error: Literal["stop", "skip"] = "stop"
    """malformed JSON, missing key, wrong type, not UTF-8, too large, damaged archive: stop with file and line, or leave
    the document out, count it, and list it in OUTPUT-skipped.jsonl"""
    max_document_bytes: int = 1 << 26
    """longer documents (lines, files) are an error; memory grows with this"""
    append_eod: bool = True
    """end each document with the end-of-document token"""
    prepend_bos: bool = False
    """begin each document with the tokenizer's begin token (BOS), which tokenizer_config.json names as bos_token"""
    parse_special: bool = False
    """a special token spelled out in a document, such as <|endoftext|>, is that token; otherwise text is text"""
    encoder: Literal["auto", "tokenizers"] = "auto"
    """auto: gigatoken where it supports the tokenizer, checked against `tokenizers` on samples; or only `tokenizers`"""
    workers: int = 0
    """threads that encode; 0: one a core. The output does not depend on it"""
    seed: int = 0
    """which documents are validation and test documents follows from it"""
    overwrite: bool = False
    """replace files that are there, and the unfinished work of another call"""


@ends_on_signals
def run(args: list[str], stop: Interrupts) -> int:
    """Run the verb; returns the exit code."""

    from engine.data.prepare.run import prepare

    o = tyro.cli(PrepareOptions, args=args, prog="engine prepare")
    if faults := list(prepare_faults(o)):
        raise ConfigError(faults)
    if o.workers:
        from engine.distributed.env import limit_encoder_threads

        limit_encoder_threads(o.workers)
    with _progress_later() as progress:
        report = prepare(
            list(o.input),
            o.output,
            tokenizer=o.tokenizer,
            merges=o.merges,
            lower_case=o.lower_case,
            train_vocab_size=o.train_vocab_size or None,
            train_bytes=o.train_bytes,
            valid_fraction=o.valid_fraction,
            test_fraction=o.test_fraction,
            include=o.include,
            exclude=o.exclude,
            json_key=o.json_key,
            format=o.format,
            on_error=o.on_error,
            max_document_bytes=o.max_document_bytes,
            append_eod=o.append_eod,
            prepend_bos=o.prepend_bos,
            parse_special=o.parse_special,
            fast=o.encoder == "auto",
            workers=o.workers,
            seed=o.seed,
            overwrite=o.overwrite,
            progress=progress,
            note=print,
            stop=stop,
        )
    from engine.cli.prepare_console import show_prepared

    show_prepared(report)
    return EXIT_OK


def prepare_faults(o: PrepareOptions) -> Iterator[Fault]:
    """What is wrong with the options of `engine prepare`."""
    if not o.input:
        yield Fault("", "--input", "", "names nothing to read", "Give files, folders, globs, URLs or -.")
    if not o.output or o.output.endswith("/"):
        yield Fault(
            "", "--output", o.output, "is no prefix of file names", "Use corpus/web for corpus/web-train.bin ..."
        )
    if o.workers < 0:
        yield Fault("", "--workers", o.workers, "is below 0", "Use 0 for one a core.")
    shares = {"--valid-fraction": o.valid_fraction, "--test-fraction": o.test_fraction}
    wrong = {option: share for option, share in shares.items() if not 0 <= share < 1}
    for option, share in wrong.items():
        yield Fault("", option, share, "is not in [0, 1)", "Use 0.01 for a hundredth, 0 for none.")
    if not wrong and sum(shares.values()) >= 1:
        text = f"and --valid-fraction {o.valid_fraction} leave nothing to train on"
        yield Fault("", "--test-fraction", o.test_fraction, text, "Together they have to be below 1.")
    if o.max_document_bytes < 1:
        yield Fault("", "--max-document-bytes", o.max_document_bytes, "is below 1", "Leave it out for 64 MiB.")
    if o.train_vocab_size < 0:
        yield Fault(
            "", "--train-vocab-size", o.train_vocab_size, "is below 0", "Use 0 for the tokenizer that is there."
        )
    if o.train_vocab_size and (o.merges is not None or o.lower_case is not None):
        repair = "Leave them out, or --train-vocab-size."
        yield Fault("", "--train-vocab-size", o.train_vocab_size, "makes one without --merges, --lower-case", repair)
    if o.train_bytes < 0:
        yield Fault("", "--train-bytes", o.train_bytes, "is below 0", "Use 0 for all train documents.")
    if o.train_bytes and not o.train_vocab_size:
        yield Fault("", "--train-bytes", o.train_bytes, "has no meaning without --train-vocab-size", "Leave it out.")


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
