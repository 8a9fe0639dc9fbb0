"""RMSNorm (Zhang & Sennrich 2019): y = x / sqrt(mean(x^2) + eps) * w, statistics in at least float32.

Saves the input and one number a row; autograd's own graph would keep four tensors of the input's size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.ops.native import kernels


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if own := kernels(x, weight):
            x = x.contiguous()
            y, scale = own.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, weight, scale)
            return y
        wide = _wide(x)
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        if scale.dim() == 1:
            return *torch.ops.trident.rms_norm_backward(grad.contiguous(), x, weight, scale), None
        wide_grad, wide_weight = _wide(grad), _wide(weight)
        normed = _wide(x) * scale
        work = wide_grad * normed
        grad_w = work.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        along = work.mul_(wide_weight).mean(-1, keepdim=True)
        grad_x = torch.mul(wide_grad, wide_weight, out=work).sub_(normed.mul_(along)).mul_(scale)
        return grad_x.to(x.dtype), grad_w, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dim of x [..., h] by its root mean square and scale by weight [h]."""
    return _RmsNorm.apply(x, weight, eps)
