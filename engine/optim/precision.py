"""Which dtype is what: weights and activations, and the main gradients with the master weights; fp16's loss scale."""

from __future__ import annotations

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
    for the formats whose range is that of float32. All ranks see the same global norm, so they agree without a word.
    """

    value: float = 1.0
    window: int = 0
    good: int = 0

    def update(self, finite: bool) -> None:
        """Take note of one step's gradients."""
        if not self.window:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good == self.window:
            self.value, self.good = self.value * 2, 0
