"""Which dtype is what: weights and activations, and the main gradients with the master weights; fp16's loss scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """compute: parameters and activations. main: gradients, masters, moments."""

    compute: torch.dtype
    main: torch.dtype


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "bf16": Precision(torch.bfloat16, torch.float32),
    "fp16": Precision(torch.float16, torch.float32),
    "fp64": Precision(torch.float64, torch.float64),
}


@dataclass
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018): gradients of fp16 are computed times `value`, a power of two.

    Halved when a gradient overflows (that update is left out), doubled after `window` updates without. window 0: fixed,
    for the formats whose range is that of float32: these have no scale that a checkpoint could keep. All ranks see the
    same global norm, so they agree without a word.
    """

    value: float = 1.0
    window: int = 0
    good: int = 0

    def facts(self) -> dict[str, float]:
        """What a checkpoint keeps of it; nothing where it is fixed."""
        return {"loss_scale": self.value, "good_steps": self.good} if self.window else {}

    def take(self, facts: Mapping[str, float], precision: str) -> None:
        """Go on with the scale of a checkpoint of a run in this precision; only one of fp16 has any to take.

        Checkpoints of other precisions may hold the number 1 (engines up to 0.1 wrote it), which was never a scale.
        """
        if self.window and precision == "fp16" and "loss_scale" in facts:
            self.value, self.good = facts["loss_scale"], int(facts["good_steps"])

    def update(self, finite: bool) -> None:
        """Take note of one step's gradients."""
        if not self.window:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good >= self.window:  # more: a resume has made the window smaller
            self.value, self.good = self.value * 2, 0
