"""Which dtype is what: weights and activations, and the main gradients with the master weights."""

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
    "fp64": Precision(torch.float64, torch.float64),
}
