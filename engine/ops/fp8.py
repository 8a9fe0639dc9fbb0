"""FP8 matmuls (Micikevicius et al. 2022) with current scaling.

Each operand is divided by a scale that maps its largest magnitude (amax) to the largest value of the format, then
rounded. The matmul accumulates in float32, and its result is multiplied by the scales. "Current scaling" means that
amax is computed from the tensor itself, not from a history of earlier steps.

* tensorwise: one scale per tensor. Weights and activations are e4m3 (3 mantissa bits, up to 448). Gradients are e5m2
  (2 mantissa bits, up to 57344), because they span more powers of two than e4m3 covers with a single scale.
* rowwise: one scale per row of the left and per column of the right operand. A single row spans less, so gradients are
  e4m3 too. The weight gradient, whose rows would span the whole batch, stays tensorwise.

The forward uses Hopper's fast accumulation, the gradients do not. The weight gradient is added to the float32 main
gradient. On a CPU the rounded operands are multiplied in float32, which is the reference of the tests.

Under tensor parallelism each rank scales its shard of a weight by the shard's amax. These scales are finer than one for
the whole weight, so results differ between layouts by FP8 rounding, not only in the last bits.
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
    """A scaled FP8 matrix that represents values * scale. values: fp8 [m, k]; scale: float32, [] or [m, 1]."""

    values: Tensor
    scale: Tensor

    def t(self) -> Scaled:
        """The transpose, as a view."""
        return Scaled(self.values.t(), self.scale.t() if self.scale.dim() else self.scale)


def _quantize(x: Tensor, dtype: torch.dtype, by_row: bool) -> tuple[Tensor, Tensor]:
    """x [m, k] -> (values in dtype [m, k], scale float32: [] or, by row, [m, 1])."""
    wide = x.float()
    amax = wide.abs().amax(dim=1, keepdim=True) if by_row else wide.abs().amax()
    top = torch.finfo(dtype).max
    scale = amax.clamp(min=1e-30) / top  # zeros stay zeros
    return (wide / scale).clamp(-top, top).to(dtype), scale


def _quantize_t(x: Tensor, dtype: torch.dtype, by_row: bool) -> tuple[Tensor, Tensor]:
    """`_quantize` of x^T, made contiguous: FP8 tensor cores need both operands contiguous along the reduced dim."""
    return _quantize(x.t().contiguous(), dtype, by_row)


def _multiply(a: Scaled, b: Scaled, out_dtype: torch.dtype, *, fast: bool) -> Tensor:
    """a [m, k] times b [k, n] -> [m, n]; b in column-major order."""
    if a.values.is_cuda:
        scales = a.scale.contiguous(), b.scale.contiguous()
        return torch._scaled_mm(a.values, b.values, *scales, out_dtype=out_dtype, use_fast_accum=fast)
    return (a.values.float() @ b.values.float()).mul_(a.scale).mul_(b.scale).to(out_dtype)


class Fp8:
    """FP8 `MatmulBackend`. compile: fuse amax and rounding with torch.compile."""

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


def check_device(requested: str, device: torch.device) -> None:
    """Raise ConfigError if train.fp8 is requested on a GPU without FP8."""
    if requested == "none" or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        problem = f"needs a GPU of compute capability 8.9 or higher (Ada, Hopper), not {capability[0]}.{capability[1]}"
        raise ConfigError([FieldError("ops.fp8-not-available", "train.fp8", requested, problem, "Use none.")])
