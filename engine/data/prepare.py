"""Raw text to PREFIX-train and PREFIX-valid: choose the split, train the tokenizer if asked, encode, count.

The split is by document, by a keyed hash of its number: spread over the corpus (a tail split measures whatever was
appended last), stable when documents are added at the end, and no document is in both. A tokenizer is trained on the
train documents only. Everything streams: memory is a chunk of text and its encodings, not the corpus.

The report holds what makes the first losses of a run judgeable: ln(vocab_size) is where it starts, the cross entropy
of the valid tokens under the train unigram distribution is what a model reaches without reading any context.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from engine.data.indexed import IndexedWriter, paths_of
from engine.data.order import derive_key
from engine.data.sources import MAX_FILE_BYTES, Document, documents, list_files
from engine.data.tokenizer import Tokenizer
from engine.errors import DataError
from engine.files import sync_folder

_CHUNK_BYTES = 4 << 20  # text encoded at once: keeps all cores busy, and its encodings in tens of MiB
_CHUNK_DOCUMENTS = 8192


@dataclass(frozen=True)
class ProgressEvent:
    """How far a phase is. `input_bytes` of `input_bytes_total` is the fraction done."""

    phase: Literal["train tokenizer", "encode"]
    input_bytes: int
    input_bytes_total: int
    documents: int
    tokens: int
    elapsed_s: float


@dataclass(frozen=True)
class SplitReport:
    """One written corpus. `documents` counts those with text, `unigram_entropy` is in nats per token."""

    prefix: str
    documents: int
    empty_documents: int
    text_bytes: int
    tokens: int
    bytes_per_token: float
    longest_document_tokens: int
    longest_document: str
    unigram_entropy: float
    dtype: str


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did; also written to PREFIX-report.json. `skipped` counts left-out files or lines by reason."""

    train: SplitReport
    valid: SplitReport | None
    valid_unigram_cross_entropy: float | None  # nats per valid token under the train unigrams, add-one smoothed
    tokenizer: str
    tokenizer_digest: str
    vocab_size: int
    skipped: dict[str, int]
    elapsed_s: float


@dataclass
class _Split:
    """A corpus being written, and its running counts."""

    writer: IndexedWriter
    text_bytes: int = 0
    empty: int = 0
    longest: tuple[int, str] = (0, "")

    def add(self, document: Document, num_bytes: int, ids: npt.NDArray[np.int32], eod: int | None) -> None:
        if not ids.size:  # no end of document either: it would end the one before a second time
            self.empty += 1
        elif eod is not None:
            ids = np.append(ids, np.int32(eod))
        self.writer.add(ids)
        self.text_bytes += num_bytes
        if ids.size > self.longest[0]:
            self.longest = (int(ids.size), document.source)

    def finish(self, meta: dict[str, Any]) -> SplitReport:
        facts = self.writer.finish({**meta, "text_bytes": self.text_bytes})
        return SplitReport(
            prefix=self.writer.prefix,
            documents=facts["num_documents"],
            empty_documents=self.empty,
            text_bytes=self.text_bytes,
            tokens=facts["num_tokens"],
            bytes_per_token=self.text_bytes / max(1, facts["num_tokens"]),
            longest_document_tokens=self.longest[0],
            longest_document=self.longest[1],
            unigram_entropy=facts["unigram_entropy"],
            dtype=facts["dtype"],
        )


@dataclass
class _Reader:
    """The documents with their split, in input order, as often as needed; reports progress on the way."""

    inputs: Sequence[Path]
    include: Sequence[str]
    exclude: Sequence[str]
    json_key: str
    max_file_bytes: int
    split_key: int
    valid_fraction: float
    progress: Callable[[ProgressEvent], None] | None
    skipped: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)
    total: int = field(init=False)
    num_documents: int = 0
    input_bytes: int = 0

    def __post_init__(self) -> None:
        self.total = sum(file.num_bytes for file in list_files(self.inputs, self.include, self.exclude))

    def read(self) -> Iterator[tuple[Document, bool]]:
        """(document, is it for valid). Starts all counts afresh: the last pass is the one reported."""
        self.skipped.clear()
        self.input_bytes = self.num_documents = 0
        source = documents(
            self.inputs, self.include, self.exclude, self.json_key, self.max_file_bytes, skipped=self.skipped
        )
        threshold = int(self.valid_fraction * 2.0**64)
        for number, document in enumerate(source):
            self.num_documents = number + 1
            self.input_bytes += document.input_bytes
            yield document, _split_hash(self.split_key, number) < threshold

    def report(self, phase: Literal["train tokenizer", "encode"], tokens: int) -> None:
        if self.progress is not None:
            elapsed = time.monotonic() - self.started
            self.progress(ProgressEvent(phase, self.input_bytes, self.total, self.num_documents, tokens, elapsed))


def _split_hash(key: int, number: int) -> int:
    return derive_key(key, "split", number)


def prepare(
    inputs: Sequence[Path],
    output: str,
    *,
    tokenizer: Path,
    train_vocab_size: int | None = None,
    valid_fraction: float = 0.0,
    append_eod: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    json_key: str = "text",
    seed: int = 0,
    max_file_bytes: int = MAX_FILE_BYTES,
    overwrite: bool = False,
    progress: Callable[[ProgressEvent], None] | None = None,
) -> PrepareReport:
    """Tokenise `inputs` into `output`-train and, when `valid_fraction` > 0, `output`-valid.

    `tokenizer` is a folder with tokenizer.json; with `train_vocab_size` it is created there first. Raises DataError
    for bad input (see sources.documents), for outputs that exist unless `overwrite`, and for a split without documents.
    """
    if not 0.0 <= valid_fraction < 1.0:
        raise DataError(f"valid_fraction = {valid_fraction}: expected 0 <= valid_fraction < 1; 0 means no valid split")
    _refuse_existing(output, tokenizer if train_vocab_size is not None else None, overwrite)
    reader = _Reader(inputs, include, exclude, json_key, max_file_bytes, seed, valid_fraction, progress)
    if not reader.total:
        raise DataError(
            f"no text in {', '.join(map(str, inputs)) or 'no inputs'} (include {include}, exclude {exclude})"
        )
    if train_vocab_size is None:
        chosen, save_to = Tokenizer.load(tokenizer), None
    else:
        chosen, save_to = Tokenizer.train(_train_texts(reader), train_vocab_size), tokenizer
    train, valid, cross_entropy = _write(reader, output, chosen, append_eod, save_to)
    report = PrepareReport(
        train=train,
        valid=valid,
        valid_unigram_cross_entropy=cross_entropy,
        tokenizer=str(tokenizer),
        tokenizer_digest=chosen.digest,
        vocab_size=chosen.vocab_size,
        skipped=dict(sorted(reader.skipped.items())),
        elapsed_s=time.monotonic() - reader.started,
    )
    if valid is None:  # of an earlier run, with another tokenizer perhaps
        for path in paths_of(f"{output}-valid"):
            path.unlink(missing_ok=True)
    _write_report(report, Path(f"{output}-report.json"))
    return report


def _refuse_existing(output: str, new_tokenizer: Path | None, overwrite: bool) -> None:
    paths = [*paths_of(f"{output}-train"), *paths_of(f"{output}-valid"), Path(f"{output}-report.json")]
    if new_tokenizer is not None:
        paths.append(new_tokenizer / "tokenizer.json")
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise DataError(f"{', '.join(existing)}: already there. Choose another name, delete them, or give --overwrite.")


def _train_texts(reader: _Reader) -> Iterator[str]:
    reported = 0
    for document, is_valid in reader.read():
        if not is_valid:
            yield document.text
        if reader.input_bytes - reported >= _CHUNK_BYTES:
            reported = reader.input_bytes
            reader.report("train tokenizer", 0)
    reader.report("train tokenizer", 0)


def _write(
    reader: _Reader, output: str, tokenizer: Tokenizer, append_eod: bool, save_to: Path | None
) -> tuple[SplitReport, SplitReport | None, float | None]:
    """Encode everything, then publish: a new tokenizer first, as without it the ids mean nothing, then the splits."""
    eod = tokenizer.eod if append_eod else None
    meta = {"tokenizer_digest": tokenizer.digest, "eod": eod}
    with ExitStack() as stack:
        train = _Split(stack.enter_context(IndexedWriter(f"{output}-train", tokenizer.vocab_size)))
        valid = None
        if reader.valid_fraction > 0:
            valid = _Split(stack.enter_context(IndexedWriter(f"{output}-valid", tokenizer.vocab_size)))
        for chunk in _chunks(reader.read()):
            all_ids = tokenizer.encode_batch([document.text for document, _, _ in chunk])
            for (document, num_bytes, is_valid), ids in zip(chunk, all_ids):
                (valid if is_valid and valid is not None else train).add(document, num_bytes, ids, eod)
            reader.report("encode", train.writer.num_tokens + (valid.writer.num_tokens if valid else 0))
        _refuse_empty(reader, train, valid)
        if save_to is not None:
            tokenizer.save(save_to)
        train_report = train.finish(meta)
        if valid is None:
            return train_report, None, None
        return train_report, valid.finish(meta), _cross_entropy(valid.writer.counts, train.writer.counts)


def _chunks(source: Iterator[tuple[Document, bool]]) -> Iterator[list[tuple[Document, int, bool]]]:
    """Lists of (document, its UTF-8 bytes, is it for valid), bounded in bytes and in documents."""
    chunk: list[tuple[Document, int, bool]] = []
    chunk_bytes = 0
    for document, is_valid in source:
        num_bytes = len(document.text.encode("utf-8"))
        chunk.append((document, num_bytes, is_valid))
        chunk_bytes += num_bytes
        if chunk_bytes >= _CHUNK_BYTES or len(chunk) >= _CHUNK_DOCUMENTS:
            yield chunk
            chunk, chunk_bytes = [], 0
    if chunk:
        yield chunk


def _refuse_empty(reader: _Reader, train: _Split, valid: _Split | None) -> None:
    for name, split in (("train", train), ("valid", valid)):
        if split is not None and split.writer.num_documents == 0:
            raise DataError(
                f"{split.writer.prefix}: of {reader.num_documents} documents none with text is in the {name} split "
                f"(valid_fraction = {reader.valid_fraction}; skipped: {dict(reader.skipped)}). A document is never "
                f"cut: give more documents, change valid_fraction (0: no valid split) or the seed."
            )


def _cross_entropy(counts: npt.NDArray[np.int64], train_counts: npt.NDArray[np.int64]) -> float:
    """Nats per token of `counts` int64 [V] under the add-one smoothed unigrams of `train_counts` int64 [V]."""
    log_p = np.log((train_counts + 1) / (train_counts.sum() + train_counts.size))
    return float(-(counts * log_p).sum() / counts.sum())


def _write_report(report: PrepareReport, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as err:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written: {err.strerror or err}. The corpora are complete.") from err
