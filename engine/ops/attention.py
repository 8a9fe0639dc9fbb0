"""Causal attention, and which of several implementations of it runs.

Documents that share a sequence can be kept apart (`Documents`). Positions need not start again with each of them: RoPE
turns q and k by their positions, and their product knows the difference of the two only.

Which implementation runs is a pure function of the device, the dtype, the width of a head, whether documents are kept
apart, and what can be imported (`choose`): the same in every step, and after a restart on the same machine.

    own           our kernel, csrc/kernels/cpu/attention_tiles.h; nothing is made of the size s x s
    cudnn         torch's SDPA, cuDNN's kernel before flash: the fastest of torch's on Hopper
    flash         torch's SDPA, its flash kernel (FlashAttention 2)
    varlen        torch.nn.attention.varlen: flash over documents of unequal lengths
    flash-attn-3  the package flash_attn_interface (Hopper), with or without documents
    flash-attn-2  the package flash_attn, with or without documents
    sdpa          torch's SDPA as it chooses, with a mask where documents are kept apart: the reference
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
from engine.ops.native import own_attention

_PACKAGES = {
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-2": "flash_attn",
    "varlen": "torch.nn.attention.varlen",
}
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """What the choice depends on. capability: of a CUDA device, such as (9, 0). own: our kernel could run."""

    device: str
    dtype: torch.dtype
    head_dim: int
    documents: bool = False
    capability: tuple[int, int] = (0, 0)
    own: bool = False


def case_of(q: Tensor, *, documents: bool) -> Case:
    """The case of queries (or anything of their device, dtype and last dim)."""
    capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else (0, 0)
    own = q.device.type == "cpu" and own_attention(q)
    return Case(q.device.type, q.dtype, q.shape[-1], documents, capability, own)


@functools.cache
def missing() -> Mapping[str, str]:
    """Implementation -> why its package cannot be imported, of those that need one and do not have it."""
    found = {}
    for name, module in _PACKAGES.items():
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:
            found[name] = f"{module} cannot be imported ({str(error).partition(chr(10))[0]})"
    return found


def refusal(name: str, case: Case, absent: Mapping[str, str]) -> str:
    """Why an implementation cannot run in a case; empty if it can."""
    if name == "sdpa":
        return ""
    if name == "own":
        return "" if case.own else "needs fp32 on a CPU with AVX2, and engine._ops built"
    if case.device != "cuda" or case.capability < (8, 0):
        return f"needs a GPU of compute capability 8.0, this is {_device_in_words(case)}"
    if case.dtype not in _HALF:
        return "needs train.precision bf16 or fp16"
    widest = 128 if name == "cudnn" else 256
    if case.head_dim > widest or case.head_dim % 8:
        return f"needs model.head_dim a multiple of 8 up to {widest}, not {case.head_dim}"
    if name in ("cudnn", "flash") and case.documents:
        return "cannot keep documents apart (data.separate_documents)"
    if name == "varlen" and not case.documents:
        return "is for documents that are kept apart (data.separate_documents)"
    if name == "flash-attn-3" and case.capability[0] != 9:
        return f"is written for Hopper, this is {_device_in_words(case)}"
    return absent.get(name, "")


def _device_in_words(case: Case) -> str:
    return f"{case.device} {case.capability[0]}.{case.capability[1]}" if case.device == "cuda" else case.device


def _preferred(case: Case) -> tuple[str, ...]:
    if case.documents:
        return "own", "flash-attn-3", "flash-attn-2", "varlen", "sdpa"
    if case.capability >= (9, 0):  # flash 2 reaches half of what Hopper's own kernels do
        return "own", "flash-attn-3", "cudnn", "flash", "sdpa"
    return "own", "flash", "sdpa"


@functools.lru_cache(maxsize=64)
def choose(wanted: str, case: Case) -> str:
    """The implementation that runs in a case. ConfigError, with the reason, where a wanted one cannot."""
    absent = missing() if case.device == "cuda" else {}
    best = next(name for name in _preferred(case) if not refusal(name, case, absent))
    if wanted == "auto":
        return best
    if why := refusal(wanted, case, absent):
        raise ConfigError(
            [
                FieldError(
                    "ops.attention-not-available", "train.attention", wanted, why, f"Use auto, which is {best} here."
                )
            ]
        )
    return wanted


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


def _own(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _CustomAttention.apply(q, k, v, None if documents is None else documents.begin)


def _joined(out: Tensor) -> Tensor:
    """[b, n, s, d] -> [s, b, n d]."""
    b, n, s, d = out.shape
    return out.permute(2, 0, 1, 3).reshape(s, b, n * d)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """Fastest on a CPU where a head's rows lie one after another, so `rope` writes them so and v is copied: with views
    of [s, b, n, d] torch's kernel takes a third longer, many times what the copy costs."""
    n, m = q.shape[1], k.shape[1]
    if n == m:
        v = v.contiguous()
    else:  # each KV head serves a run of query heads
        k, v = (x.repeat_interleave(n // m, dim=1) for x in (k, v))
    mask = None if documents is None else documents.mask
    return _joined(scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None))


def _restricted(*backends: SDPBackend) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        with sdpa_kernel(list(backends), set_priority=True):
            grouped = q.shape[1] != k.shape[1]
            return _joined(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped))

    return run


def _rows(x: Tensor) -> Tensor:
    """[b, n, s, d] -> [b s, n, d]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _unrowed(rows: Tensor, q: Tensor) -> Tensor:
    """[b s, n, d] -> [s, b, n d] for queries [b, n, s, d]."""
    b, n, s, d = q.shape
    return rows.view(b, s, n * d).transpose(0, 1).contiguous()


def _varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    assert documents is not None
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    words: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(function).parameters:
            words["enable_gqa"] = True
        else:  # torch 2.11
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    cu_seqlens, longest = documents.cu_seqlens, q.shape[2]
    return _unrowed(function(*map(_rows, (q, k, v)), cu_seqlens, cu_seqlens, longest, longest, **words), q)


def _package(module: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        package = importlib.import_module(module)
        if documents is None:
            out = package.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
            out = out[0] if isinstance(out, tuple) else out  # some versions of 3 give the log-sum-exp too
            b, s, n, d = out.shape
            return out.transpose(0, 1).reshape(s, b, n * d)
        cu_seqlens, longest = documents.cu_seqlens, q.shape[2]
        words = {
            "cu_seqlens_q": cu_seqlens,
            "cu_seqlens_k": cu_seqlens,
            "max_seqlen_q": longest,
            "max_seqlen_k": longest,
        }
        out = package.flash_attn_varlen_func(*map(_rows, (q, k, v)), **words, causal=True)
        return _unrowed(out[0] if isinstance(out, tuple) else out, q)

    return run


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Documents | None], Tensor]] = {
    "own": _own,
    "cudnn": _restricted(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
    "flash": _restricted(SDPBackend.FLASH_ATTENTION),
    "varlen": _varlen,
    "flash-attn-3": _package(_PACKAGES["flash-attn-3"]),
    "flash-attn-2": _package(_PACKAGES["flash-attn-2"]),
    "sdpa": _sdpa,
}


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None, wanted: str = "auto"
) -> Tensor:
    """q [b, n, s, d], k and v [b, n_kv, s, d] with n a multiple of n_kv -> [s, b, n * d]. Softmax scale 1/sqrt(d).

    documents: no row sees a column of another document than its own; None: all columns up to its own.
    wanted: an implementation by name, or auto.
    """
    case = case_of(q, documents=documents is not None)
    return IMPLEMENTATIONS[choose(wanted, case)](q, k, v, documents)


def attention_name(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, documents: bool, wanted: str = "auto"
) -> str:
    """The implementation that runs on such heads. ConfigError where the wanted one cannot."""
    return choose(wanted, case_of(torch.empty(1, 1, 1, head_dim, device=device, dtype=dtype), documents=documents))
