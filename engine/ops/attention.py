"""Causal attention with grouped queries and document masking, in several implementations.

Document masking (`Documents`) restricts attention to the tokens of the same document of a packed sequence. With RoPE,
positions need not restart in each document: scores depend only on the difference of two positions.

Which implementation runs is a pure function (`select_implementation`) of the device, the dtype, head_dim, document
masking, and the packages that can be imported: the same in every step, and after a restart on the same machine.

    own           the custom CPU kernel, csrc/kernels/cpu/attention_tiles.h; allocates nothing of size s x s
    cudnn         torch's SDPA with cuDNN's kernel, then flash: the fastest of torch's on Hopper
    flash         torch's SDPA with its flash kernel (FlashAttention 2)
    varlen        torch.nn.attention.varlen: flash kernel for packed sequences (cu_seqlens)
    flash-attn-3  the package flash_attn_interface (Hopper), with or without document masking
    flash-attn-2  the package flash_attn, with or without document masking
    sdpa          torch's SDPA with its default backend, and an explicit mask for document masking: the reference
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from engine.batch import Documents
from engine.errors import ConfigError, FieldError
from engine.ops.native import can_run_custom_attention

_PACKAGES = {
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-2": "flash_attn",
    "varlen": "torch.nn.attention.varlen",
}
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AttentionCase:
    """The inputs of the selection of an attention implementation.

    documents: with document masking. capability: compute capability of the CUDA device, such as (9, 0). custom: the
    custom kernel can run.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    documents: bool = False
    capability: tuple[int, int] = (0, 0)
    custom: bool = False


def attention_case(q: Tensor, *, documents: bool) -> AttentionCase:
    """The case of q (only its device, dtype and last dim, head_dim, are read)."""
    capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else (0, 0)
    custom = q.device.type == "cpu" and can_run_custom_attention(q)
    return AttentionCase(q.device.type, q.dtype, q.shape[-1], documents, capability, custom)


@functools.cache
def missing_packages() -> Mapping[str, str]:
    """Implementation -> why the package that it needs cannot be imported; empty if all can."""
    found = {}
    for name, module in _PACKAGES.items():
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:
            found[name] = f"{module} cannot be imported ({str(error).partition(chr(10))[0]})"
    return found


def why_unavailable(name: str, case: AttentionCase, missing: Mapping[str, str]) -> str:
    """Why the implementation `name` cannot run in a case; "" if it can. missing: from `missing_packages`."""
    if name == "sdpa":
        return ""
    if name == "own":
        return "" if case.custom else "needs fp32 on a CPU with AVX2, and engine._ops built"
    if case.device != "cuda" or case.capability < (8, 0):
        return f"needs a GPU of compute capability 8.0 or higher, this is {_describe_device(case)}"
    if case.dtype not in _HALF:
        return "needs train.precision bf16 or fp16"
    widest = 128 if name == "cudnn" else 256
    if case.head_dim > widest or case.head_dim % 8:
        return f"needs model.head_dim to be a multiple of 8 and at most {widest}, not {case.head_dim}"
    if name in ("cudnn", "flash") and case.documents:
        return "has no document masking (data.separate_documents)"
    if name == "varlen" and not case.documents:
        return "needs document masking (data.separate_documents)"
    if name == "flash-attn-3" and case.capability[0] != 9:
        return f"runs on Hopper only (compute capability 9.0), this is {_describe_device(case)}"
    return missing.get(name, "")


def _describe_device(case: AttentionCase) -> str:
    return f"{case.device} {case.capability[0]}.{case.capability[1]}" if case.device == "cuda" else case.device


def _preference(case: AttentionCase) -> tuple[str, ...]:
    if case.documents:
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


class _CustomAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, begin: Tensor | None) -> Tensor:
        out, lse = torch.ops.trident.attention(q, k, v, begin, q.shape[-1] ** -0.5)
        ctx.save_for_backward(q, k, v, out, lse, begin)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, *others = ctx.saved_tensors
        grads = torch.ops.trident.attention_backward(grad.contiguous(), q, *others, q.shape[-1] ** -0.5)
        return *grads, None


def _custom(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _CustomAttention.apply(q, k, v, None if documents is None else documents.starts)


def _merge_heads(out: Tensor) -> Tensor:
    """[b, n, s, d] -> [s, b, n d]."""
    b, n, s, d = out.shape
    return out.permute(2, 0, 1, 3).reshape(s, b, n * d)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """On a CPU, torch's kernel takes a third longer on views of [s, b, n, d] than on contiguous heads, many times the
    cost of a copy. So `rope` writes q and k contiguously, and v is copied here."""
    n, m = q.shape[1], k.shape[1]
    if n == m:
        v = v.contiguous()
    else:  # each KV head serves n / m consecutive query heads
        k, v = (x.repeat_interleave(n // m, dim=1) for x in (k, v))
    mask = None if documents is None else documents.mask
    return _merge_heads(scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None))


def _sdpa_backends(*backends: SDPBackend) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        with sdpa_kernel(list(backends), set_priority=True):
            grouped = q.shape[1] != k.shape[1]
            return _merge_heads(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped))

    return run


def _pack_rows(x: Tensor) -> Tensor:
    """[b, n, s, d] -> [b s, n, d]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _unpack_rows(rows: Tensor, q: Tensor) -> Tensor:
    """[b s, n, d] -> [s, b, n d] for queries [b, n, s, d]."""
    b, n, s, d = q.shape
    return rows.view(b, s, n * d).transpose(0, 1).contiguous()


def _varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    assert documents is not None
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    kwargs: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(function).parameters:
            kwargs["enable_gqa"] = True
        else:  # torch 2.11
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    cu_seqlens, longest = documents.cu_seqlens, q.shape[2]
    return _unpack_rows(function(*map(_pack_rows, (q, k, v)), cu_seqlens, cu_seqlens, longest, longest, **kwargs), q)


def _flash_attn_package(module: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        package = importlib.import_module(module)
        if documents is None:
            out = package.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
            out = out[0] if isinstance(out, tuple) else out  # some versions of 3 also return the log-sum-exp
            b, s, n, d = out.shape
            return out.transpose(0, 1).reshape(s, b, n * d)
        cu_seqlens, longest = documents.cu_seqlens, q.shape[2]
        kwargs = {
            "cu_seqlens_q": cu_seqlens,
            "cu_seqlens_k": cu_seqlens,
            "max_seqlen_q": longest,
            "max_seqlen_k": longest,
        }
        out = package.flash_attn_varlen_func(*map(_pack_rows, (q, k, v)), **kwargs, causal=True)
        return _unpack_rows(out[0] if isinstance(out, tuple) else out, q)

    return run


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Documents | None], Tensor]] = {
    "own": _custom,
    "cudnn": _sdpa_backends(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
    "flash": _sdpa_backends(SDPBackend.FLASH_ATTENTION),
    "varlen": _varlen,
    "flash-attn-3": _flash_attn_package(_PACKAGES["flash-attn-3"]),
    "flash-attn-2": _flash_attn_package(_PACKAGES["flash-attn-2"]),
    "sdpa": _sdpa,
}


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None, requested: str = "auto"
) -> Tensor:
    """Causal attention with grouped queries, softmax scale 1/sqrt(d).

    q [b, n, s, d], k and v [b, m, s, d] with n a multiple of m -> [s, b, n * d]. documents: boundaries for document
    masking; None: every token attends to all tokens up to itself. requested: implementation name, or "auto".
    """
    case = attention_case(q, documents=documents is not None)
    return IMPLEMENTATIONS[select_implementation(requested, case)](q, k, v, documents)


def attention_name(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, documents: bool, requested: str = "auto"
) -> str:
    """The name of the implementation for heads of this dtype and head_dim on a device.

    documents: with document masking. ConfigError if the requested one cannot run.
    """
    return select_implementation(
        requested, attention_case(torch.empty(1, 1, 1, head_dim, device=device, dtype=dtype), documents=documents)
    )
