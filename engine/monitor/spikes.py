"""Detects spikes of loss and gradient norm, warns, and remembers a spike until the run has recovered.

A value is a spike if it exceeds the median of the last WINDOW normal values by more than 10 times their spread (1.4826
times the median absolute deviation) and by more than a tenth of the median (loss) or nine times the median (norm). With
fewer than FEW values, it must exceed the median by half of it plus 0.5 (norm: nine times it plus 10). Spikes are not
added to the normal values, so a loss that stays high stays a spike. Where a phase changes what the loss measures
(weights of a blend, sequence length or RoPE settings), the normal values start again.

A spike is over after CALM steps in a row without one. Until then RUN/spike.json records it, and `checkpoint.keep` does
not delete the last checkpoint before it, also over restarts. After a restart the normal values are read from
metrics.jsonl. Runs on one rank only.
"""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections import deque
from contextlib import suppress
from pathlib import Path

from engine.config.phases import CHANGES_LOSS, Phases
from engine.monitor.metrics import read_metrics
from engine.util.files import read_json, replace_synced

WINDOW, FEW, CALM = 64, 16, 16
SPIKE_FILE = "spike.json"


class SpikeWatch:
    """Spike detection for a run that continues after `step`. since: step of the current spike, 0 for none."""

    def __init__(self, run_dir: Path, step: int, phases: Phases):
        self._file, self._phases = run_dir / SPIKE_FILE, phases
        self.since, self._calm = 0, 0
        self._begin = self._comparable_from(step)  # first step of the normal values
        with suppress(OSError, ValueError, TypeError, KeyError):
            self.since = int(read_json(self._file)["step"])
        self._normal: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in ("loss", "grad_norm")}
        with suppress(OSError, ValueError, TypeError, KeyError):
            records, _, _ = read_metrics(run_dir)
            for at in sorted(records):
                if self._begin <= at <= step and (not self.since or at < self.since) and not records[at].get("spike"):
                    for name, values in self._normal.items():
                        if (value := records[at][name]) is not None:
                            values.append(value)

    def observe(self, step: int, loss: float, norm: float, samples: str) -> tuple[bool, str]:
        """(whether the step is a spike, message or ""). samples: of the step, as text."""
        if (begin := self._comparable_from(step)) != self._begin:  # its own first step may be skipped
            self._begin = begin
            for values in self._normal.values():
                values.clear()
        high = [
            f"{words} {value:.4g} where {self._median(name):.4g} is normal"
            for name, words, value in (("loss", "loss", loss), ("grad_norm", "gradient norm", norm))
            if math.isfinite(value) and value > self._limit(name)
        ]
        if high:
            self._calm = 0
            if self.since and step > self.since:
                return True, ""
            self.since = step
            self._keep({"step": step, "loss": loss, "grad_norm": norm})
            return True, (
                f"warning: step {step}: {' and '.join(high)}; its samples are {samples}. checkpoint.keep does not "
                "delete the last checkpoint before it until the spike is over"
            )
        for name, value in (("loss", loss), ("grad_norm", norm)):
            if math.isfinite(value):
                self._normal[name].append(value)
        self._calm += 1
        if self.since and self._calm >= CALM and step >= self.since + CALM:
            begun, self.since = self.since, 0
            with suppress(OSError):
                self._file.unlink(missing_ok=True)
            return False, f"step {step}: {CALM} steps without a spike: the spike of step {begun} is over"
        return False, ""

    def _comparable_from(self, step: int) -> int:
        """The first step whose losses are of the same data as those of `step`."""
        changed = [p.first_step for p in self._phases.until(max(1, step)) if p.given & CHANGES_LOSS]
        return changed[-1] if changed else 1

    def _median(self, name: str) -> float:
        return statistics.median(self._normal[name])

    def _limit(self, name: str) -> float:
        values = self._normal[name]
        if not values:
            return math.inf
        median = abs(self._median(name))
        if len(values) < FEW:
            return 1.5 * median + 0.5 if name == "loss" else 10 * median + 10
        spread = 1.4826 * statistics.median(abs(value - self._median(name)) for value in values)
        return self._median(name) + max(10 * spread, (0.1 if name == "loss" else 9.0) * median)

    def _keep(self, spike: dict[str, float]) -> None:
        try:
            replace_synced(self._file, json.dumps(spike).encode() + b"\n")
        except OSError as error:
            warnings.warn(
                f"{self._file} cannot be written ({error.strerror}): a restart forgets the spike", stacklevel=2
            )
