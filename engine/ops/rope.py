"""Rotary position embedding (Su et al. 2021), in the half-split convention of the Hugging Face Llama weights.

The rotation is orthogonal, so its backward is the rotation by the opposite angle and nothing but the table is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.ops.native import kernels


def rope_table(seq_len: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """cos and sin of position * theta^(-2i/d): [2, seq_len, head_dim/2].

    float32 whatever the model's dtype is, as the Hugging Face models compute it, but float64 for float64 models.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.int64).to(wide) / head_dim
    angle = torch.arange(seq_len, device=device, dtype=wide)[:, None] / theta**exponent
    return torch.stack((angle.cos(), angle.sin())).to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    a, b = x.chunk(2, dim=-1)
    out_a, out_b = out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.table = table
        return _rotate(x, table[0], table[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _rotate(grad, ctx.table[0], -ctx.table[1]), None


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x [b, heads, s, d] by its positions 0..s-1; table from `rope_table`, cut to [2, s, d/2].

    The result is contiguous whatever the strides of x are: the pass that rotates also lays out for attention.
    """
    return _Rope.apply(x, table)


class _FusedRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Tensor, table: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.table = table
        return torch.ops.trident.rope(fused, table, n, m)

    @staticmethod
    def backward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None, None, None]:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        return torch.ops.trident.rope_backward(q, k, v, ctx.table), None, None, None


def split_and_rope(fused: Tensor, table: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """q|k|v [s, b, (n + 2 m) d] -> q [b, n, s, d] and k [b, m, s, d], both rotated, and v [b, m, s, d]."""
    if kernels(fused, table):
        return _FusedRope.apply(fused.contiguous(), table.contiguous(), n, m)
    s, b, _ = fused.shape
    heads = fused.view(s, b, n + 2 * m, -1).permute(1, 2, 0, 3)
    q_and_k, v = heads.split([n + m, m], dim=1)
    q, k = rope(q_and_k, table).split([n, m], dim=1)
    return q, k, v
