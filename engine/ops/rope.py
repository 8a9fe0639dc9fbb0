"""Rotary position embedding (Su et al. 2021), in the half-split convention of the Hugging Face Llama weights.

The rotation is orthogonal, so its backward is the rotation by the opposite angle and nothing but the table is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
