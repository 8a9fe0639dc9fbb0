"""RMSNorm (Zhang & Sennrich 2019): y = x / sqrt(mean(x^2) + eps) * w; LayerNorm (Ba et al. 2016). In float32 or wider.

RMSNorm saves the input and one number a row; autograd's own graph would keep four tensors of the input's size.
`add_rms_norm` and `add_layer_norm` take the residual sum before the norm along: that sum is read and written once, and
the backward adds the gradient of the residual path on its way.
`sharded_rms_norm` is the same over a dim that is cut over an axis: the sum of squares, and its mirror in the backward,
cross it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.distributed.collectives import all_reduce_
from engine.distributed.context import Axis
from engine.ops.apex import fused_norms
from engine.ops.native import kernels, references_only


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _RmsNorm(torch.autograd.Function):
    """The reference."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        wide = _wide(x)
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        # torch.compile of 2.11 gives no gradient to what was written to, or came out of a `to` that did nothing, and is
        # then returned (pytorch#180642)
        if offset:
            y = wide * scale * (_wide(weight) + offset)
            return y if y.dtype == x.dtype else y.to(x.dtype)
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        wide_grad, wide_weight = _wide(grad), _wide(weight)
        if ctx.offset:
            wide_weight = wide_weight + ctx.offset
        normed = _wide(x) * scale
        work = wide_grad * normed
        grad_w = work.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        along = work.mul_(wide_weight).mean(-1, keepdim=True)
        # copy_, not out=: torch.compile refuses that for the strided heads of a QK-norm
        grad_x = work.copy_(wide_grad).mul_(wide_weight).sub_(normed.mul_(along)).mul_(scale)
        return grad_x.to(x.dtype), grad_w, None, None


class _CustomNorm(torch.autograd.Function):
    """On our kernels: RMSNorm, or with a bias LayerNorm, of x -> y; with a residual, of their sum -> sum, y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, offset: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        ops, terms = torch.ops.trident, [t.contiguous() for t in (x, residual) if t is not None]
        if bias is None:
            op = ops.rms_norm if residual is None else ops.add_rms_norm
            *summed, y, kept = op(*terms, weight, eps, offset)
        else:
            op = ops.layer_norm if residual is None else ops.add_layer_norm
            *summed, y, kept = op(*terms, weight, bias, eps)
        normed = summed[0] if summed else terms[0]
        ctx.save_for_backward(normed, weight, kept)
        ctx.summed, ctx.centred, ctx.offset = residual is not None, bias is not None, offset
        ctx.set_materialize_grads(False)
        return (normed, y) if summed else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ops, (x, weight, kept) = torch.ops.trident, ctx.saved_tensors
        grad_sum, grad = grads if ctx.summed else (None, grads[0])
        if grad is None:
            return grad_sum, grad_sum, None, None, None, None
        grad, grad_sum = grad.contiguous(), None if grad_sum is None else grad_sum.contiguous()
        grad_b = None
        if ctx.centred:
            grad_x, grad_w, grad_b = ops.layer_norm_backward(grad, grad_sum, x, weight, kept)
        else:
            grad_x, grad_w = ops.rms_norm_backward(grad, grad_sum, x, weight, kept, ctx.offset)
        return grad_x, grad_x if ctx.summed else None, grad_w, grad_b, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Normalise the last dim of x [..., h] by its root mean square and scale by offset + weight [h].

    With an offset the product is rounded to x's dtype once, at the end, as Gemma does it; without one, x is rounded
    before it is scaled, as Llama does it.
    """
    if kernels(x, weight):
        return _CustomNorm.apply(x, None, weight, None, eps, offset)
    if not offset and not references_only() and (apex := fused_norms(x)):
        return apex.fused_rms_norm_affine(x, weight, weight.shape, eps)
    return _RmsNorm.apply(x, weight, eps, offset)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """x + residual, and `rms_norm` of it: to the bit what the two give in turn."""
    if kernels(x, residual, weight):
        return _CustomNorm.apply(x, residual, weight, None, eps, offset)
    total = x + residual
    return total, rms_norm(total, weight, eps, offset)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Subtract the mean of the last dim of x [..., h], divide by the deviation, times weight [h], plus bias [h]."""
    if kernels(x, weight, bias):
        return _CustomNorm.apply(x, None, weight, bias, eps, 0.0)
    if not references_only() and (apex := fused_norms(x)):
        return apex.fused_layer_norm_affine(x, weight, bias, weight.shape, eps)
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + residual, and `layer_norm` of it: to the bit what the two give in turn."""
    if kernels(x, residual, weight, bias):
        return _CustomNorm.apply(x, residual, weight, bias, eps, 0.0)
    total = x + residual
    return total, layer_norm(total, weight, bias, eps)


class _ShardedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, axis: Axis, replicas: int) -> Tensor:
        wide = _wide(x)
        ctx.axis, ctx.replicas, ctx.count = axis, replicas, x.shape[-1] * axis.size // replicas
        squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(replicas * ctx.count)
        scale = all_reduce_(squares, axis).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        wide_grad, wide_weight = _wide(grad), _wide(weight)
        normed = _wide(x) * scale
        work = wide_grad * normed
        grad_w = work.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        # each copy has a part of the gradient of the same values: the sum over all ranks is whole, and each copy
        # passes on its share of what follows from it
        along = all_reduce_(work.mul_(wide_weight).sum(-1, keepdim=True), ctx.axis).div_(ctx.count * ctx.replicas)
        grad_x = torch.mul(wide_grad, wide_weight, out=work).sub_(normed.mul_(along)).mul_(scale)
        return grad_x.to(x.dtype), grad_w, None, None, None


def sharded_rms_norm(x: Tensor, weight: Tensor, eps: float, axis: Axis, replicas: int) -> Tensor:
    """`rms_norm` over a dim that is cut over `axis`: x [..., h * copies / axis.size], weight alike, h in all.

    copies: how many ranks hold the same part, each with a part of its gradient, which add up to the whole (KV heads).
    """
    return _ShardedRmsNorm.apply(x, weight, eps, axis, replicas)
