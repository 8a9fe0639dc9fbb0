"""Runs tasks of `engine clean` on datatrove's executors: local processes, Slurm jobs, Ray workers.

A failed task writes its error to the work folder, because Slurm and Ray keep it only in a log; the command that finds
it raises it. Slurm jobs continue after the command has ended. Their job number is stored, so that the same command
waits for them instead of starting them again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.clean.job import CleanJob
from engine.data.clean.libraries import require_package
from engine.errors import EXIT_ERROR, DataError, EngineError
from engine.util.signals import Interrupts, Stopped

_SLURM_JOB = "slurm-job"
_POLL_S = 0.5
_INSTALL_RAY = "Install it: pip install ray"


@dataclass(frozen=True)
class Task:
    """Pipeline step that an executor calls in its worker. run: runs task number n; must be picklable by name."""

    run: Callable[[int], None]
    work: Path
    folder: str  # directory of relative paths; Ray starts workers in another one

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        _exit_with_parent()
        os.chdir(self.folder)
        note = self.work / f"failed-{rank:05d}"
        try:
            self.run(rank)
        except Exception as err:
            text = str(err) if isinstance(err, EngineError) else f"{type(err).__name__}: {err}"
            with contextlib.suppress(OSError):
                note.write_text(text, encoding="utf-8")
            raise
        note.unlink(missing_ok=True)  # left by an earlier attempt


def run_on_executor(run: Callable[[int], None], job: CleanJob, stop: Interrupts) -> None:
    """Run the missing tasks. Raises DataError if one fails; afterwards, tasks are missing only if Slurm runs them."""
    work, executor, options, missing = (
        job.work_folder,
        job.options.executor,
        job.options.executor_options(),
        job.missing,
    )
    if not missing():
        return
    if executor == "slurm" and (note := work / _SLURM_JOB).exists():
        number, log = note.read_text(encoding="utf-8").split(maxsplit=1)
        if _is_queued(number):
            return
        note.unlink()
        _raise_failures(work)
        raise DataError(
            "clean.slurm-tasks-lost",
            f"Slurm job {number} has ended, but tasks {missing()} are not done and left no error: they may "
            f"have been killed (time or memory limit). Logs are in {log}. Give the same command to run them again.",
        )
    if executor == "ray":
        require_package("ray", "--executor ray", _INSTALL_RAY)
    module = require_package(f"datatrove.executor.{executor}", f"--executor {executor}")
    for note in work.glob("failed-*"):
        note.unlink()
    log = str((work / f"logs-{time.time_ns()}").absolute())
    pipeline = [Task(run, work, str(Path.cwd()))]
    if executor == "slurm":  # datatrove's statistics job would wait indefinitely if a task failed
        options = {**options, "sbatch_args": {"kill-on-invalid-dep": "yes"}}
    try:
        executor_class = getattr(module, f"{executor.title()}PipelineExecutor")
        started = executor_class(
            pipeline=pipeline, tasks=job.options.tasks, logging_dir=log, skip_completed=False, **options
        )
        with _SETUP[executor](stop):
            started.run()
            if executor == "slurm":
                (work / _SLURM_JOB).write_text(f"{started.job_id} {log}", encoding="utf-8")
    except (Exception, Stopped) as err:  # cluster software raises exceptions of any type
        if not stop:
            time.sleep(_POLL_S)  # a signal to the process group stopped the workers, and may reach this process last
        if stop:
            raise Stopped from None
        _raise_failures(work)
        raise DataError(
            "clean.executor-failed", f"--executor {executor}: {type(err).__name__}: {err}. Logs are in {log}."
        ) from err
    if executor == "slurm":
        return
    _raise_failures(work)
    if lost := missing():
        raise DataError(
            "clean.tasks-without-result",
            f"--executor {executor}: tasks {lost} ended without a result. Logs are in {log}.",
        )


@contextlib.contextmanager
def _local(stop: Interrupts) -> Iterator[None]:
    """Prepare a process pool whose workers block all stop signals but SIGTERM, which ends them, and print nothing."""
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")  # it would warn of the resources that it releases
    try:
        # Started before the signals are blocked, as it would unblock SIGINT.
        require_package("multiprocess.resource_tracker", "--executor local").ensure_running()
    finally:
        sys.warnoptions.pop()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1))
    try:
        require_package("multiprocess.forkserver", "--executor local").ensure_running()  # workers are forked from it
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    yield


@contextlib.contextmanager
def _ray(stop: Interrupts) -> Iterator[None]:
    """Start Ray (it replaces the SIGTERM handler, which is then restored), and shut it down if it was started here."""
    ray = require_package("ray", "--executor ray", _INSTALL_RAY)
    started_here = not ray.is_initialized()
    if started_here:
        ray.init()
        stop.listen()
    try:
        yield
    finally:
        if started_here:
            ray.shutdown()


_SETUP = {"local": _local, "slurm": Interrupts.deferred, "ray": _ray}  # deferred: a job's number is always stored


def _exit_with_parent() -> None:
    """In a worker process: exit when the parent process has ended for any reason, as nothing else would end it."""
    starter = sys.modules.get("multiprocess")  # used by datatrove's local executor to start workers
    parent, before = starter.parent_process() if starter else None, os.getppid()
    if parent is None:
        return

    def watch() -> None:
        while parent.is_alive() and os.getppid() == before:
            time.sleep(_POLL_S)
        os._exit(EXIT_ERROR)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def slurm_job_is_active(work: Path) -> bool:
    """Whether Slurm jobs of an earlier command may still write to the work folder."""
    job = work / _SLURM_JOB
    return job.exists() and _is_queued(job.read_text(encoding="utf-8").split()[0])


def _is_queued(number: str) -> bool:
    """Whether a Slurm job is still pending or running. Raises DataError if squeue fails."""
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--jobs", number], capture_output=True, encoding="utf-8", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        text = f"squeue: {err}. It is needed to query Slurm job {number}. Run this command where Slurm is installed."
        raise DataError("clean.no-squeue", text) from err
    if done.returncode and "Invalid job id" not in done.stderr:  # its answer for jobs that ended long ago
        text = f"squeue --jobs {number}: {done.stderr.strip()}. Try again when Slurm answers."
        raise DataError("clean.squeue-failed", text)
    return done.returncode == 0 and bool(done.stdout.strip())


def _raise_failures(work: Path) -> None:
    """Raise the first error that a task left, and delete all of them, so that the next command tries again."""
    notes = sorted(work.glob("failed-*"))
    texts = [note.read_text(encoding="utf-8") for note in notes]
    for note in notes:
        note.unlink()
    if texts:
        more = f" ({len(texts) - 1} more tasks failed.)" if len(texts) > 1 else ""
        raise DataError("clean.task-failed", f"{texts[0]}{more}")
