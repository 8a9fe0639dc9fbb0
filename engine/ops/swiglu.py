"""SwiGLU product (Shazeer 2020): silu(gate) * up, of a fused [.., gate | up] projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.ops.native import kernels


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Tensor) -> Tensor:
        if own := kernels(fused):
            fused = fused.contiguous()
            ctx.save_for_backward(fused)
            return own.swiglu(fused)
        ctx.save_for_backward(fused)
        gate, up = fused.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (fused,) = ctx.saved_tensors
        if own := kernels(grad, fused):
            return own.swiglu_backward(grad.contiguous(), fused.contiguous())
        gate, up = fused.chunk(2, dim=-1)
        out = torch.empty_like(fused)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        # every pass writes where the result belongs: no temporary, and half the passes of the formula by hand
        torch.ops.aten.silu.out(gate, out=grad_up).mul_(grad)
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return out


def swiglu(fused: Tensor) -> Tensor:
    """fused [..., 2f] = gate | up  ->  silu(gate) * up [..., f]."""
    if torch.compiler.is_compiling():  # it makes one pass of the formula
        gate, up = fused.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    return _SwiGlu.apply(fused)
