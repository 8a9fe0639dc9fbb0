"""What an MLP does between its products: an activation, or a gate's activation times up. SwiGLU has its own file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from engine.ops.swiglu import swiglu


class _GatedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(fused)
        ctx.approximate = approximate
        gate, up = fused.chunk(2, dim=-1)
        return gelu(gate, approximate=approximate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (fused,) = ctx.saved_tensors
        gate, up = fused.chunk(2, dim=-1)
        out = torch.empty_like(fused)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(gelu(gate, approximate=ctx.approximate), grad, out=grad_up)
        grad_gate.copy_(torch.ops.aten.gelu_backward(grad * up, gate, approximate=ctx.approximate))
        return out, None


def gated_gelu(fused: Tensor, approximate: str) -> Tensor:
    """fused [..., 2f] = gate | up  ->  gelu(gate) * up [..., f] (Shazeer 2020). approximate: "none" or "tanh"."""
    if torch.compiler.is_compiling():  # it makes one pass of the formula
        gate, up = fused.chunk(2, dim=-1)
        return gelu(gate, approximate=approximate) * up
    return _GatedGelu.apply(fused, approximate)


ACTIVATIONS: dict[tuple[str, bool], Callable[[Tensor], Tensor]] = {
    ("silu", True): swiglu,
    ("gelu", True): partial(gated_gelu, approximate="none"),
    ("gelu_tanh", True): partial(gated_gelu, approximate="tanh"),
    ("silu", False): silu,
    ("gelu", False): gelu,
    ("gelu_tanh", False): partial(gelu, approximate="tanh"),
}


def activation(name: str, gated: bool) -> Callable[[Tensor], Tensor]:
    """fused [..., 2f] or plain [..., f] -> [..., f]; name: of ModelConfig.activation."""
    return ACTIVATIONS[name, gated]
