"""Random tensors, comparisons within the rounding of a dtype, and float64 references of the operators."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.distributed.context import make_context
from engine.distributed.layout import Layout
from engine.distributed.sharding import Parameter
from engine.distributed.specs import Chunk, ShardSpec
from engine.ops.loss import VocabSlice, linear_cross_entropy

CTX = make_context(Layout(), 0, dtype=torch.float64)
SELF_AXIS = CTX.self_axis
# max error allowed, relative to the largest value of the reference
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
Op = Callable[..., Tensor]


def randn(*shape: int, seed: int = 0, layout: str = "plain") -> Tensor:
    """float64 normal numbers, drawn on the CPU, on torch's default device.

    layout: the strides: plain, transposed (first two dims), or sliced (every second column).
    """
    numbers = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.device("cpu"):
        if layout == "transposed":
            x = numbers(shape[1], shape[0], *shape[2:]).transpose(0, 1)
        elif layout == "sliced":
            x = numbers(*shape[:-1], 2 * shape[-1])[..., ::2]
        else:
            x = numbers(*shape)
    device = torch.get_default_device()
    return x if device.type == "cpu" else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)


def named(shape: Sequence[int], seed: int, name: str) -> Tensor:
    """float64 normal numbers, determined by a seed and a name."""
    return randn(*shape, seed=zlib.crc32(f"{seed} {name}".encode()))


def like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A leaf of the same values and strides in another dtype."""
    y = torch.empty_strided(x.shape, x.stride(), dtype=dtype)
    return y.copy_(x).requires_grad_()


def relative(a: Tensor, b: Tensor, floor: float = 1e-300) -> float:
    """Largest difference, relative to the largest value of `b` or to `floor`."""
    assert a.shape == b.shape
    assert torch.isfinite(a).all()
    return float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max().clamp_min(floor))


def agree(
    op: Op,
    reference: Op,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    grad_layout: str = "plain",
    floor: float = 1e-300,
) -> None:
    """Assert that `op` in `dtype` equals the float64 `reference`, gradients included, on the same rounded inputs."""
    mine = [like(x, dtype) for x in inputs]
    theirs = [x.detach().double().requires_grad_() for x in mine]
    before = [x.detach().clone() for x in mine]
    out, expected = op(*mine), reference(*theirs)
    grad = randn(*expected.shape, seed=99, layout=grad_layout).to(dtype)
    kept = grad.clone()
    got = torch.autograd.grad(out, mine, grad)
    want = torch.autograd.grad(expected, theirs, grad.double())
    assert out.dtype == dtype and all(x.dtype == dtype for x in got)
    assert relative(out, expected) < TOLERANCE[dtype]
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        assert relative(a, b, floor) < TOLERANCE[dtype], f"gradient of input {number}"
    assert torch.equal(grad, kept), "the upstream gradient was changed"
    assert all(torch.equal(a, b) for a, b in zip(mine, before, strict=True)), "an input was changed"


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope_reference(x: Tensor, theta: float) -> Tensor:
    """Hugging Face's rotate_half on [b, n, s, d], angles from numpy."""
    s, d = x.shape[-2:]
    angle = np.arange(s)[:, None] / theta ** (np.arange(0, d, 2) / d)
    angle = torch.from_numpy(np.concatenate([angle, angle], -1)).to(x.device)
    half = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
    return x * angle.cos() + half * angle.sin()


def swiglu_reference(fused: Tensor) -> Tensor:
    gate, up = fused.chunk(2, -1)
    return F.silu(gate) * up


def attention_reference(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
    """[b, n, s, d] -> [s, b, n * d], computed head by head with an explicit mask.

    hidden: bool [b, s, s], further keys that a query does not attend to.
    """
    b, n, s, d = q.shape
    future = torch.ones(s, s, dtype=torch.bool).triu(1)
    if hidden is not None:
        future = future | hidden
    heads = []
    for i in range(n):
        j = i * k.shape[1] // n
        scores = (q[:, i] @ k[:, j].transpose(1, 2) / d**0.5).masked_fill(future, -torch.inf)
        heads.append((scores.softmax(-1) @ v[:, j]).transpose(0, 1))
    return torch.stack(heads, 2).reshape(s, b, n * d)


def parameter(values: Tensor, dtype: torch.dtype = torch.float64, main: torch.dtype | None = None) -> Parameter:
    """A parameter with, if `main` is given, a main gradient of that dtype that holds ones."""
    p = Parameter(values.to(dtype), ShardSpec((Chunk("w", tuple(values.shape)),)))
    p.main_grad = None if main is None else torch.ones(values.shape, dtype=main)
    return p


def token_losses(x: Tensor, weight: Any, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross entropy of each token on one rank, without padding."""
    part = VocabSlice(0, len(weight), SELF_AXIS)
    return linear_cross_entropy(x, weight, targets, weights, part, SELF_AXIS, SELF_AXIS)[0]


def ids(vocab: int, *shape: int) -> Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(1))
