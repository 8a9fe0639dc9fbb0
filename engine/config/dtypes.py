"""Dtypes by the names of train.precision, without torch (engine.optim.precision has torch's)."""

from __future__ import annotations

SAFETENSORS_DTYPES = {"fp64": "F64", "fp32": "F32", "bf16": "BF16", "fp16": "F16"}
DTYPE_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
MAIN_DTYPE = {"fp64": "fp64", "fp32": "fp32", "bf16": "fp32", "fp16": "fp32"}  # of gradients, master weights, moments
