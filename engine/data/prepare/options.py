"""The options of `engine prepare`, for the command and for the function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from engine.data.read.document_source import MAX_DOCUMENT_BYTES
from engine.data.read.options import ReadOptions
from engine.errors import FieldError
from engine.util.words import NO_STRINGS, TEXT_FIELD, StrTuple


@dataclass(frozen=True)
class PrepareOptions(ReadOptions):
    """Convert raw text to memory-mapped train, valid and test files.

    With --train-vocab-size a tokenizer is trained first. After an interruption the same command resumes: its unfinished
    work is in OUTPUT.parts.
    """

    input: StrTuple
    output: str
    """prefix of the files to write: OUTPUT-train.bin/.idx/.json, OUTPUT-valid..., OUTPUT-test..., OUTPUT-tokenizer,
    OUTPUT-report.json, and OUTPUT-skipped.jsonl if documents were skipped"""
    tokenizer: Path
    """tokenizer to use (tokenizer.json, sentencepiece .model, .tiktoken, tekken.json, vocab.json with merges.txt,
    BERT's vocab.txt, or a folder with one of them); with --train-vocab-size the folder for the new one"""
    merges: Optional[Path] = None  # noqa: UP045  (see engine.util.words)
    """merges file of a vocab.json; not set: merges.txt next to it (NAME-merges.txt for NAME-vocab.json)"""
    lower_case: Optional[bool] = None  # noqa: UP045
    """whether BERT's vocab.txt is for lower-case text; not set: as in tokenizer_config.json, else as its pieces
    suggest"""
    train_vocab_size: int = 0
    """train a byte-level BPE tokenizer of this many tokens on the train documents first; 0: use the existing
    tokenizer"""
    train_bytes: int = 0
    """maximum bytes of text to train the tokenizer on, spread evenly over all train documents; 0: all; set it for
    corpora of many GB"""
    valid_fraction: float = 0.0
    """fraction of the documents for the validation files, such as 0.01"""
    test_fraction: float = 0.0
    """fraction of the documents for the test files; it does not change which documents are for validation"""
    include: StrTuple = NO_STRINGS
    exclude: StrTuple = NO_STRINGS
    json_key: StrTuple = TEXT_FIELD
    format: Literal["", "jsonl", "json", "csv", "parquet", "arrow", "text"] = ""
    on_error: Literal["stop", "skip"] = "stop"
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """largest document (line, file) in bytes; larger ones are errors; memory grows with this"""
    append_eod: bool = True
    """end each document with the end-of-document token"""
    prepend_bos: bool = False
    """start each document with the tokenizer's BOS token, which tokenizer_config.json names as bos_token"""
    parse_special: bool = False
    """encode a special token that is spelled out in a document, such as <|endoftext|>, as that token; otherwise as
    text"""
    encoder: Literal["auto", "tokenizers"] = "auto"
    """auto: gigatoken if it supports the tokenizer, checked against `tokenizers` on samples; tokenizers: only that"""
    workers: int = 0
    """number of encoder threads; 0: one per core; the output does not depend on it"""
    seed: int = 0
    """seed that selects the validation and test documents"""
    overwrite: bool = False
    """replace existing files and the unfinished work of another call"""

    def errors(self) -> Iterator[FieldError]:
        """All errors of the options, before any work is done."""
        if not self.input:
            problem = "names no input"
            yield FieldError("prepare.no-input", "--input", "", problem, "Give files, folders, globs, URLs or -.")
        if not self.output or self.output.endswith("/"):
            fix = "Use corpus/web for corpus/web-train.bin ..."
            yield FieldError("prepare.output-no-prefix", "--output", self.output, "is not a prefix of file names", fix)
        if self.on_error not in ("stop", "skip"):
            problem = "is neither stop nor skip"
            yield FieldError("prepare.unknown-choice", "--on-error", self.on_error, problem, "Omit it to stop.")
        yield from self._fraction_errors()
        for option, value, least, fix in (
            ("--workers", self.workers, 0, "Use 0 for one per core."),
            ("--max-document-bytes", self.max_document_bytes, 1, "Omit it for 64 MiB."),
            ("--train-vocab-size", self.train_vocab_size, 0, "Use 0 for an existing tokenizer."),
            ("--train-bytes", self.train_bytes, 0, "Use 0 for all train documents."),
        ):
            if value < least:
                yield FieldError("prepare.number-too-small", option, value, f"is below {least}", fix)
        size = self.train_vocab_size
        if size and (self.merges is not None or self.lower_case is not None):
            problem, fix = "trains a tokenizer without --merges and --lower-case", "Omit them, or --train-vocab-size."
            yield FieldError("prepare.merges-of-a-trained-tokenizer", "--train-vocab-size", size, problem, fix)
        if self.train_bytes and not size:
            problem = "has no effect without --train-vocab-size"
            yield FieldError("prepare.option-without-effect", "--train-bytes", self.train_bytes, problem, "Omit it.")

    def _fraction_errors(self) -> Iterator[FieldError]:
        shares = {"--valid-fraction": self.valid_fraction, "--test-fraction": self.test_fraction}
        wrong = {option: share for option, share in shares.items() if not 0 <= share < 1}
        for option, share in wrong.items():
            fix = "Use a fraction such as 0.01, or 0 for none."
            yield FieldError("prepare.fraction-out-of-range", option, share, "is not in [0, 1)", fix)
        if not wrong and sum(shares.values()) >= 1:
            problem = f"and --valid-fraction {self.valid_fraction} leave no documents to train on"
            fix = "Make their sum less than 1."
            yield FieldError("prepare.nothing-to-train-on", "--test-fraction", self.test_fraction, problem, fix)
