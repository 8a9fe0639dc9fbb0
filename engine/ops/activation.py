"""What an MLP does between its products: an activation, or a gate's activation times up (Shazeer 2020)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from engine.ops.native import kernels

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
}
KINDS = {name: kind for kind, name in enumerate(PLAIN)}  # as csrc/kernels/kernels.h numbers them


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Tensor, name: str) -> Tensor:
        ctx.name = name
        if own := kernels(fused):
            fused = fused.contiguous()
            ctx.save_for_backward(fused)
            return own.gated(fused, KINDS[name])
        ctx.save_for_backward(fused)
        gate, up = fused.chunk(2, dim=-1)
        return PLAIN[name](gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (fused,) = ctx.saved_tensors
        if own := kernels(grad, fused):
            return own.gated_backward(grad.contiguous(), fused.contiguous(), KINDS[ctx.name]), None
        gate, up = fused.chunk(2, dim=-1)
        out = torch.empty_like(fused)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(PLAIN[ctx.name](gate), grad, out=grad_up)
        torch.mul(grad, up, out=grad_gate)
        aten = torch.ops.aten
        if ctx.name == "silu":
            aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        else:
            approximate = "tanh" if ctx.name == "gelu_tanh" else "none"
            grad_gate.copy_(aten.gelu_backward(grad_gate, gate, approximate=approximate))
        return out, None


def gated(fused: Tensor, name: str) -> Tensor:
    """fused [..., 2f] = gate | up  ->  act(gate) * up [..., f]; name: "silu" (SwiGLU), "gelu" or "gelu_tanh"."""
    if torch.compiler.is_compiling():  # it makes one pass of the formula
        gate, up = fused.chunk(2, dim=-1)
        return PLAIN[name](gate) * up
    return _Gated.apply(fused, name)


def activation(name: str, of_gate: bool) -> Callable[[Tensor], Tensor]:
    """fused [..., 2f] = gate | up, or plain [..., f] -> [..., f]; name: of ModelConfig.activation."""
    return partial(gated, name=name) if of_gate else PLAIN[name]
