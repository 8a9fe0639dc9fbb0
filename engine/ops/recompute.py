"""Activation recomputation (Chen et al. 2016): save only a function's inputs, and run it again in the backward.

The same operations on the same values give the same bits, so only time and memory change. No RNG state is saved: random
numbers (dropout) are keyed draws (ops.draws), which are the same whenever they are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], num_inputs: int, *tensors: Tensor) -> Tensor:
        ctx.function, ctx.num_params = function, len(tensors) - num_inputs
        inputs = tensors[:num_inputs]
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        inputs = [x.detach().requires_grad_(wants) for x, wants in zip(ctx.saved_tensors, wanted)]
        with torch.enable_grad():
            out = ctx.function(*inputs)
        torch.autograd.backward(out, grad)
        return (None, None, *(x.grad for x in inputs), *(None,) * ctx.num_params)


def recompute(function: Callable[..., Tensor], *inputs: Tensor, params: Iterable[Tensor] = ()) -> Tensor:
    """function(*inputs), saving only the inputs for backward.

    Gradients flow to the inputs and to the parameters that the function uses. params: these parameters; autograd has to
    know them, because the inputs may need no gradient where everything before them is frozen.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    trainable = (p for p in params if p.requires_grad)
    return _Recompute.apply(function, len(inputs), *inputs, *trainable)
