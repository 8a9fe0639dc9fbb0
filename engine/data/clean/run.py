"""Raw text to cleaned JSONL: the rules document by document, then duplicates among what they leave.

The input files are cut into `tasks` runs of about the same size. A task (here, or in a process, Slurm job or Ray worker
that datatrove starts) writes a part: its documents with the keys that duplicates are found by, what it dropped, and its
counts. When all parts are there, one pass over the keys finds the duplicates and one over the documents writes the
output. Order and content do not depend on the number of tasks, nor on where they ran. Memory: a batch of documents,
and one number a document while duplicates are looked for.

OUTPUT.work/ holds the parts; a part appears under its name only when it is complete, so the same command goes on after
a kill with the parts that are missing. Outputs are written there too and renamed at the end, the report last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import io
import itertools
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import orjson
import zstandard

from engine.data.clean.contamination import evaluation_files
from engine.data.clean.duplicates import earliest
from engine.data.clean.executors import run_elsewhere, slurm_is_at_work
from engine.data.clean.report import INPUT, report_of
from engine.data.clean.rules import Cleaner, Counts, Place, Rules, text_size
from engine.data.clean.task import PartWriter, drop_line
from engine.data.read.account import unreadable
from engine.data.read.document_batch import Batch, Drop, printable
from engine.data.read.document_source import DocumentSource
from engine.data.read.jsontext import loads
from engine.data.read.own import Own
from engine.data.read.progress import ProgressEvent
from engine.data.workfolder import AGAIN, WorkFolder, as_json, refuse_existing
from engine.errors import DataError
from engine.util.files import read_json, sync_file, write_synced, writing
from engine.util.signals import Interrupts

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
EXECUTORS = ("here", "local", "slurm", "ray")
_PART_GLOB = "part-?????"
_OWNED = ("part-*", "output*", "dropped", "report", "slurm-job", "failed-*", "logs-*", "*.tmp")
_VERSION = 4  # of the parts; changes when a rule's code gives another result


@dataclass(frozen=True)
class CleanJob:
    """What to do, as a task needs it."""

    source: DocumentSource
    output: str
    rules: Rules
    tasks: int
    skip_errors: bool
    dropped_text: bool

    @property
    def work(self) -> Path:
        return Path(f"{self.output}.work")

    @property
    def suffix(self) -> str:
        return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if self.output.endswith(s)), "")

    def target(self, name: str) -> Path:
        """corpus/clean.jsonl.zst -> corpus/clean-NAME."""
        return Path(f"{self.output.removesuffix(self.suffix)}-{name}")

    @property
    def targets(self) -> list[Path]:
        """Everything that is written."""
        return [Path(self.output), self.target("dropped.jsonl"), self.target("report.json")]

    def missing(self) -> list[int]:
        """Tasks without a part."""
        return [task for task in range(self.tasks) if not self.part(task).is_dir()]

    def part(self, task: int) -> Path:
        return self.work / f"part-{task:05d}"

    def files(self, task: int) -> tuple[int, int]:
        """The input files of a task: first and one behind the last. Every file is in one task."""
        weights = [file.num_bytes + 1 for file in self.source.files]
        ends = itertools.accumulate(weights)
        total = sum(weights)
        mine = [i for i, (end, size) in enumerate(zip(ends, weights)) if (end - size) * self.tasks // total == task]
        return (mine[0], mine[-1] + 1) if mine else (0, 0)


def clean(
    inputs: Sequence[str | Path],
    output: str,
    rules: Rules,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    json_key: Sequence[str] = ("text",),
    format: str = "",
    keep_columns: bool = True,
    on_error: str = "stop",
    tasks: int = 1,
    executor: Literal["here", "local", "slurm", "ray"] = "here",
    executor_options: dict[str, Any] | None = None,
    dropped_text: bool = False,
    overwrite: bool = False,
    progress: Callable[[ProgressEvent], None] | None = None,
    stop: Interrupts | None = None,
) -> dict[str, Any] | None:
    """Clean `inputs` into `output`; returns the report, or None if the tasks are still running elsewhere.

    `keep_columns`: what the records hold beside the text is written too, as it is; rules look at the text alone.
    """
    began, stop = time.monotonic(), Interrupts(heard=False) if stop is None else stop
    job = CleanJob(DocumentSource(()), output, rules, tasks, on_error == "skip", dropped_text)
    mine = Own(job.targets, None, job.work)
    source = DocumentSource.of(
        inputs, include, exclude, mine, keys=tuple(json_key), format=format, keep_rest=keep_columns
    )
    job = dataclasses.replace(job, source=source)
    stop.go_on = lambda: _left(job)
    _check(job, executor, overwrite)
    Cleaner(rules)  # a missing package or evaluation file is told before any work
    if slurm_is_at_work(job.work):
        return None
    with WorkFolder(job.work, "clean", _OWNED) as work:
        _begin(job, work, overwrite)
        refuse_existing(job.targets, overwrite)  # another command may have ended in between
        _run_tasks(job, executor, executor_options or {}, progress, stop)
        if job.missing():
            return None
        return _merge(job, work, progress, began, stop)


def _begin(job: CleanJob, work: WorkFolder, overwrite: bool) -> None:
    """Go on with the parts that are there, or start with none."""
    facts = _facts(job)
    # What was made without meeting an error is right for --on-error skip too.
    strict = [{**facts, "on error": "stop"}] if job.skip_errors else []
    resumed = work.resume(facts, overwrite, strict, worth=any(job.work.glob(_PART_GLOB)))
    if not resumed or job.source.reads_once:  # nothing tells whether standard input is the same
        work.begin(facts)


def _left(job: CleanJob) -> str:
    """What a signal leaves in the work folder, and what to do."""
    missing, again = len(job.missing()), "give the same command again"
    if job.source.reads_once:
        return f"nothing is kept of standard input; {again}"
    if missing == job.tasks == 1:
        return f"nothing is kept yet; {again} (with --tasks N, of N parts of the input each is kept when it is done)"
    if missing == job.tasks:
        return f"nothing is kept yet; {again}"
    return f"{job.tasks - missing} of {job.tasks} parts are kept in {job.work}; {again} and it goes on with the rest"


def _go_on() -> str:
    return f"{AGAIN[:-1]}: the parts that are complete are kept."


def _check(job: CleanJob, executor: str, overwrite: bool) -> None:
    if not job.suffix:
        raise DataError(f"{job.output}: the output has to end in {', '.join(SUFFIXES)}. Choose such a name.")
    if job.tasks < 1:
        raise DataError(f"tasks = {job.tasks}: at least 1 is needed.")
    refuse_existing(job.targets, overwrite)
    if executor != "here" and job.source.reads_once:
        raise DataError(f"standard input cannot be read by tasks of executor {executor}, and no pipe. Give files.")
    evaluation_files(job.rules.decontaminate)
    if all(file.drop for file in job.source.files):
        raise unreadable(job.source, job.skip_errors)


def _facts(job: CleanJob) -> dict[str, Any]:
    """All that the result depends on."""
    source, evaluations = job.source, evaluation_files(job.rules.decontaminate)
    facts = {
        "version": _VERSION,
        "inputs": [f"{file.name}: {file.num_bytes:,} bytes (stamp {file.stamp})" for file in source.files],
        "evaluation files": [f"{file.name}: {file.num_bytes:,} bytes (stamp {file.stamp})" for file in evaluations],
        "json keys": list(source.keys),
        "format": source.format,
        "keep columns": source.keep_rest,
        "rules": dataclasses.asdict(job.rules),
        "tasks": job.tasks,
        "dropped text": job.dropped_text,
        "on error": "skip" if job.skip_errors else "stop",
    }
    return as_json(facts)


def _run_tasks(
    job: CleanJob,
    executor: str,
    options: dict[str, Any],
    progress: Callable[[ProgressEvent], None] | None,
    stop: Interrupts,
) -> None:
    if executor == "here":
        for task in range(job.tasks):
            run_task(job, task, progress)
    else:
        run_elsewhere(functools.partial(run_task, job), job.work, job.tasks, job.missing, executor, options, stop)


# ---- a task ----


def run_task(job: CleanJob, task: int, progress: Callable[[ProgressEvent], None] | None = None) -> None:
    """Write one part, unless it is there."""
    if job.part(task).is_dir():
        return
    folder = job.work / f"{job.part(task).name}.{socket.gethostname()}.{os.getpid()}.tmp"
    cleaner, consumed, needed = Cleaner(job.rules), 0, 0
    with writing(job.work, _go_on, lambda: needed):
        try:
            for done in _write_part(job, task, folder, cleaner, progress):
                consumed = done
            if job.part(task).is_dir():  # another process of the same job was faster
                shutil.rmtree(folder)
            else:
                os.replace(folder, job.part(task))
        except BaseException:  # what is half-written would only fill the disk
            needed = _bytes_needed(job, folder, cleaner.counts, consumed)
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _write_part(
    job: CleanJob, task: int, folder: Path, cleaner: Cleaner, progress: Callable[[ProgressEvent], None] | None
) -> Iterator[int]:
    """Write the files of a part in `folder`; yields how many stored bytes of its input are done."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    first, last = job.files(task)
    source = dataclasses.replace(job.source, files=job.source.files[first:last])
    began, before = time.monotonic(), sum(file.num_bytes for file in job.source.files[:first])
    total = sum(file.num_bytes for file in job.source.files)
    with PartWriter(folder, job.rules.minhash, job.dropped_text) as part:
        for batch in source.batches():
            _clean_batch(job, batch, source, first, cleaner, part)
            yield batch.consumed
            if progress is not None:
                done, elapsed = before + batch.consumed, time.monotonic() - began
                documents = cleaner.counts.documents
                progress(ProgressEvent("clean", done, max(total, done), documents, 0, elapsed, batch.consumed, 0))
    (folder / "counts.json").write_bytes(orjson.dumps(vars(cleaner.counts)))


def _bytes_needed(job: CleanJob, folder: Path, counts: Counts, consumed: int) -> int:
    """Of the parts that are missing and of the output, if the rest is like what was read."""
    total = sum(file.num_bytes for file in job.source.files)
    waiting = sum(f.num_bytes for task in job.missing() for f in job.source.files[slice(*job.files(task))])
    written = sum(path.stat().st_size for path in folder.glob("*"))
    scale = 1 / max(1, consumed)
    return int(written * max(waiting * scale, 1)) + _output_bytes(job, counts.text_bytes * max(total * scale, 1))


def _output_bytes(job: CleanJob, text_bytes: float) -> int:
    """About what the output takes: lines of JSON, and packed a third of it."""
    return int(1.1 * text_bytes if job.suffix == ".jsonl" else 0.4 * text_bytes)


def _clean_batch(
    job: CleanJob, batch: Batch, source: DocumentSource, first: int, cleaner: Cleaner, part: PartWriter
) -> None:
    for drop in batch.drops:
        if drop.stops and not job.skip_errors:
            raise drop.refuse()
        _count_drop(drop, cleaner.counts, part)
    for note in batch.notes:
        cleaner.counts.noticed[note.kind] += 1
        cleaner.counts.sample(f"noticed: {note.kind}", Place(printable(note.file), 0), detail=note.detail)
    for text, (number, record), rest in zip(batch.texts, batch.where, batch.rest or itertools.repeat({})):
        place = Place(printable(source.files[number].name), record)
        cleaned, reason, detail = cleaner.clean(text, place)
        if reason:
            part.drop(reason, detail, place, text)
        else:
            renamed = part.keep(cleaned, place, first + number, rest)
            cleaner.counts.renamed.update(f"{old} -> {new}" for old, new in renamed.items())


def _count_drop(drop: Drop, counts: Counts, part: PartWriter) -> None:
    """Something that could not be read: it is no document, but it is not lost in silence either."""
    counts.dropped[f"{INPUT}{drop.reason}"] += 1
    if drop.reason != "blank line":
        place = Place(printable(drop.file), drop.record)
        counts.sample(f"dropped: {INPUT}{drop.reason}", place, detail=drop.detail)
        part.drop(f"{INPUT}{drop.reason}", drop.detail, place, "")


# ---- all parts ----


def _merge(
    job: CleanJob,
    work: WorkFolder,
    progress: Callable[[ProgressEvent], None] | None,
    began: float,
    stop: Interrupts,
) -> dict[str, Any]:
    parts = [job.part(task) for task in range(job.tasks)]
    counts = Counts()
    for part in parts:
        counts.add(Counts.of(read_json(part / "counts.json")))
    sizes = [(part / "places").stat().st_size // 24 for part in parts]
    exact = earliest([[part / "exact" for part in parts]] if job.rules.exact else [], sum(sizes), 2)
    bands = [[part / f"band-{band:02d}" for part in parts] for band in range(job.rules.minhash.bands)]
    near = earliest(bands, sum(sizes), 1)
    outputs = {Path(job.output): job.work / f"output{job.suffix}", job.target("dropped.jsonl"): job.work / "dropped"}
    with writing(job.work, _go_on, lambda: _output_bytes(job, counts.text_bytes)):
        try:
            kept = _write_outputs(job, parts, sizes, exact, near, list(outputs.values()), counts, progress)
            report = report_of(job.source, job.output, job.rules, job.tasks, counts, kept)
            report["elapsed_s"] = time.monotonic() - began
            outputs[job.target("report.json")] = job.work / "report"
            write_synced(job.work / "report", json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
        except BaseException:
            for path in outputs.values():
                path.unlink(missing_ok=True)
            raise
    with stop.deferred():
        work.publish((), [(source, target) for target, source in outputs.items()])
    return report


def _write_outputs(
    job: CleanJob,
    parts: Sequence[Path],
    sizes: Sequence[int],
    exact: npt.NDArray[np.int64],
    near: npt.NDArray[np.int64],
    outputs: Sequence[Path],
    counts: Counts,
    progress: Callable[[ProgressEvent], None] | None,
) -> tuple[int, int]:
    """Write the output and the list of what was dropped; returns documents and bytes of text that stay."""
    with open(outputs[1], "wb") as dropped:
        for part in parts:
            with open(part / "dropped.jsonl", "rb") as file:
                shutil.copyfileobj(file, dropped)
        with _output(outputs[0], job.suffix) as out:
            kept = _write_kept(job, parts, sizes, exact, near, out, dropped, counts, progress)
        sync_file(dropped)
    return kept


def _write_kept(
    job: CleanJob,
    parts: Sequence[Path],
    sizes: Sequence[int],
    exact: npt.NDArray[np.int64],
    near: npt.NDArray[np.int64],
    out: IO[bytes],
    dropped: IO[bytes],
    counts: Counts,
    progress: Callable[[ProgressEvent], None] | None,
) -> tuple[int, int]:
    """Copy what is no duplicate; returns its documents and bytes of text."""
    began, number, kept, starts = time.monotonic(), 0, 0, np.cumsum([0, *sizes])
    tables = [_map(part / "places").reshape(-1, 3) for part in parts]

    def place_of(document: int) -> Place:
        part = int(np.searchsorted(starts, document, "right")) - 1
        file, record, _ = tables[part][document - starts[part]]
        return Place(printable(job.source.files[int(file)].name), int(record))

    for part in parts:
        for line in _lines(part / "kept.jsonl.zst"):
            reason = "exact duplicate" if exact[number] < number else "near duplicate" if near[number] < number else ""
            if reason:
                text = loads(line)["text"]
                place, original = place_of(number), place_of(int(exact[number] if reason[0] == "e" else near[number]))
                counts.drop(reason, place, text_size(text), text, f"of {original}")
                dropped.write(drop_line(reason, f"of {original}", place, text if job.dropped_text else ""))
            else:
                out.write(line)
                kept += 1
            number += 1
            if progress is not None and number % 4096 == 0:
                elapsed = time.monotonic() - began
                progress(ProgressEvent("write", number, sum(sizes), number, 0, elapsed, number, 0))
    sizes_of = sum(int(table[:, 2].sum()) for table in tables)
    kept_bytes = sizes_of - sum(counts.dropped_bytes[reason] for reason in ("exact duplicate", "near duplicate"))
    return kept, kept_bytes


def _map(path: Path) -> npt.NDArray[np.int64]:
    return np.memmap(path, "<i8", "r") if path.stat().st_size else np.empty(0, np.int64)  # an empty file has no map


def _lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        yield from io.BufferedReader(stream, 1 << 20)


@contextlib.contextmanager
def _output(path: Path, suffix: str) -> Iterator[IO[bytes]]:
    """The output file, packed as its name says; the same documents give the same bytes."""
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
