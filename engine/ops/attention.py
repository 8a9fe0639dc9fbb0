"""Causal attention over torch's scaled_dot_product_attention (flash kernels on CPU and GPU).

Documents that share a sequence can be kept apart by a mask. Positions need not start again with each of them: RoPE
turns q and k by their positions, and their product knows the difference of the two only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.ops.native import own_attention


def document_mask(documents: Tensor) -> Tensor:
    """documents int64 [b, s], the number of the document of each position -> bool [b, 1, s, s]: who sees whom."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril_()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = torch.ops.trident.attention(q, k, v, None, q.shape[-1] ** -0.5)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, *others = ctx.saved_tensors
        return torch.ops.trident.attention_backward(grad.contiguous(), q, *others, None, q.shape[-1] ** -0.5)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q [b, n, s, d], k and v [b, n_kv, s, d] with n a multiple of n_kv -> [s, b, n * d]. Softmax scale 1/sqrt(d).

    mask: bool [b, 1, s, s], True where a row sees a column; None: all columns up to its own.

    Fastest where a head's rows lie one after another, so `rope` writes them so and v is copied: with q, k and v as
    views of [s, b, n, d] the CPU kernel takes a third longer, many times what the copy costs.
    """
    if mask is None and own_attention(q, k, v):
        return _Attention.apply(*(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)))
    b, n, s, d = q.shape
    if n == k.shape[1]:
        v = v.contiguous()
    else:  # each KV head serves a run of query heads
        k, v = (x.repeat_interleave(n // x.shape[1], dim=1) for x in (k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return out.permute(2, 0, 1, 3).reshape(s, b, n * d)
