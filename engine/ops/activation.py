"""Activation functions of the MLP: plain, or gated, act(gate) * up (GLU variants, Shazeer 2020)."""

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
KINDS = {name: kind for kind, name in enumerate(PLAIN)}  # the numbers in csrc/kernels/kernels.h


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Tensor, name: str) -> Tensor:
        ctx.name = name
        if custom := kernels(fused):
            fused = fused.contiguous()
            ctx.save_for_backward(fused)
            return custom.gated(fused, KINDS[name])
        ctx.save_for_backward(fused)
        gate, up = fused.chunk(2, dim=-1)
        return PLAIN[name](gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (fused,) = ctx.saved_tensors
        if custom := kernels(grad, fused):
            return custom.gated_backward(grad.contiguous(), fused.contiguous(), KINDS[ctx.name]), None
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
    """Gated activation: fused [..., 2f] = gate | up -> act(gate) * up [..., f].

    name: "silu" (SwiGLU), "gelu" or "gelu_tanh". Only the input is saved for backward.
    """
    if torch.compiler.is_compiling():  # it fuses the plain formula into one kernel
        gate, up = fused.chunk(2, dim=-1)
        return PLAIN[name](gate) * up
    return _Gated.apply(fused, name)


def activation(name: str, is_gated: bool) -> Callable[[Tensor], Tensor]:
    """The activation function of an MLP by its name in ModelConfig.activation.

    Gated, it maps fused [..., 2f] = gate | up to [..., f]; plain, [..., f] to [..., f].
    """
    return partial(gated, name=name) if is_gated else PLAIN[name]
