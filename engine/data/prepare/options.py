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
    """Turn raw text into a tokenizer and memory-mapped train, valid and test files.

    Killed at any moment, the same command goes on where it was (its work is in OUTPUT.parts until it is done).
    """

    input: StrTuple
    """files, folders, globs, pipes, URLs (s3://..., of fsspec) or - for standard input, plain or .gz .zst .bz2 .xz;
    .jsonl: a document a line, .json: an array or one after the other, .csv .tsv .parquet .arrow: a row; else a file,
    or a line of it if its first lines are JSON objects with the key"""
    output: str
    """prefix of what is written: OUTPUT-train.bin/.idx/.json, OUTPUT-valid..., OUTPUT-test..., OUTPUT-tokenizer,
    OUTPUT-report.json, and OUTPUT-skipped.jsonl if something was left out"""
    tokenizer: Path
    """tokenizer to use (tokenizer.json, sentencepiece .model, .tiktoken, tekken.json, vocab.json with merges.txt,
    BERT's vocab.txt, or a folder with one of them), or folder of the one to make with --train-vocab-size"""
    merges: Optional[Path] = None  # noqa: UP045  (see engine.util.words)
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
    include: StrTuple = NO_STRINGS
    """inside folders, read only names that match one of these globs, such as '*.py' '*.rst'"""
    exclude: StrTuple = NO_STRINGS
    """inside folders, leave out names and subfolders that match one of these"""
    json_key: StrTuple = TEXT_FIELD
    """key or column of the text, a.b for b in the object a; several are joined by a newline to one document. The value
    may be a list of strings (joined by newlines) or of messages {"role", "content"} (written as "role: content")"""
    format: Literal["", "jsonl", "json", "csv", "parquet", "arrow", "text"] = ""
    """what the inputs are, whatever their names; empty: by the name, and standard input is jsonl"""
    on_error: Literal["stop", "skip"] = "stop"
    """malformed JSON, missing key, wrong type, not UTF-8, too large, damaged archive: stop with file and line, or leave
    the document out, count it, and list it in OUTPUT-skipped.jsonl"""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
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
            fix = "Use 0.01 for a hundredth, 0 for none."
            yield FieldError("prepare.fraction-out-of-range", option, share, "is not in [0, 1)", fix)
        if not wrong and sum(shares.values()) >= 1:
            problem = f"and --valid-fraction {self.valid_fraction} leave no documents to train on"
            fix = "Make their sum less than 1."
            yield FieldError("prepare.nothing-to-train-on", "--test-fraction", self.test_fraction, problem, fix)
