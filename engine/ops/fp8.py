"""Matrix products in 8-bit floats (Micikevicius et al. 2022), with scales taken from the tensor at hand.

Each operand is divided by a scale, so that its largest value (amax) becomes the largest of the format, and rounded; the
product adds up in float32 and is multiplied by the scales. "Current scaling": amax is of this very tensor, no history.

* tensorwise: one scale a tensor. Weights and activations are e4m3 (3 bits of mantissa, up to 448), gradients e5m2 (2
  bits, up to 57344): they spread over more powers of two than one scale for all of them can cover in e4m3.
* rowwise: a scale for each row of the one and each column of the other operand; one row spreads less, so gradients are
  e4m3 too. The weight gradient, whose rows would be those of the whole batch, stays tensorwise.

The forward adds with Hopper's fast accumulation, the gradients without. The weight gradient is added to the float32
main gradient. On a CPU the rounded operands are multiplied in float32, which is what the tests compare with.

Under tensor parallelism every rank scales its own piece of a weight, by its own amax: a finer scale than one for the
whole, so another layout rounds differently, and runs agree as runs in fp8 do, not to the last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError, FieldError
from engine.ops.compile import compiled

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Scaled:
    """values * scale is what it stands for. values: fp8 [m, k]; scale float32: [] or [m, 1]."""

    values: Tensor
    scale: Tensor

    def t(self) -> Scaled:
        return Scaled(self.values.t(), self.scale.t() if self.scale.dim() else self.scale)


def _quantize(x: Tensor, dtype: torch.dtype, by_row: bool) -> tuple[Tensor, Tensor]:
    """x [m, k] -> values in dtype and their scale."""
    wide = x.float()
    amax = wide.abs().amax(dim=1, keepdim=True) if by_row else wide.abs().amax()
    top = torch.finfo(dtype).max
    scale = amax.clamp(min=1e-30) / top  # zeros stay zeros
    return (wide / scale).clamp(-top, top).to(dtype), scale


def _quantize_t(x: Tensor, dtype: torch.dtype, by_row: bool) -> tuple[Tensor, Tensor]:
    """`_quantize` of x^T, laid out row by row: tensor cores want both operands along the dim that is summed over."""
    return _quantize(x.t().contiguous(), dtype, by_row)


def _multiply(a: Scaled, b: Scaled, out_dtype: torch.dtype, *, fast: bool) -> Tensor:
    """a [m, k] times b [k, n], b column by column."""
    if a.values.is_cuda:
        scales = a.scale.contiguous(), b.scale.contiguous()
        return torch._scaled_mm(a.values, b.values, *scales, out_dtype=out_dtype, use_fast_accum=fast)
    return (a.values.float() @ b.values.float()).mul_(a.scale).mul_(b.scale).to(out_dtype)


class Fp8:
    """`MatmulBackend` in fp8. compile: amax and rounding as torch.compile fuses them."""

    def __init__(self, *, rowwise: bool, compile: bool):
        self.rowwise, self.gradients = rowwise, E4M3 if rowwise else E5M2
        wrap: Callable[[Any], Any] = (lambda f: compiled(f, dynamic=True)) if compile else (lambda f: f)
        self._quantize, self._quantize_t = wrap(_quantize), wrap(_quantize_t)

    def _rows(self, x: Tensor, dtype: torch.dtype = E4M3) -> Scaled:
        return Scaled(*self._quantize(x.reshape(-1, x.shape[-1]), dtype, self.rowwise))

    @torch.no_grad()
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        out = _multiply(self._rows(x), self._rows(weight).t(), x.dtype, fast=True)
        return out.view(*x.shape[:-1], len(weight))

    @torch.no_grad()
    def input_grad(self, grad: Tensor, weight: Tensor) -> Tensor:
        columns = Scaled(*self._quantize_t(weight, E4M3, self.rowwise)).t()
        out = _multiply(self._rows(grad, self.gradients), columns, grad.dtype, fast=False)
        return out.view(*grad.shape[:-1], weight.shape[1])

    @torch.no_grad()
    def weight_grad(self, grad: Tensor, x: Tensor, main: Tensor | None) -> Tensor | None:
        a = Scaled(*self._quantize_t(grad, E5M2, False))
        b = Scaled(*self._quantize_t(x, E4M3, False)).t()
        product = _multiply(a, b, x.dtype if main is None else torch.float32, fast=False)
        if main is None:
            return product
        main.add_(product)
        return None


def check_device(wanted: str, device: torch.device) -> None:
    """ConfigError where a GPU has no 8-bit floats; wanted: train.fp8."""
    if wanted == "none" or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        problem = f"needs a GPU of compute capability 8.9 (Ada, Hopper), this one has {capability[0]}.{capability[1]}"
        raise ConfigError([FieldError("ops.fp8-not-available", "train.fp8", wanted, problem, "Use none.")])
