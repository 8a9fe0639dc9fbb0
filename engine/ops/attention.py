"""Attention with grouped queries, document masking and sliding windows: which implementation (core) a layer uses.

A core is chosen once, when a layer is built, by a pure function (`select_implementation`) of the device, the dtype,
head_dim, document masking, causality, the layer's window, dropout of attention weights, and the packages that can be
imported: the same in every step, and after a restart on the same machine. The cores are in ops.attention_cores, with
what each can do; a `Sequence` says what attends to what.

    own           the custom CPU kernel, csrc/kernels/cpu/attention_tiles.h; allocates nothing of size s x s
    cudnn         torch's SDPA with cuDNN's kernel, then flash: the fastest of torch's on Hopper
    flash         torch's SDPA with its flash kernel (FlashAttention 2)
    varlen        torch.nn.attention.varlen: flash kernel for packed sequences (cu_seqlens) and windows
    flash-attn-3  the package flash_attn_interface (Hopper)
    flash-attn-2  the package flash_attn
    sdpa          torch's SDPA with its default backend, and an explicit mask where it needs one: the reference
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.errors import ConfigError, FieldError
from engine.ops.attention_cores import CORES, PACKAGES, Core
from engine.ops.native import can_run_custom_attention

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AttentionCase:
    """The inputs of the selection of an attention implementation.

    documents: with document masking. causal: tokens attend to earlier tokens only. window: sliding window of the layer
    in tokens, 0: none. dropout: of attention weights. capability: compute capability of the CUDA device, such as
    (9, 0). custom: the custom kernel can run.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    documents: bool = False
    causal: bool = True
    window: int = 0
    dropout: bool = False
    capability: tuple[int, int] = (0, 0)
    custom: bool = False


def attention_case(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    documents: bool = False,
    causal: bool = True,
    window: int = 0,
    dropout: bool = False,
) -> AttentionCase:
    """The case of heads of this dtype and head_dim on a device; the other arguments: as in AttentionCase."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    custom = can_run_custom_attention(torch.empty(1, 1, 1, head_dim, device=device, dtype=dtype))
    return AttentionCase(device.type, dtype, head_dim, documents, causal, window, dropout, capability, custom)


@functools.cache
def missing_packages() -> Mapping[str, str]:
    """Implementation -> why the package that it needs cannot be imported; empty if all can."""
    found = {}
    for name, module in PACKAGES.items():
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:
            found[name] = f"{module} cannot be imported ({str(error).partition(chr(10))[0]})"
    return found


def why_unavailable(name: str, case: AttentionCase, missing: Mapping[str, str]) -> str:
    """Why the implementation `name` cannot run in a case; "" if it can. missing: from `missing_packages`."""
    if name == "own" and not case.custom:
        return "needs fp32 on a CPU with AVX2, and engine._ops built"
    what: dict[str, Any] = {
        "documents": case.documents,
        "causal": case.causal,
        "window": case.window,
        "dropout": case.dropout,
    }
    if why := CORES[name].lacks(**what):
        return why
    if name in ("own", "sdpa"):
        return ""
    if case.device != "cuda" or case.capability < (8, 0):
        return f"needs a GPU of compute capability 8.0 or higher, this is {_describe_device(case)}"
    if case.dtype not in _HALF:
        return "needs train.precision bf16 or fp16"
    widest = 128 if name == "cudnn" else 256
    if case.head_dim > widest or case.head_dim % 8:
        return f"needs model.head_dim to be a multiple of 8 and at most {widest}, not {case.head_dim}"
    if name == "flash-attn-3" and case.capability[0] != 9:
        return f"runs on Hopper only (compute capability 9.0), this is {_describe_device(case)}"
    return missing.get(name, "")


def _describe_device(case: AttentionCase) -> str:
    return f"{case.device} {case.capability[0]}.{case.capability[1]}" if case.device == "cuda" else case.device


def _preference(case: AttentionCase) -> tuple[str, ...]:
    if case.documents or case.window:
        return "own", "flash-attn-3", "flash-attn-2", "varlen", "sdpa"
    if case.capability >= (9, 0):  # FlashAttention 2 reaches half the speed of kernels written for Hopper
        return "own", "flash-attn-3", "cudnn", "flash", "sdpa"
    return "own", "flash", "sdpa"


@functools.lru_cache(maxsize=64)
def select_implementation(requested: str, case: AttentionCase) -> str:
    """The implementation that runs in a case: `requested`, or the fastest available one for "auto".

    ConfigError with the reason if the requested implementation cannot run.
    """
    missing = missing_packages() if case.device == "cuda" else {}
    best = next(name for name in _preference(case) if not why_unavailable(name, case, missing))
    if requested == "auto":
        return best
    if why := why_unavailable(requested, case, missing):
        raise ConfigError(
            [
                FieldError(
                    "ops.attention-not-available", "train.attention", requested, why, f"Use auto, which is {best} here."
                )
            ]
        )
    return requested


def select_core(requested: str, case: AttentionCase) -> Core:
    """The core of a layer: `requested`, or the fastest available one for "auto". ConfigError if it cannot run.

    On the meta device, where nothing is computed, always the reference.
    """
    return CORES["sdpa" if case.device == "meta" else select_implementation(requested, case)]
