"""What a run leaves behind: config.toml, metrics.jsonl (one JSON object a line, full precision), TensorBoard events."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from engine.errors import EXIT_ERROR, EngineError
from engine.evaluate import Score
from engine.resolve import Resolved


class MetricsLog:
    """Writes on the one rank where `enabled`; elsewhere it only builds the records. A context manager.

    metrics.jsonl is appended to: after a resume a step may stand there twice, the later line is the one that counts.
    exit.json says how the run ended: as told by `exit`, or by the exception that ends the `with`; none while it runs.
    """

    def __init__(self, run_dir: Path, resolved: Resolved, first_step: int, *, enabled: bool):
        self.run_dir, self.resolved, self.enabled = run_dir, resolved, enabled
        self.last_step = first_step
        self.file: TextIO | None = None
        self.board: Any = None

    def __enter__(self) -> MetricsLog:
        if self.enabled:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            (self.run_dir / "exit.json").unlink(missing_ok=True)
            (self.run_dir / "config.toml").write_text(self.resolved.toml(), encoding="utf-8")
            self.file = _open_lines(self.run_dir / "metrics.jsonl")
            if self.resolved.config.monitor.tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

                self.board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self.last_step + 1)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if value is not None:
            code = value.exit_code if isinstance(value, EngineError) else EXIT_ERROR
            self.exit(code, (str(value).splitlines() or [type(value).__name__])[0])
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()

    def exit(self, code: int, reason: str) -> None:
        """Write exit.json."""
        if self.enabled:
            write_exit(self.run_dir, code, reason, self.last_step)

    def step(
        self, step: int, loss: float, grad_norm: float, lr: float, tokens: int, rates: dict[str, float]
    ) -> dict[str, float]:
        """Record one step; `tokens` are those consumed since the beginning of the run. Returns the record."""
        self.last_step = step
        record = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens": tokens, **rates}
        self._write(record, {f"train/{k}": v for k, v in record.items() if k != "step"})
        return record

    def validation(self, step: int, score: Score) -> None:
        """Record a validation in a line of its own: {"step", "val_loss", ...}."""
        record = {"step": step, **{f"val_{k}": v for k, v in score.as_dict().items()}}
        self._write(record, {f"val/{k}": v for k, v in score.as_dict().items()})

    def _write(self, record: dict[str, float], scalars: dict[str, float]) -> None:
        if self.file is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
            self.file.write(json.dumps(finite) + "\n")  # JSON knows no NaN: the norm of a skipped step is null
        if self.board is not None:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, int(record["step"]))


def write_exit(run_dir: Path, code: int, reason: str, step: int) -> None:
    """Write exit.json: how a run ended, and after which step."""
    (run_dir / "exit.json").write_text(
        json.dumps({"code": code, "reason": reason, "step": step}) + "\n", encoding="utf-8"
    )


def lacks_validation(run_dir: Path, step: int) -> bool:
    """Whether metrics.jsonl has this step but no validation after it: the run was stopped between the two."""
    if not (run_dir / "metrics.jsonl").exists():
        return False
    training, validation, _ = read_metrics(run_dir)
    return step in training and step not in validation


def _open_lines(path: Path) -> TextIO:
    """Open for appending, without the half line that a killed writer may have left."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    return path.open("a", buffering=1, encoding="utf-8")


def read_metrics(run_dir: Path) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, float]], bool]:
    """(training records, validation records) of a run by step; the later line of a step wins. Whether its last line is
    torn: a run that is writing it, or was killed while it did."""
    training: dict[int, dict[str, float]] = {}
    validation: dict[int, dict[str, float]] = {}
    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    whole, _, rest = text.rpartition("\n")
    for line in whole.splitlines():
        record = json.loads(line)
        (training if "loss" in record else validation)[record["step"]] = record
    return training, validation, bool(rest)
