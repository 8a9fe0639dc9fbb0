"""The three matmuls of a linear layer y = x W^T: forward, input gradient, weight gradient (FP8 versions in fp8.py)."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

from engine.ops.native import add_matmul_, matmul


class MatmulBackend(Protocol):
    """The three matmuls of a linear layer. Legend: t tokens, i input features, o output features; weight [o, i]."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., i] -> x W^T [..., o]."""

    def input_grad(self, grad: Tensor, weight: Tensor) -> Tensor:
        """grad [..., o] -> grad W [..., i]."""

    def weight_grad(self, grad: Tensor, x: Tensor, main: Tensor | None) -> Tensor | None:
        """grad [t, o], x [t, i]: add grad^T x to the main gradient [o, i] in place; if `main` is None, return it."""


class PlainMatmul:
    """`MatmulBackend` in the dtype of the tensors."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return matmul(x, weight.t())

    def input_grad(self, grad: Tensor, weight: Tensor) -> Tensor:
        return matmul(grad, weight)

    def weight_grad(self, grad: Tensor, x: Tensor, main: Tensor | None) -> Tensor | None:
        if main is None:
            return grad.t() @ x
        add_outer_(main, grad, x)
        return None


PLAIN_MATMUL = PlainMatmul()


def add_outer_(main: Tensor, grad: Tensor, x: Tensor) -> None:
    """main [o, i] += grad^T x, with grad [t, o] and x [t, i]; main may have a wider dtype."""
    if main.dtype == x.dtype:
        add_matmul_(main, grad.t(), x)
    elif main.is_cuda and main.dtype == torch.float32 and _accumulates_in_fp32(main.device, x.dtype):
        torch.ops.aten.addmm.dtype_out(main, grad.t(), x, torch.float32, out=main)
    else:
        main.add_(grad.t() @ x)


@functools.cache
def _accumulates_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch can add a half-precision matmul to a float32 matrix in place, as cuBLAS can.

    Otherwise the result is rounded to half precision first, and written and read once more: 12 bytes per weight and
    micro-batch instead of 8. Determined by a trial with numbers whose sum half precision cannot represent.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    main = torch.full((16, 16), 1.0, device=device)
    small = torch.full((16, 16), 2.0**-8, device=device, dtype=dtype)
    try:
        torch.ops.aten.addmm.dtype_out(main, small, small, torch.float32, out=main)
    except (RuntimeError, AttributeError, NotImplementedError):  # older versions need the sum in half precision too
        return False
    return bool((main == 1 + 2.0**-12).all())
