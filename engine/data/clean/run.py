"""Raw text to cleaned JSONL: rules for each document, then duplicates among the kept documents.

The input files are divided into `tasks` consecutive groups of about equal size. A task (in this process, or in a
process, Slurm job or Ray worker started by datatrove) writes a part: kept documents with their duplicate keys, dropped
documents, and counts. When all parts exist, one pass over the keys finds duplicates and one over the documents writes
the output. Order and content do not depend on the number of tasks or on where they ran. Memory: a batch of documents,
and 8 bytes per document during the search for duplicates.

OUTPUT.work/ holds the parts. A part gets its name only when it is complete, so that after a kill the same command runs
only the missing ones. Outputs are written there too and renamed at the end, the report last.
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
    """Clean the inputs into OUTPUT; returns the report, or None if Slurm jobs are still running the tasks.

    With `keep_columns`, the other columns of the records are written too, unchanged; rules see only the text. Raises
    ConfigError for invalid options, and DataError for bad input, existing outputs or failed tasks.
    """
    began, stop, o = time.monotonic(), Interrupts(listen=False) if stop is None else stop, options
    if errors := list(options.errors()):
        raise ConfigError(errors)
    job = CleanJob(options, DocumentSource(()))
    own_files = OwnFiles(job.output_paths, None, job.work_folder)
    job = dataclasses.replace(job, source=o.source(own_files, keep_other_columns=o.keep_columns))
    stop.resume_hint = job.interrupt_hint
    _check(job)
    Cleaner(options)  # reports a missing package or evaluation file before any work
    if slurm_job_is_active(job.work_folder):
        return None
    with WorkFolder(job.work_folder, "clean", _OWN_NAMES) as work:
        _begin(job, work)
        reject_existing(job.output_paths, o.overwrite)  # another command may have written them meanwhile
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
        text = f"{o.output}: the output name has to end in {', '.join(SUFFIXES)}."
        raise DataError("clean.output-suffix", text)
    reject_existing(job.output_paths, o.overwrite)
    if o.executor != "here" and job.source.reads_once:
        text = f"tasks of --executor {o.executor} cannot read standard input or pipes. Give files."
        raise DataError("clean.input-read-only-once", text)
    evaluation_files(o.decontaminate)
    if all(file.drop for file in job.source.files):
        raise no_text_error(job.source, o.skip_errors)


def _begin(job: CleanJob, work: WorkFolder) -> None:
    """Resume with the existing parts, or start with none."""
    settings = job.settings()
    # Parts finished without an error under --on-error stop are valid for --on-error skip too.
    strict = [{**settings, "on error": "stop"}] if job.options.skip_errors else []
    resumed = work.resume(settings, job.options.overwrite, strict, worth_keeping=any(job.work_folder.glob(_PART_GLOB)))
    if not resumed or job.source.reads_once:  # standard input may differ from that of the earlier command
        work.start(settings)


def _run_tasks(job: CleanJob, progress: Callable[[ProgressEvent], None] | None, stop: Interrupts) -> None:
    if job.options.executor == "here":
        for task in range(job.options.tasks):
            run_task(job, task, progress)
    else:
        run_on_executor(functools.partial(run_task, job), job, stop)
