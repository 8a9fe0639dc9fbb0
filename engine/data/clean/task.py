"""A task of `engine clean`: reads its input files, applies the rules, and writes a part.

A part is a folder with kept documents, their duplicate keys, drops and counts. It gets its name only when complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
import xxhash
import zstandard

from engine.data.clean.job import CleanJob
from engine.data.clean.ngrams import MinHash
from engine.data.clean.report import INPUT_PREFIX
from engine.data.clean.rules import Cleaner, Counts, Location
from engine.data.read.columns import merge_columns
from engine.data.read.document_batch import DocumentBatch, DroppedItem, printable
from engine.data.read.document_source import DocumentSource
from engine.data.read.formats import json_value
from engine.data.read.jsontext import dumps
from engine.data.read.progress import ProgressEvent
from engine.util.files import writing


def run_task(job: CleanJob, task: int, progress: Callable[[ProgressEvent], None] | None = None) -> None:
    """Write the part of a task, unless it exists."""
    if job.part(task).is_dir():
        return
    folder = job.work_folder / f"{job.part(task).name}.{socket.gethostname()}.{os.getpid()}.tmp"
    cleaner, consumed, needed = Cleaner(job.options), 0, 0
    with writing(job.work_folder, job.resume_hint, lambda: needed):
        try:
            for done in _write_part(job, task, folder, cleaner, progress):
                consumed = done
            if job.part(task).is_dir():  # another process of the same job was faster
                shutil.rmtree(folder)
            else:
                os.replace(folder, job.part(task))
        except BaseException:  # a half-written part would only fill the disk
            needed = _bytes_needed(job, folder, cleaner.counts, consumed)
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _write_part(
    job: CleanJob, task: int, folder: Path, cleaner: Cleaner, progress: Callable[[ProgressEvent], None] | None
) -> Iterator[int]:
    """Write the files of a part in `folder`; yields the number of input bytes (as stored) processed so far."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    first, last = job.files(task)
    source = dataclasses.replace(job.source, files=job.source.files[first:last])
    began, before = time.monotonic(), sum(file.num_bytes for file in job.source.files[:first])
    total = sum(file.num_bytes for file in job.source.files)
    with PartWriter(folder, job.options.minhash, job.options.dropped_text) as part:
        for batch in source.batches():
            _clean_batch(job, batch, source, first, cleaner, part)
            yield batch.consumed
            if progress is not None:
                done, elapsed = before + batch.consumed, time.monotonic() - began
                documents = cleaner.counts.documents
                progress(ProgressEvent("clean", done, max(total, done), documents, 0, elapsed, batch.consumed, 0))
    (folder / "counts.json").write_bytes(orjson.dumps(vars(cleaner.counts)))


def _bytes_needed(job: CleanJob, folder: Path, counts: Counts, consumed: int) -> int:
    """Estimate for the missing parts and the output, extrapolated from `consumed` bytes of this task."""
    total = sum(file.num_bytes for file in job.source.files)
    waiting = sum(f.num_bytes for task in job.missing() for f in job.source.files[slice(*job.files(task))])
    written = sum(path.stat().st_size for path in folder.glob("*"))
    scale = 1 / max(1, consumed)
    return int(written * max(waiting * scale, 1)) + job.output_bytes(counts.text_bytes * max(total * scale, 1))


def _clean_batch(
    job: CleanJob, batch: DocumentBatch, source: DocumentSource, first: int, cleaner: Cleaner, part: PartWriter
) -> None:
    """Apply the rules to a batch and write it to the part. first: number of the task's first file."""
    for drop in batch.drops:
        if drop.stops and not job.options.skip_errors:
            raise drop.error()
        _count_drop(drop, cleaner.counts, part)
    for note in batch.notes:
        cleaner.counts.noticed[note.kind] += 1
        cleaner.counts.sample(f"noticed: {note.kind}", Location(printable(note.file), 0), detail=note.detail)
    for text, (number, record), rest in zip(batch.texts, batch.where, batch.other_columns or itertools.repeat({})):
        location = Location(printable(source.files[number].name), record)
        cleaned, reason, detail = cleaner.clean(text, location)
        if reason:
            part.drop(reason, detail, location, text)
        else:
            renamed = part.keep(cleaned, location, first + number, rest)
            cleaner.counts.renamed.update(f"{old} -> {new}" for old, new in renamed.items())


def _count_drop(drop: DroppedItem, counts: Counts, part: PartWriter) -> None:
    """Count an unreadable input and list it, except blank lines, which are only counted."""
    counts.dropped[f"{INPUT_PREFIX}{drop.reason}"] += 1
    if drop.reason != "blank line":
        location = Location(printable(drop.file), drop.record)
        counts.sample(f"dropped: {INPUT_PREFIX}{drop.reason}", location, detail=drop.detail)
        part.drop(f"{INPUT_PREFIX}{drop.reason}", drop.detail, location, "")


class PartWriter:
    """Writes a part's files. `kept.jsonl.zst` has lines of the output, and each key file one row for each of them."""

    def __init__(self, folder: Path, minhash: MinHash, dropped_text: bool):
        self.minhash, self.dropped_text, self.stack = minhash, dropped_text, contextlib.ExitStack()
        raw = self._open(folder / "kept.jsonl.zst")
        self.kept = self.stack.enter_context(zstandard.ZstdCompressor(level=1).stream_writer(raw, closefd=False))
        self.dropped, self.exact, self.places = (
            self._open(folder / name) for name in ("dropped.jsonl", "exact", "places")
        )
        self.bands = [self._open(folder / f"band-{band:02d}") for band in range(minhash.bands)]

    def _open(self, path: Path) -> IO[bytes]:
        return self.stack.enter_context(path.open("wb"))

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def keep(self, text: str, location: Location, file: int, other_columns: Mapping[str, Any]) -> dict[str, str]:
        """Add a document with its other columns; returns the renamed columns, old -> new name."""
        row, renamed = merge_columns({"text": text, "file": location.file, "record": location.record}, other_columns)
        self.kept.write(dumps(row, json_value) + b"\n")
        data = text.encode()
        self.exact.write(np.frombuffer(xxhash.xxh3_128_digest(data), "<u8").tobytes())
        self.places.write(np.array([file, location.record, len(data)], "<i8").tobytes())
        if self.bands:
            for out, key in zip(self.bands, self.minhash.keys(text).astype("<u8")):
                out.write(key.tobytes())
        return renamed

    def drop(self, reason: str, detail: str, location: Location, text: str) -> None:
        self.dropped.write(drop_line(reason, detail, location, text if self.dropped_text else ""))


def drop_line(reason: str, detail: str, location: Location, text: str) -> bytes:
    """A line of OUTPUT-dropped.jsonl; empty fields are omitted."""
    entry = {"file": location.file, "record": location.record, "reason": reason, "detail": detail, "text": text}
    return dumps({key: value for key, value in entry.items() if value or key in ("file", "record")}) + b"\n"
