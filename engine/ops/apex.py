"""NVIDIA apex's fused norms, where it is installed with its CUDA extension: the second choice, after our own kernels.

PyPI has another package named apex; NVIDIA's is known by its submodules.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor


@functools.cache
def _load() -> tuple[Any, str]:
    """(apex.normalization.fused_layer_norm or None, why not)."""
    try:
        importlib.import_module("fused_layer_norm_cuda")
        return importlib.import_module("apex.normalization.fused_layer_norm"), ""
    except (ImportError, OSError) as error:
        return None, str(error).partition("\n")[0]


def fused_norms(x: Tensor) -> Any:
    """apex's module with fused_rms_norm_affine and fused_layer_norm_affine if they can run on x, else None."""
    return _load()[0] if x.is_cuda else None
