"""The attention cores: each calls one implementation, in the form that it needs (names in ops.attention).

Every core takes q [b, n, s, d], k and v [b, m, keys, d] with n a multiple of m, and a `Sequence`; it returns
[s, b, n * d]. Softmax scale 1/sqrt(d). With s < keys the queries are the last s positions. A core that cannot do what a
sequence asks for refuses it by name and never computes something else.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from engine.batch import Sequence
from engine.errors import ConfigError, FieldError
from engine.ops.draws import dropout, dropout_arguments

PACKAGES = {
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-2": "flash_attn",
    "varlen": "torch.nn.attention.varlen",
}


@dataclass(frozen=True)
class Core:
    """One attention implementation. documents, bidirectional, windows, fewer_queries, dropout: what it can do."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor, Sequence], Tensor]
    documents: bool = True
    bidirectional: bool = True
    windows: bool = True
    fewer_queries: bool = True
    dropout: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor:
        """q [b, n, s, d], k and v [b, m, keys, d] -> [s, b, n * d]. ConfigError if it cannot do this sequence."""
        masked, fewer = sequence.documents is not None, q.shape[2] != k.shape[2]
        what: dict[str, Any] = {"documents": masked, "window": sequence.window, "dropout": sequence.dropout is not None}
        if why := self.lacks(causal=sequence.causal, fewer_queries=fewer, **what):
            fix = "Use auto, or sdpa, which can."
            raise ConfigError([FieldError("ops.attention-cannot", "train.attention", self.name, why, fix)])
        return self.run(q, k, v, sequence)

    def lacks(
        self, *, documents: bool, causal: bool, window: int, fewer_queries: bool = False, dropout: bool = False
    ) -> str:
        """Why it cannot compute such attention; "" if it can."""
        if documents and not self.documents:
            return "has no document masking (data.separate_documents)"
        if window and not self.windows:
            return "has no sliding window (model.window)"
        if not causal and not self.bidirectional:
            return "is causal only"
        if fewer_queries and not self.fewer_queries:
            return "needs as many queries as keys"
        if dropout and not self.dropout:
            return "has no dropout of attention weights by place (train.attention_dropout)"
        return ""


class _CustomAttention(torch.autograd.Function):
    """The backward draws the mask of the forward again: only the places of its rows are saved."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, begin: Tensor | None, places: Tensor | None, draw: tuple[Any, ...]
    ) -> Tensor:
        out, lse = torch.ops.trident.attention(q, k, v, begin, q.shape[-1] ** -0.5, places, *draw)
        ctx.save_for_backward(q, k, v, out, lse, begin, places)
        ctx.draw = draw
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        *saved, places = ctx.saved_tensors
        scale = saved[0].shape[-1] ** -0.5
        grads = torch.ops.trident.attention_backward(grad.contiguous(), *saved, scale, places, *ctx.draw)
        return *grads, None, None, None


def _custom(q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor:
    (b, n, s), keys = q.shape[:3], k.shape[2]
    begin = sequence.first_keys(b, s, keys)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if sequence.dropout is None:
        return _CustomAttention.apply(q, k, v, begin, None, ())
    places = sequence.attention_places(n, s, keys).starts.view(b, n, s)
    return _CustomAttention.apply(q, k, v, begin, places, dropout_arguments(*sequence.attention_draw()))


def _merge_heads(out: Tensor) -> Tensor:
    """[b, n, s, d] -> [s, b, n d]."""
    b, n, s, d = out.shape
    return out.permute(2, 0, 1, 3).reshape(s, b, n * d)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor:
    """On a CPU, torch's kernel takes a third longer on views of [s, b, n, d] than on contiguous heads, many times the
    cost of a copy. So `rope` writes q and k contiguously, and v is copied here."""
    (n, s), (m, keys) = q.shape[1:3], k.shape[1:3]
    if n == m:
        v = v.contiguous()
    else:  # each KV head serves n / m consecutive query heads
        k, v = (x.repeat_interleave(n // m, dim=1) for x in (k, v))
    if sequence.dropout is not None:
        return _merge_heads(_with_dropout(q, k, v, sequence))
    whole = sequence.documents is None and not sequence.window
    if whole and (s == keys or not sequence.causal):  # torch's own causal mask aligns the first query with key 0
        return _merge_heads(scaled_dot_product_attention(q, k, v, is_causal=sequence.causal))
    return _merge_heads(scaled_dot_product_attention(q, k, v, attn_mask=sequence.mask(s, keys)))


def _with_dropout(q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor:
    """Attention whose weights, after the softmax, are dropped by a keyed mask: torch's SDPA draws its own.

    Scores are float32 or wider, because the softmax multiplies their error by their size.
    """
    (n, s, d), keys = q.shape[1:], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(2, 3) * d**-0.5
    weights = torch.softmax(scores.masked_fill(~sequence.mask(s, keys), -torch.inf), -1).to(q.dtype)
    key, p = sequence.attention_draw()
    return dropout(weights, key, sequence.attention_places(n, s, keys), p) @ v


def _sdpa_backends(backends: list[SDPBackend], q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor:
    with sdpa_kernel(backends, set_priority=True):
        grouped = q.shape[1] != k.shape[1]
        return _merge_heads(scaled_dot_product_attention(q, k, v, is_causal=sequence.causal, enable_gqa=grouped))


def _pack_rows(x: Tensor) -> Tensor:
    """[b, n, s, d] -> [b s, n, d]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _unpack_rows(rows: Tensor, q: Tensor) -> Tensor:
    """[b s, n, d] -> [s, b, n d] for queries [b, n, s, d]."""
    b, n, s, d = q.shape
    return rows.view(b, s, n * d).transpose(0, 1).contiguous()


def _window_size(sequence: Sequence) -> tuple[int, int]:
    """The window as FlashAttention takes it: keys before the query's position and after it, -1 for all."""
    before = sequence.window - 1 if sequence.window else -1
    return before, 0 if sequence.causal else before


def _varlen(q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor:
    function = importlib.import_module(PACKAGES["varlen"]).varlen_attn
    kwargs: dict[str, Any] = {"window_size": _window_size(sequence)}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(function).parameters:
            kwargs["enable_gqa"] = True
        else:  # torch 2.11
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    longest = q.shape[2]
    cu_seqlens = sequence.cu_seqlens(q.shape[0], longest)
    return _unpack_rows(function(*map(_pack_rows, (q, k, v)), cu_seqlens, cu_seqlens, longest, longest, **kwargs), q)


def _flash_attn_package(module: str, q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor:
    package = importlib.import_module(module)
    kwargs: dict[str, Any] = {"causal": sequence.causal}
    if sequence.window:
        kwargs["window_size"] = _window_size(sequence)
    if sequence.documents is None:
        out = package.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **kwargs)
        out = out[0] if isinstance(out, tuple) else out  # some versions of 3 also return the log-sum-exp
        b, s, n, d = out.shape
        return out.transpose(0, 1).reshape(s, b, n * d)
    cu_seqlens, longest = sequence.documents.cu_seqlens, q.shape[2]
    kwargs |= {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }
    out = package.flash_attn_varlen_func(*map(_pack_rows, (q, k, v)), **kwargs)
    return _unpack_rows(out[0] if isinstance(out, tuple) else out, q)


_CUDNN, _FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
_TORCH = {"documents": False, "windows": False, "fewer_queries": False}

CORES: dict[str, Core] = {
    core.name: core
    for core in (
        Core("own", _custom, bidirectional=False, dropout=True),
        Core("cudnn", partial(_sdpa_backends, [_CUDNN, _FLASH]), **_TORCH),
        Core("flash", partial(_sdpa_backends, [_FLASH]), **_TORCH),
        Core("varlen", _varlen, fewer_queries=False),
        Core("flash-attn-3", partial(_flash_attn_package, PACKAGES["flash-attn-3"]), fewer_queries=False),
        Core("flash-attn-2", partial(_flash_attn_package, PACKAGES["flash-attn-2"]), fewer_queries=False),
        Core("sdpa", _sdpa, dropout=True),
    )
}
