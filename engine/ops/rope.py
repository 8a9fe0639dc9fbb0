"""Rotary position embedding (Su et al. 2021), in the half-split convention of the Hugging Face Llama weights.

The rotation is orthogonal, so its backward is the rotation by the opposite angle and nothing but the table is saved.
A table narrower than the head rotates its first values only (GPT-NeoX); an empty one, none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.ops.native import kernels


@dataclass(frozen=True)
class RopeScaling:
    """How angles are stretched for contexts `factor` times as long as `original_seq_len`; kind "none": not at all.

    linear: all alike. llama3: the slow ones, with a smooth passage between low_freq and high_freq turns over the
    original context (Llama 3.1's reference code). yarn: the same between beta_slow and beta_fast turns, with a ramp
    over the dims, and the rotated values times attention_factor (Peng et al. 2023; 0: their 0.1 ln(factor) + 1).
    """

    kind: str = "none"
    factor: float = 1.0
    original_seq_len: int = 0
    low_freq: float = 1.0
    high_freq: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0

    def stretch(self, frequency: Tensor, theta: float) -> Tensor:
        """Radians a position [d/2] -> the same, stretched."""
        if self.kind == "linear":
            return frequency / self.factor
        if self.kind == "llama3":
            turns = frequency * self.original_seq_len / (2 * math.pi)
            keep = ((turns - self.low_freq) / (self.high_freq - self.low_freq)).clamp(0, 1)
            return frequency * keep + frequency / self.factor * (1 - keep)
        if self.kind == "yarn":
            width = 2 * len(frequency)
            low = max(math.floor(self._dim(self.beta_fast, theta, width)), 0)
            high = min(math.ceil(self._dim(self.beta_slow, theta, width)), width - 1)
            dims = torch.arange(len(frequency), device=frequency.device, dtype=frequency.dtype)
            keep = 1 - ((dims - low) / (high - low if high > low else 0.001)).clamp(0, 1)
            return frequency * keep + frequency / self.factor * (1 - keep)
        return frequency

    def _dim(self, turns: float, theta: float, width: int) -> float:
        """The dim whose angle turns so often over the original context."""
        return width * math.log(self.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        return self.attention_factor or (0.1 * math.log(self.factor) + 1.0)


NO_SCALING = RopeScaling()


def rope_table(
    seq_len: int,
    width: int,
    theta: float,
    device: torch.device,
    dtype: torch.dtype,
    scaling: RopeScaling = NO_SCALING,
) -> Tensor:
    """cos and sin of position * theta^(-2i/width), stretched by `scaling`: [2, seq_len, width/2].

    float32 whatever the model's dtype is, as the Hugging Face models compute it, but float64 for float64 models.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, width, 2, device=device, dtype=torch.int64).to(wide) / max(width, 1)
    position = torch.arange(seq_len, device=device, dtype=wide)[:, None]
    if scaling.kind == "none":
        angle = position / theta**exponent
    else:
        angle = position * scaling.stretch(1.0 / theta**exponent, theta)
    return torch.stack((angle.cos(), angle.sin())).mul_(scaling.magnitude).to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = 2 * cos.shape[-1]
    if torch.compiler.is_compiling():  # it makes one pass of the formula, and nothing of writing into views
        a, b = x[..., :width].chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., width:]), dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if width < x.shape[-1]:
        out[..., width:] = x[..., width:]
    a, b = x[..., :width].chunk(2, dim=-1)
    out_a, out_b = out[..., :width].chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.table = table
        return _rotate(x, table[0], table[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _rotate(grad, ctx.table[0], -ctx.table[1]), None


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x [b, heads, s, d] by its positions 0..s-1; table from `rope_table`, cut to [2, s, width/2], width <= d.

    The result is contiguous whatever the strides of x are: the pass that rotates also lays out for attention.
    """
    return _Rope.apply(x, table)


class _FusedRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Tensor, table: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.table = table
        return torch.ops.trident.rope(fused, table, n, m)

    @staticmethod
    def backward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None, None, None]:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        return torch.ops.trident.rope_backward(q, k, v, ctx.table), None, None, None


def split_and_rope(fused: Tensor, table: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """q|k|v [s, b, (n + 2 m) d] -> q [b, n, s, d] and k [b, m, s, d], both rotated, and v [b, m, s, d]."""
    if kernels(fused, table):
        return _FusedRope.apply(fused.contiguous(), table.contiguous(), n, m)
    s, b, _ = fused.shape
    heads = fused.view(s, b, n + 2 * m, -1).permute(1, 2, 0, 3)
    q_and_k, v = heads.split([n + m, m], dim=1)
    q, k = rope(q_and_k, table).split([n, m], dim=1)
    return q, k, v
