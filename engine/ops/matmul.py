"""The three products of y = x W^T: forward, gradient of x, gradient of W. Plain here; in 8-bit floats in ops/fp8.py."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

from engine.ops.native import add_matmul_, matmul


class MatmulBackend(Protocol):
    """How the matrix products of a linear layer are computed. Legend: t tokens, i inputs, o outputs; weight [o, i]."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., i] -> x W^T [..., o]."""

    def input_grad(self, grad: Tensor, weight: Tensor) -> Tensor:
        """grad [..., o] -> grad W [..., i]."""

    def weight_grad(self, grad: Tensor, x: Tensor, main: Tensor | None) -> Tensor | None:
        """grad [t, o], x [t, i]: add grad^T x to main [o, i]; without one, return it."""


class PlainMatmul:
    """In the tensors' own dtype."""

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
    """main [o, i] += grad^T x of grad [t, o], x [t, i]; main may be of a wider type."""
    if main.dtype == x.dtype:
        add_matmul_(main, grad.t(), x)
    elif main.is_cuda and main.dtype == torch.float32 and _adds_wider(main.device, x.dtype):
        torch.ops.aten.addmm.dtype_out(main, grad.t(), x, torch.float32, out=main)
    else:
        main.add_(grad.t() @ x)


@functools.cache
def _adds_wider(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of half-precision matrices to a float32 one in place, as cuBLAS can.

    Else the product is rounded to half precision first, and read and written once more: 12 bytes a weight and
    microbatch instead of 8. Asked by trying, on numbers that half precision cannot add.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    main = torch.full((16, 16), 1.0, device=device)
    small = torch.full((16, 16), 2.0**-8, device=device, dtype=dtype)
    try:
        torch.ops.aten.addmm.dtype_out(main, small, small, torch.float32, out=main)
    except (RuntimeError, AttributeError, NotImplementedError):  # older ones want the sum in half precision too
        return False
    return bool((main == 1 + 2.0**-12).all())
