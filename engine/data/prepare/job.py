"""One `prepare` command: its options and inputs, its output paths, and the settings that the output depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.data.prepare.options import PrepareOptions
from engine.data.read.document_batch import DocumentBatch
from engine.data.read.document_source import DocumentSource
from engine.data.read.own import OwnFiles
from engine.data.read.progress import Progress
from engine.data.samples.indexed import paths_of
from engine.data.samples.keyed import derive_key
from engine.data.tokenize.file_names import FILES
from engine.data.tokenize.tokenizer import Tokenizer
from engine.data.workfolder import json_round_trip
from engine.util.signals import Interrupts

SPLITS = ("train", "valid", "test")
_SETTINGS_VERSION = 2
RERUN = "give the same command again"


@dataclass(frozen=True)
class PrepareJob:
    """Options, inputs and callbacks of one `prepare` command."""

    options: PrepareOptions
    source: DocumentSource
    suffixes: tuple[str, str, str]  # of SPLITS
    progress: Progress | None
    note: Callable[[str], None]
    stop: Interrupts

    def load_tokenizer(self) -> Tokenizer:
        """Load the existing tokenizer. Raises DataError."""
        o = self.options
        return Tokenizer.load(o.tokenizer, o.parse_special, merges=o.merges, lower_case=o.lower_case)

    @property
    def parts_folder(self) -> Path:
        return Path(f"{self.options.output}.parts")

    def prefix(self, split: str) -> str:
        return self.options.output + self.suffixes[SPLITS.index(split)]

    @property
    def splits(self) -> tuple[str, ...]:
        wanted = (True, self.options.valid_fraction > 0, self.options.test_fraction > 0)
        return tuple(name for name, used in zip(SPLITS, wanted) if used)

    @property
    def total(self) -> int:
        return sum(file.num_bytes for file in self.source.files)

    def split_numbers(self, first: int, count: int) -> npt.NDArray[np.int8]:
        """Index into SPLITS of each of `count` documents, starting with number `first`; int8 [count].

        Each document number is hashed. valid takes the lowest hashes and test the highest, so that the valid documents
        are the same with and without a test split, and both splits only grow with their fractions.
        """
        if not self.options.valid_fraction and not self.options.test_fraction:
            return np.zeros(count, np.int8)
        below, from_ = int(self.options.valid_fraction * 2.0**64), 2**64 - int(self.options.test_fraction * 2.0**64)
        hashes = (derive_key(self.options.seed, "split", number) for number in range(first, first + count))
        return np.fromiter((1 if value < below else 2 if value >= from_ else 0 for value in hashes), np.int8, count)

    @property
    def reads_stdin(self) -> bool:
        return self.source.reads_once

    @property
    def own_files(self) -> OwnFiles:
        """Files of this command that are not read, even if they are inside an input folder."""
        return OwnFiles(self.output_paths(), self.options.tokenizer, self.parts_folder)

    @property
    def tokenizer_copy(self) -> Path | None:
        """Folder next to the data for a copy of the tokenizer's files; None if the tokenizer already is in it."""
        folder = Path(f"{self.options.output}-tokenizer")
        return None if folder.resolve() == self.options.tokenizer.resolve() else folder

    def must_not_exist(self) -> list[Path]:
        """All outputs, and tokenizer.json if a tokenizer is to be trained."""
        trained = [self.options.tokenizer / "tokenizer.json"] if self.options.train_vocab_size else []
        return [*self.output_paths(), *trained]

    def output_paths(self) -> list[Path]:
        """All files that `prepare` may write, under any options."""
        corpora = [path for split in SPLITS for path in paths_of(self.prefix(split))]
        copy = [self.tokenizer_copy / name for name in FILES] if self.tokenizer_copy is not None else []
        return [
            *copy,
            *corpora,
            Path(f"{self.options.output}-skipped.jsonl"),
            Path(f"{self.options.output}-report.json"),
        ]


def settings_of(job: PrepareJob, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Everything the output depends on, as read back from JSON. on_error is not part of it: `skip` may resume where
    `stop` stopped."""
    o = job.options
    files = [[file.name, file.num_bytes, file.stamp] for file in job.source.files]
    if tokenizer is None:
        identity: dict[str, Any] = {"trained with vocab_size": o.train_vocab_size, "folder": str(o.tokenizer)}
        identity |= {"of at most bytes": o.train_bytes} if o.train_bytes else {}
    else:
        identity = {"digest": tokenizer.digest}
    settings = {
        "version": _SETTINGS_VERSION,
        "files": files,
        "json keys": list(job.source.keys),
        "format": job.source.format,
        "max_document_bytes": job.source.max_document_bytes,
        "tokenizer": identity,
        "append_eod": o.append_eod,
        "prepend_bos": o.prepend_bos,
        "parse_special": o.parse_special,
        "valid_fraction": o.valid_fraction,
        "test_fraction": o.test_fraction,
        "seed": o.seed,
        "suffixes": list(job.suffixes),
        "fast": o.encoder == "auto",
    }
    return json_round_trip(settings)


def stop_at_errors(job: PrepareJob, batch: DocumentBatch) -> None:
    for drop in batch.drops:
        if drop.stops and not job.options.skip_errors:
            raise drop.error()
