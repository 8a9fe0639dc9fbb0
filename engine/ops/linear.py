"""y = x W^T with the weight gradient added straight into the flat gradient bucket.

The usual autograd path makes a temporary of the weight's size for every microbatch and adds it afterwards; here the
GEMM itself accumulates (beta = 1). The input gradient's all-reduce over the tensor axis runs while the weight gradient
is computed, as in Megatron-LM's LinearWithGradAccumulationAndAsyncCommunication.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.comm import all_reduce_start
from engine.context import Axis
from engine.sharding import Parameter


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Parameter, reduce_input_grad: Axis) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.axis = weight, reduce_input_grad
        return torch.matmul(x, weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        weight: Parameter = ctx.weight
        grad_x = work = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.matmul(grad, weight)
            work = all_reduce_start(grad_x, ctx.axis)
        rows_grad, rows_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_w = accumulate(weight, rows_grad, rows_x) if ctx.needs_input_grad[1] else None
        if work is not None:
            work.wait()
        return grad_x, grad_w, None


def accumulate(weight: Parameter, rows_grad: Tensor, rows_x: Tensor) -> Tensor | None:
    """Add rows_grad^T rows_x to the weight's main gradient; without a bucket, return it for autograd instead."""
    main = weight.main_grad
    if main is None:
        return rows_grad.t() @ rows_x
    if main.dtype == rows_x.dtype:
        torch.addmm(main, rows_grad.t(), rows_x, out=main)
    else:
        main.add_(rows_grad.t() @ rows_x)
    if weight.on_grad is not None:
        weight.on_grad()
    return None


def linear(x: Tensor, weight: Parameter, reduce_input_grad: Axis) -> Tensor:
    """x [..., in] times weight [out, in] -> [..., out]; the gradient of x is summed over `reduce_input_grad`."""
    return _Linear.apply(x, weight, reduce_input_grad)
