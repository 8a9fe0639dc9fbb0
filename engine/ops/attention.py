"""Causal attention over torch's scaled_dot_product_attention (flash kernels on CPU and GPU)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [s, b, n, d], k and v [s, b, n_kv, d] with n a multiple of n_kv -> [s, b, n * d]. Softmax scale 1/sqrt(d)."""
    s, b, n, d = q.shape
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    if n != k.shape[1]:  # each KV head serves a run of query heads
        k, v = (x.repeat_interleave(n // x.shape[1], dim=1) for x in (k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.permute(2, 0, 1, 3).reshape(s, b, n * d)
