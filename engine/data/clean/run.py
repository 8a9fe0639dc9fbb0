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

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

from engine.data.clean.contamination import evaluation_files
from engine.data.clean.executors import run_on_executor, slurm_job_is_active
from engine.data.clean.job import SUFFIXES, CleanJob
from engine.data.clean.join import PartJoiner
from engine.data.clean.options import CleanOptions
from engine.data.clean.rules import Cleaner
from engine.data.clean.task import run_task
from engine.data.read.account import no_text_error
from engine.data.read.document_source import DocumentSource
from engine.data.read.own import OwnFiles
from engine.data.read.progress import ProgressEvent
from engine.data.workfolder import WorkFolder, reject_existing
from engine.errors import ConfigError, DataError
from engine.util.signals import Interrupts

_PART_GLOB = "part-?????"
_OWN_NAMES = ("part-*", "output*", "dropped", "report", "slurm-job", "failed-*", "logs-*", "*.tmp")


def clean(
    options: CleanOptions,
    progress: Callable[[ProgressEvent], None] | None = None,
    stop: Interrupts | None = None,
) -> dict[str, Any] | None:
    """Clean the inputs into OUTPUT; returns the report, or None if the tasks are still running elsewhere.

    With `keep_columns`, what the records hold beside the text is written too, as it is; rules look at the text alone.
    Raises ConfigError for options that make no sense, DataError for all that stands in the way.
    """
    began, stop, o = time.monotonic(), Interrupts(listen=False) if stop is None else stop, options
    if errors := list(options.errors()):
        raise ConfigError(errors)
    job = CleanJob(options, DocumentSource(()))
    own_files = OwnFiles(job.output_paths, None, job.work_folder)
    job = dataclasses.replace(job, source=o.source(own_files, keep_other_columns=o.keep_columns))
    stop.resume_hint = job.interrupt_hint
    _check(job)
    Cleaner(options)  # a missing package or evaluation file is told before any work
    if slurm_job_is_active(job.work_folder):
        return None
    with WorkFolder(job.work_folder, "clean", _OWN_NAMES) as work:
        _begin(job, work)
        reject_existing(job.output_paths, o.overwrite)  # another command may have ended in between
        _run_tasks(job, progress, stop)
        if job.missing():
            return None
        report, moves = PartJoiner(job, progress).run(began)
        with stop.deferred():
            work.publish((), moves)
        return report


def _check(job: CleanJob) -> None:
    o = job.options
    if not job.suffix:
        text = f"{o.output}: the output has to end in {', '.join(SUFFIXES)}. Choose such a name."
        raise DataError("clean.output-suffix", text)
    reject_existing(job.output_paths, o.overwrite)
    if o.executor != "here" and job.source.reads_once:
        text = f"standard input cannot be read by tasks of executor {o.executor}, and no pipe. Give files."
        raise DataError("clean.input-read-only-once", text)
    evaluation_files(o.decontaminate)
    if all(file.drop for file in job.source.files):
        raise no_text_error(job.source, o.skip_errors)


def _begin(job: CleanJob, work: WorkFolder) -> None:
    """Go on with the parts that are there, or start with none."""
    settings = job.settings()
    # What was made without meeting an error is right for --on-error skip too.
    strict = [{**settings, "on error": "stop"}] if job.options.skip_errors else []
    resumed = work.resume(settings, job.options.overwrite, strict, worth_keeping=any(job.work_folder.glob(_PART_GLOB)))
    if not resumed or job.source.reads_once:  # nothing tells whether standard input is the same
        work.start(settings)


def _run_tasks(job: CleanJob, progress: Callable[[ProgressEvent], None] | None, stop: Interrupts) -> None:
    if job.options.executor == "here":
        for task in range(job.options.tasks):
            run_task(job, task, progress)
    else:
        run_on_executor(functools.partial(run_task, job), job, stop)
