"""Rotary position embedding (RoPE, Su et al. 2021), in the half-split convention of the Hugging Face Llama weights.

The rotation is orthogonal, so the backward rotates by the opposite angle and only the table is saved. A table narrower
than head_dim rotates the first dims of a head only (partial rotary, GPT-NeoX); an empty table rotates none.
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
    """RoPE scaling for contexts `factor` times as long as `original_seq_len`.

    kind: "none"; "linear": divide all frequencies by `factor`; "llama3": divide the low frequencies, with a smooth
    transition between low_freq and high_freq rotations over the original context (reference code of Llama 3.1); "yarn"
    (Peng et al. 2023): the transition is a linear ramp over the dims between beta_slow and beta_fast rotations, and
    rotated values are multiplied by attention_factor (0: 0.1 ln(factor) + 1, as in the paper).
    """

    kind: str = "none"
    factor: float = 1.0
    original_seq_len: int = 0
    low_freq: float = 1.0
    high_freq: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0

    def scale_frequencies(self, frequency: Tensor, theta: float) -> Tensor:
        """Scale the rotary frequencies [d/2], in radians per position; theta: the RoPE base."""
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
        """The (fractional) dim whose angle makes `turns` rotations over the original context."""
        return width * math.log(self.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    @property
    def magnitude(self) -> float:
        """The factor of cos and sin: YaRN's attention factor, 1 for other kinds."""
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
    """The RoPE table, cos and sin of position * theta^(-2i/width) with `scaling`: [2, seq_len, width/2] in `dtype`.

    width: number of rotated dims. Computed in float32 as in the Hugging Face models, in float64 for float64 models.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, width, 2, device=device, dtype=torch.int64).to(wide) / max(width, 1)
    position = torch.arange(seq_len, device=device, dtype=wide)[:, None]
    if scaling.kind == "none":
        angle = position / theta**exponent
    else:
        angle = position * scaling.scale_frequencies(1.0 / theta**exponent, theta)
    return torch.stack((angle.cos(), angle.sin())).mul_(scaling.magnitude).to(dtype)


def rope_at(table: Tensor, positions: Tensor) -> Tensor:
    """The rows of a RoPE table [2, seq_len, width/2] at positions, int64 [1 or b, s].

    [2, s, width/2] for one row of positions, which all samples share; else [2, b, 1, s, width/2]. IndexError if a
    position is outside the table.
    """
    rows = table[:, positions]
    return rows[:, 0] if len(positions) == 1 else rows[:, :, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = 2 * cos.shape[-1]
    if torch.compiler.is_compiling():  # it fuses the plain formula, but not writes into views
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
    """Apply RoPE to x [b, heads, s, d]; table: cos and sin at its positions, from `rope_at`, width <= d.

    The result is contiguous for any strides of x, as attention needs it.
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
    """Split fused q|k|v and apply RoPE to q and k: [s, b, (n + 2 m) d] -> q [b, n, s, d], k and v [b, m, s, d].

    table: as for `rope`. The custom kernel runs if all samples share their positions.
    """
    if table.dim() == 3 and kernels(fused, table):
        return _FusedRope.apply(fused.contiguous(), table.contiguous(), n, m)
    s, b, _ = fused.shape
    heads = fused.view(s, b, n + 2 * m, -1).permute(1, 2, 0, 3)
    q_and_k, v = heads.split([n + m, m], dim=1)
    q, k = rope(q_and_k, table).split([n, m], dim=1)
    return q, k, v
