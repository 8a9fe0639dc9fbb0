"""Fused norms of NVIDIA apex, if installed with its CUDA extension: the second choice, after the custom kernels.

The apex on PyPI is another package; NVIDIA's is recognised by its submodules.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor


@functools.cache
def _load() -> tuple[Any, str]:
    """(apex.normalization.fused_layer_norm or None, the import error)."""
    try:
        importlib.import_module("fused_layer_norm_cuda")
        return importlib.import_module("apex.normalization.fused_layer_norm"), ""
    except (ImportError, OSError) as error:
        return None, str(error).partition("\n")[0]


def fused_norms(x: Tensor) -> Any:
    """The apex module with fused_rms_norm_affine and fused_layer_norm_affine, or None if they cannot run on x."""
    return _load()[0] if x.is_cuda else None
