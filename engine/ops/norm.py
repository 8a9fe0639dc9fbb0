"""RMSNorm (Zhang & Sennrich 2019), y = x / sqrt(mean(x^2) + eps) * w, and LayerNorm (Ba et al. 2016).

Computed in float32, or float64 for float64 inputs. RMSNorm saves the input and one number per row; plain autograd would
save four tensors of the input's size. `add_rms_norm` and `add_layer_norm` fuse the residual addition before the norm:
the sum is read and written once, and the backward adds the gradient of the residual path in the same pass.
`sharded_rms_norm` normalises a dim that is sharded across an axis: the sum of squares, and its counterpart in the
backward, are all-reduced over the axis.
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
    """RMSNorm in torch: the reference of the custom kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        wide = _wide(x)
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        # Return a new tensor: torch.compile of 2.11 loses the gradient of a returned tensor that was written to in
        # place, or that is the result of a `to` without effect (pytorch#180642).
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
        # copy_, not out=: torch.compile rejects out= for the strided heads of a QK-norm
        grad_x = work.copy_(wide_grad).mul_(wide_weight).sub_(normed.mul_(along)).mul_(scale)
        return grad_x.to(x.dtype), grad_w, None, None


class _CustomNorm(torch.autograd.Function):
    """RMSNorm, or LayerNorm if there is a bias, by the custom kernels: x -> y, or (x, residual) -> (sum, y)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, offset: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        ops, terms = torch.ops.trident, [t.contiguous() for t in (x, residual) if t is not None]
        if bias is None:
            op = ops.rms_norm if residual is None else ops.add_rms_norm
            *summed, y, stats = op(*terms, weight, eps, offset)
        else:
            op = ops.layer_norm if residual is None else ops.add_layer_norm
            *summed, y, stats = op(*terms, weight, bias, eps)
        normed = summed[0] if summed else terms[0]
        ctx.save_for_backward(normed, weight, stats)
        ctx.summed, ctx.is_layer_norm, ctx.offset = residual is not None, bias is not None, offset
        ctx.set_materialize_grads(False)
        return (normed, y) if summed else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ops, (x, weight, stats) = torch.ops.trident, ctx.saved_tensors
        grad_sum, grad = grads if ctx.summed else (None, grads[0])
        if grad is None:
            return grad_sum, grad_sum, None, None, None, None
        grad, grad_sum = grad.contiguous(), None if grad_sum is None else grad_sum.contiguous()
        grad_b = None
        if ctx.is_layer_norm:
            grad_x, grad_w, grad_b = ops.layer_norm_backward(grad, grad_sum, x, weight, stats)
        else:
            grad_x, grad_w = ops.rms_norm_backward(grad, grad_sum, x, weight, stats, ctx.offset)
        return grad_x, grad_x if ctx.summed else None, grad_w, grad_b, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """RMSNorm: divide x [..., h] by the root mean square of its last dim, times offset + weight [h].

    Rounding to x's dtype: with an offset once, at the end, as in Gemma; without one before the multiplication by the
    weight, as in Llama.
    """
    if kernels(x, weight):
        return _CustomNorm.apply(x, None, weight, None, eps, offset)
    if not offset and not references_only() and (apex := fused_norms(x)):
        return apex.fused_rms_norm_affine(x, weight, weight.shape, eps)
    return _RmsNorm.apply(x, weight, eps, offset)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """The residual sum x + residual and its `rms_norm`, fused: bit-exactly equal to the two in sequence."""
    if kernels(x, residual, weight):
        return _CustomNorm.apply(x, residual, weight, None, eps, offset)
    total = x + residual
    return total, rms_norm(total, weight, eps, offset)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dim of x [..., h]: (x - mean) / sqrt(variance + eps) * weight [h] + bias [h]."""
    if kernels(x, weight, bias):
        return _CustomNorm.apply(x, None, weight, bias, eps, 0.0)
    if not references_only() and (apex := fused_norms(x)):
        return apex.fused_layer_norm_affine(x, weight, bias, weight.shape, eps)
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual sum x + residual and its `layer_norm`, fused: bit-exactly equal to the two in sequence."""
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
        # Each replica holds a part of the gradient of the same values. The sum over all ranks is complete, so each
        # replica applies 1 / replicas of the correction: their input gradients then add up to the whole.
        along = all_reduce_(work.mul_(wide_weight).sum(-1, keepdim=True), ctx.axis).div_(ctx.count * ctx.replicas)
        grad_x = torch.mul(wide_grad, wide_weight, out=work).sub_(normed.mul_(along)).mul_(scale)
        return grad_x.to(x.dtype), grad_w, None, None, None


def sharded_rms_norm(x: Tensor, weight: Tensor, eps: float, axis: Axis, replicas: int) -> Tensor:
    """`rms_norm` over a dim of global size h that is sharded across `axis`.

    x [..., h * replicas / axis.size], weight [h * replicas / axis.size]. replicas: number of ranks that hold the same
    shard, each with a partial gradient; the partial gradients add up to the whole (KV heads shared by ranks).
    """
    return _ShardedRmsNorm.apply(x, weight, eps, axis, replicas)
