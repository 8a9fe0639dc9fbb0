"""Log files of a run: config.toml, metrics.jsonl (one JSON object per line, full precision), TensorBoard events."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.config.load import Resolved
from engine.train.evaluate import Score
from engine.util.files import open_no_follow, replace_synced

_CLOSE_S = 10.0  # longest wait for TensorBoard to write its last events


class MetricsLog:
    """Writes the log files on the one rank where `enabled`; elsewhere it only builds the records. A context manager.

    metrics.jsonl is appended to: after a resume it may contain a step twice, and the later line counts. On a full disk,
    lines and events are lost, with one warning each, but training continues; only a failed checkpoint ends it.
    """

    def __init__(self, run_dir: Path, resolved: Resolved, first_step: int, *, enabled: bool):
        self.run_dir, self.resolved, self.enabled = run_dir, resolved, enabled
        self.first_step = first_step
        self.lines: _Lines | None = None
        self.board: Any = None
        self._excepthook: Callable[[Any], Any] = threading.excepthook

    def __enter__(self) -> MetricsLog:
        if self.enabled:
            replace_synced(self.run_dir / "config.toml", self.resolved.toml().encode())
            self.lines = _Lines(self.run_dir / "metrics.jsonl")
            if self.resolved.config.monitor.tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

                threading.excepthook = self._of_thread
                folder = str(self.run_dir / "tensorboard")  # max_queue: a thread that has died must not block us
                self.board = SummaryWriter(folder, purge_step=self.first_step + 1, max_queue=1 << 20)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.lines is not None:
            self.lines.close()
        if self.board is not None:
            closing = threading.Thread(target=self._close_board, daemon=True)
            closing.start()
            closing.join(_CLOSE_S)
        threading.excepthook = self._excepthook

    def _close_board(self) -> None:
        try:
            self.board.close()
        except OSError as error:
            self._without_board(error)

    def _without_board(self, error: OSError) -> None:
        self.board = None
        where = self.run_dir / "tensorboard"
        warnings.warn(f"{where} cannot be written ({error.strerror}); continuing without TensorBoard", stacklevel=2)

    def _of_thread(self, error: Any) -> None:
        if not (isinstance(error.exc_value, OSError) and "AsyncWriter" in type(error.thread).__name__):
            self._excepthook(error)  # otherwise _write gets the same error and reports it

    def step(
        self, step: int, loss: float, grad_norm: float, lr: float, tokens: int, rates: dict[str, float]
    ) -> dict[str, float]:
        """Record one step; `tokens` counts those consumed since the start of the run. Returns the record."""
        record = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens": tokens, **rates}
        self._write(record, {f"train/{k}": v for k, v in record.items() if k != "step"})
        return record

    def validation(self, step: int, score: Score) -> None:
        """Record a validation in a separate line: {"step", "val_loss", ...}."""
        record = {"step": step, **{f"val_{k}": v for k, v in score.as_dict().items()}}
        self._write(record, {f"val/{k}": v for k, v in score.as_dict().items()})

    def skipped_step(self, step: int, tokens: int) -> None:
        """Record a step skipped by train.skip_steps: {"step", "left_out", "tokens"}; it has no loss."""
        self._write({"step": step, "left_out": 1.0, "tokens": tokens}, {})

    def _write(self, record: dict[str, float], scalars: dict[str, float]) -> None:
        if self.lines is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
            self.lines.add(json.dumps(finite))  # JSON has no NaN: the norm of a skipped step is null
        if self.board is not None:
            try:
                for name, value in scalars.items():
                    self.board.add_scalar(name, value, int(record["step"]))
            except OSError as error:
                self._without_board(error)


def lacks_validation(run_dir: Path, step: int) -> bool:
    """Whether metrics.jsonl has this step but no validation after it: the run stopped between the two."""
    try:
        records, _ = _records(run_dir)
        of_step = ["val_loss" in record for record in records if record["step"] == step]
    except (OSError, ValueError, TypeError, KeyError):  # no file, or a line that a power cut has corrupted
        return False
    return bool(of_step) and not of_step[-1]


class _Lines:
    """metrics.jsonl opened for appending; a partial last line of a killed writer is removed."""

    def __init__(self, path: Path):
        self.path, self.warned = path, False
        self.file = open(path, "a+b", buffering=0, opener=open_no_follow)  # noqa: SIM115  (closed by MetricsLog)
        self.file.seek(0)
        self.end = self.file.read().rfind(b"\n") + 1
        self.file.truncate(self.end)

    def add(self, text: str) -> None:
        """Append a line, whole or not at all."""
        data = text.encode() + b"\n"
        try:
            if self.file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.end += len(data)
        except OSError as error:
            with suppress(OSError):
                self.file.truncate(self.end)
            if not self.warned:
                self.warned = True
                warnings.warn(
                    f"{self.path} cannot be written ({error.strerror}); continuing, steps will be missing there",
                    stacklevel=2,
                )

    def close(self) -> None:
        with suppress(OSError):
            self.file.close()


def read_metrics(run_dir: Path) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, float]], bool]:
    """(training records by step, validation records by step, whether the last line is incomplete) of a run.

    The last line of a step counts, also if it records the step as skipped. An incomplete last line means that the run
    is writing it, or was killed while writing.
    """
    training: dict[int, dict[str, float]] = {}
    validation: dict[int, dict[str, float]] = {}
    records, torn = _records(run_dir)
    for record in records:
        step = int(record["step"])
        if "left_out" in record:
            training.pop(step, None)
        else:
            (training if "loss" in record else validation)[step] = record
    return training, validation, torn


def _records(run_dir: Path) -> tuple[list[dict[str, float]], bool]:
    """All complete lines of metrics.jsonl in order, and whether an incomplete one follows."""
    with open(run_dir / "metrics.jsonl", encoding="utf-8", errors="replace", opener=open_no_follow) as file:
        whole, _, rest = file.read().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()], bool(rest)
