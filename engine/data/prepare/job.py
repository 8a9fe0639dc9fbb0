"""What `prepare` is asked to do: its checked arguments, what the output depends on, and what may stand in its way."""

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
    """What to do: options, inputs that were found, and who is told."""

    options: PrepareOptions
    source: DocumentSource
    suffixes: tuple[str, str, str]  # of SPLITS
    progress: Progress | None
    note: Callable[[str], None]
    stop: Interrupts

    def load_tokenizer(self) -> Tokenizer:
        """The one that is there. Raises DataError."""
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
        """Where in SPLITS each of the documents from number `first` on belongs, int8 [count].

        valid is the lower end of the hashes and test the upper one, so that neither fraction moves the other's
        documents: those of valid are the same with and without a test split, and both only grow with their fractions.
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
        """What is no input, though it may be in a folder that is one."""
        return OwnFiles(self.output_paths(), self.options.tokenizer, self.parts_folder)

    @property
    def tokenizer_copy(self) -> Path | None:
        """The folder beside the data for the tokenizer's files; None if they are there anyway."""
        folder = Path(f"{self.options.output}-tokenizer")
        return None if folder.resolve() == self.options.tokenizer.resolve() else folder

    def must_not_exist(self) -> list[Path]:
        """What must not be there: all of them, and a tokenizer where one is to be trained."""
        trained = [self.options.tokenizer / "tokenizer.json"] if self.options.train_vocab_size else []
        return [*self.output_paths(), *trained]

    def output_paths(self) -> list[Path]:
        """Everything that is written, whatever the options."""
        corpora = [path for split in SPLITS for path in paths_of(self.prefix(split))]
        copy = [self.tokenizer_copy / name for name in FILES] if self.tokenizer_copy is not None else []
        return [
            *copy,
            *corpora,
            Path(f"{self.options.output}-skipped.jsonl"),
            Path(f"{self.options.output}-report.json"),
        ]


def settings_of(job: PrepareJob, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """All that the output depends on, as JSON gives it back. How errors are met is not among it: `skip` may go on
    where `stop` stopped."""
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
