"""Joins all parts of `engine clean` to one output: finds duplicates among them and copies the other documents."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import zstandard

from engine.data.clean.duplicates import earliest_match
from engine.data.clean.job import CleanJob
from engine.data.clean.report import report_of
from engine.data.clean.rules import Counts, Location, text_size
from engine.data.clean.task import drop_line
from engine.data.read.document_batch import printable
from engine.data.read.jsontext import loads
from engine.data.read.progress import ProgressEvent
from engine.util.files import read_json, sync_file, write_synced, writing


class PartJoiner:
    """Finds duplicates in all parts, then writes output, dropped list and report. progress: callback for events."""

    def __init__(self, job: CleanJob, progress: Callable[[ProgressEvent], None] | None):
        self.job, self.progress = job, progress
        self.parts = [job.part(task) for task in range(job.options.tasks)]
        self.counts = Counts()
        for part in self.parts:
            self.counts.add(Counts.from_json(read_json(part / "counts.json")))
        # Of each part int64 [documents, 3]: file, record, bytes of text.
        self.locations = [_map_int64(part / "places").reshape(-1, 3) for part in self.parts]
        self.starts = np.cumsum([0, *(len(rows) for rows in self.locations)])
        o, total = job.options, int(self.starts[-1])
        # For each document the number of the earliest exact and the earliest near duplicate, int64 [documents].
        self.exact = earliest_match([[part / "exact" for part in self.parts]] if o.exact_duplicates else [], total, 2)
        bands = [[part / f"band-{band:02d}" for part in self.parts] for band in range(o.minhash_bands)]
        self.near = earliest_match(bands, total, 1)

    def run(self, began: float) -> tuple[dict[str, Any], list[tuple[Path, Path]]]:
        """Write output, drops and report in the work folder; returns the report and the renames (source, target)."""
        job = self.job
        output, dropped, report_path = (job.work_folder / name for name in (f"output{job.suffix}", "dropped", "report"))
        with writing(job.work_folder, job.resume_hint, lambda: job.output_bytes(self.counts.text_bytes)):
            try:
                kept = self._write(output, dropped)
                report = report_of(job, self.counts, kept)
                report["elapsed_s"] = time.monotonic() - began
                write_synced(report_path, json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
            except BaseException:
                for path in (output, dropped, report_path):
                    path.unlink(missing_ok=True)
                raise
        return report, list(zip((output, dropped, report_path), job.output_paths))

    def _write(self, output: Path, drops: Path) -> tuple[int, int]:
        """Write the output and the dropped list; returns the number of kept documents and of their text bytes."""
        with open(drops, "wb") as dropped:
            for part in self.parts:
                with open(part / "dropped.jsonl", "rb") as file:
                    shutil.copyfileobj(file, dropped)
            with _output(output, self.job.suffix) as out:
                kept = self._write_kept(out, dropped)
            sync_file(dropped)
        return kept

    def _write_kept(self, out: IO[bytes], dropped: IO[bytes]) -> tuple[int, int]:
        """Copy documents that are no duplicates; returns their number and the number of their text bytes."""
        began, number, kept, total = time.monotonic(), 0, 0, int(self.starts[-1])
        for part in self.parts:
            for line in _lines(part / "kept.jsonl.zst"):
                if self.exact[number] < number:
                    dropped.write(self._drop("exact duplicate", number, int(self.exact[number]), line))
                elif self.near[number] < number:
                    dropped.write(self._drop("near duplicate", number, int(self.near[number]), line))
                else:
                    out.write(line)
                    kept += 1
                number += 1
                if self.progress is not None and number % 4096 == 0:
                    elapsed = time.monotonic() - began
                    self.progress(ProgressEvent("write", number, total, number, 0, elapsed, number, 0))
        total_bytes = sum(int(rows[:, 2].sum()) for rows in self.locations)
        dropped_bytes = sum(self.counts.dropped_bytes[reason] for reason in ("exact duplicate", "near duplicate"))
        return kept, total_bytes - dropped_bytes

    def _drop(self, reason: str, number: int, original: int, line: bytes) -> bytes:
        """Count a duplicate; returns its line of the dropped list."""
        text, location, detail = loads(line)["text"], self._location(number), f"of {self._location(original)}"
        self.counts.drop(reason, location, text_size(text), text, detail)
        return drop_line(reason, detail, location, text if self.job.options.dropped_text else "")

    def _location(self, document: int) -> Location:
        part = int(np.searchsorted(self.starts, document, "right")) - 1
        file, record, _ = self.locations[part][document - self.starts[part]]
        return Location(printable(self.job.source.files[int(file)].name), int(record))


def _map_int64(path: Path) -> npt.NDArray[np.int64]:
    is_empty = path.stat().st_size == 0  # an empty file cannot be mapped
    return np.empty(0, np.int64) if is_empty else np.memmap(path, "<i8", "r")


def _lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        yield from io.BufferedReader(stream, 1 << 20)


@contextlib.contextmanager
def _output(path: Path, suffix: str) -> Iterator[IO[bytes]]:
    """The output file, compressed by its suffix; equal documents give equal bytes."""
    with open(path, "wb") as raw:
        if suffix.endswith(".zst"):
            with zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False) as packed:
                yield packed
        elif suffix.endswith(".gz"):
            with gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed_gz:
                yield cast(IO[bytes], packed_gz)
        else:
            yield raw
        sync_file(raw)
