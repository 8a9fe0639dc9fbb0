"""Causal attention over torch's scaled_dot_product_attention (flash kernels on CPU and GPU)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [b, n, s, d], k and v [b, n_kv, s, d] with n a multiple of n_kv -> [s, b, n * d]. Softmax scale 1/sqrt(d).

    Fastest where a head's rows lie one after another, so `rope` writes them so and v is copied: with q, k and v as
    views of [s, b, n, d] the CPU kernel takes a third longer, many times what the copy costs.
    """
    b, n, s, d = q.shape
    if n == k.shape[1]:
        v = v.contiguous()
    else:  # each KV head serves a run of query heads
        k, v = (x.repeat_interleave(n // x.shape[1], dim=1) for x in (k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.permute(2, 0, 1, 3).reshape(s, b, n * d)
