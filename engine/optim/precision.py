"""The dtypes of mixed-precision training, and dynamic loss scaling for fp16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """The dtypes of train.precision. compute: parameters and activations. main: gradients, master weights, moments."""

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
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018): the loss is multiplied by `value`, a power of two.

    The scale is halved when a gradient overflows (that step is skipped) and doubled after `window` steps without
    overflow, counted in good_steps. window 0: fixed at 1, for formats with the range of float32; checkpoints then
    record no scale. All ranks see the same global norm, so they agree without communication.
    """

    value: float = 1.0
    window: int = 0
    good_steps: int = 0

    def state_dict(self) -> dict[str, float]:
        """The fields for a checkpoint; empty if the scale is fixed."""
        return {"loss_scale": self.value, "good_steps": self.good_steps} if self.window else {}

    def load_state_dict(self, state: Mapping[str, float], precision: str) -> None:
        """Continue with the scale of a checkpoint; precision: train.precision of the run that wrote it.

        Only the scale of an fp16 run is used. Checkpoints of other precisions may record a meaningless 1 (written by
        engines up to 0.1).
        """
        if self.window and precision == "fp16" and "loss_scale" in state:
            self.value, self.good_steps = state["loss_scale"], int(state["good_steps"])

    def update(self, finite: bool) -> None:
        """Adjust the scale after one step; finite: its gradients did not overflow."""
        if not self.window:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good_steps >= self.window:  # greater if a resumed run has a smaller window
            self.value, self.good_steps = self.value * 2, 0
