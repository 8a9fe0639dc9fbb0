"""Raw text to PREFIX-train, -valid and -test: choose the split, train a tokenizer if requested, encode, count.

The split of a document is a keyed hash of its number: each split samples the whole corpus (a split of the tail would
measure only the text appended last), is stable when documents are added at the end, and the splits are disjoint. A
tokenizer is trained on the train documents only. Everything streams: memory is a few batches, not the corpus.

Reading, encoding and appending (flow.py) run concurrently and fill data files in PREFIX.parts/ (shards.py: how these
survive a kill), which get their final names when all are complete. Documents stay in input order.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.data.prepare.flow import CorpusEncoder
from engine.data.prepare.job import RERUN, SPLITS, PrepareJob, settings_of, stop_at_errors
from engine.data.prepare.options import PrepareOptions
from engine.data.prepare.report import PrepareReport, SplitReport
from engine.data.prepare.shards import Shards
from engine.data.read.account import ReadSummary, no_text_error
from engine.data.read.document_source import DocumentSource
from engine.data.read.progress import Progress, ProgressEvent
from engine.data.tokenize.recipe import Recipe
from engine.data.tokenize.tokenizer import Tokenizer
from engine.data.tokenize.train import TextSampler, train_in_subprocess
from engine.data.workfolder import PUBLISH_PLAN, read_work_json, reject_existing
from engine.errors import ConfigError, DataError
from engine.util.files import sync_folder
from engine.util.prefetch import read_ahead
from engine.util.signals import Interrupts, Stopped


def prepare(
    options: PrepareOptions,
    *,
    suffixes: tuple[str, str, str] = ("-train", "-valid", "-test"),
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda text: None,
    stop: Interrupts | None = None,
) -> PrepareReport:
    """Tokenise the inputs into OUTPUT-train and, where their fractions are > 0, OUTPUT-valid and OUTPUT-test.

    suffixes: of the three prefixes. After a kill at any moment, the same call resumes after the last shard; on a signal
    (`stop`) a shard is committed first, then Stopped is raised. Raises ConfigError for invalid options, and DataError
    for bad input (with on_error "skip" it is counted and listed), outputs that exist unless `overwrite`, and a split
    without documents.
    """
    if errors := list(options.errors()):
        raise ConfigError(errors)
    stop = Interrupts(listen=False) if stop is None else stop
    job = PrepareJob(options, DocumentSource(()), suffixes, progress, note, stop)
    source = options.source(job.own_files, max_document_bytes=options.max_document_bytes)
    job = dataclasses.replace(job, source=source)
    if options.train_vocab_size and source.reads_once:
        text = (
            "standard input (-) and pipes can be read only once: train the tokenizer on files, or give an existing one"
        )
        raise DataError("prepare.training-reads-twice", text)
    if not any(file.drop is None and (file.num_bytes or file.once or "://" in file.name) for file in source.files):
        raise no_text_error(source, options.skip_errors)
    return _run(job)


def _run(job: PrepareJob) -> PrepareReport:
    """Resume the work in PREFIX.parts, or start it."""
    loaded = None if job.options.train_vocab_size else job.load_tokenizer()
    settings = settings_of(job, loaded)
    if job.parts_folder.exists():
        job.stop.resume_hint = lambda: f"finished shards are kept in {job.parts_folder}; {RERUN} to resume after them"
    else:
        reject_existing(job.must_not_exist(), job.options.overwrite)
    with Shards(job.parts_folder, job.splits) as shards:
        plan = shards.publish_plan(settings)
        if plan is not None:
            return _publish(job, shards, plan)
        if not shards.resume(settings, job.options.overwrite):
            _reject_existing_outputs(job, shards)
            shards.start(settings)
        try:
            tokenizer = loaded or _trained_tokenizer(job)
            plan = CorpusEncoder(job, shards, tokenizer).run()
        except (DataError, Stopped) as err:
            trained = isinstance(err, Stopped) and (job.parts_folder / "trained").exists()
            if not trained and not shards.has_shards():  # nothing worth keeping for the next command
                shards.discard()
            raise
        shards.write_json(PUBLISH_PLAN, plan)
        return _publish(job, shards, plan)


def _reject_existing_outputs(job: PrepareJob, shards: Shards) -> None:
    """Raise DataError if outputs exist; removes the parts folder first if it is the empty rest of a killed command."""
    try:
        reject_existing(job.must_not_exist(), job.options.overwrite)
    except DataError:
        if shards.settings() is None:
            shards.discard()
        raise


def _trained_tokenizer(job: PrepareJob) -> Tokenizer:
    """The tokenizer that an earlier call trained and saved in the parts folder, else train and save it there."""
    folder = job.parts_folder / "trained"
    if not folder.exists():
        recipe, sampler = Recipe(job.options.train_vocab_size), TextSampler(job.options.train_bytes, job.total)
        trained = train_in_subprocess(_train_texts(job, sampler), recipe, sampler, job.progress)
        trained.tokenizer.save(job.parts_folder / "trained.tmp")
        (job.parts_folder / "trained.tmp").rename(folder)
        sync_folder(job.parts_folder)
    return Tokenizer.load(folder, job.options.parse_special)


def _train_texts(job: PrepareJob, sampler: TextSampler) -> Iterator[str]:
    began, number, account = time.monotonic(), 0, ReadSummary()
    for batch in read_ahead(job.source.batches()):
        stop_at_errors(job, batch)
        account.add(batch)
        splits = job.split_numbers(number, len(batch.texts))
        number += len(batch.texts)
        yield from sampler.take([text for text, split in zip(batch.texts, splits) if not split], batch.consumed)
        if job.progress is not None:
            elapsed, consumed = time.monotonic() - began, batch.consumed
            job.progress(ProgressEvent("train tokenizer", consumed, job.total, number, 0, elapsed, consumed, 0))
    if not number:
        raise account.error(job.source)


def _publish(job: PrepareJob, shards: Shards, plan: dict[str, Any]) -> PrepareReport:
    """Publish the tokenizer first, as ids are useless without it, and the report last."""
    trained = job.parts_folder / "trained"
    if job.options.train_vocab_size and trained.exists():
        Tokenizer.load(trained).save(job.options.tokenizer)
    moves = [(job.parts_folder / name, Path(target)) for name, target in plan["moves"]]
    targets = {target for _, target in moves}
    shards.publish([path for path in job.output_paths() if path not in targets], moves)
    report = read_work_json(Path(f"{job.options.output}-report.json")) or {}
    splits = {name: SplitReport(**report[name]) if report.get(name) else None for name in SPLITS}
    return PrepareReport(**{**report, **splits})
