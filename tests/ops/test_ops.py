"""Every op against plain torch autograd: values and gradients, odd shapes, strides, dtypes, and over tensor ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import run_ranks
from torch import Tensor
from torch.autograd import gradcheck

from engine.distributed.context import Axis, ParallelContext, make_context
from engine.distributed.layout import Layout
from engine.distributed.sharding import Chunk, Parameter, ShardSpec
from engine.ops.activation import activation, gated
from engine.ops.attention import causal_attention
from engine.ops.embedding import embedding
from engine.ops.linear import linear
from engine.ops.norm import layer_norm, rms_norm, spread_rms_norm
from engine.ops.rope import rope, rope_table

CTX = make_context(Layout(), 0, num_kv_heads=1, dtype=torch.float64)
# largest difference allowed, relative to the largest value of the reference
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)

Op = Callable[..., Tensor]


def randn(*shape: int, seed: int = 0, layout: str = "plain") -> Tensor:
    """float64 normal numbers; `layout` chooses strides: plain, transposed (first two dims), or every second column."""
    gen = torch.Generator().manual_seed(seed)
    if layout == "transposed":
        return torch.randn(shape[1], shape[0], *shape[2:], generator=gen, dtype=torch.float64).transpose(0, 1)
    if layout == "sliced":
        return torch.randn(*shape[:-1], 2 * shape[-1], generator=gen, dtype=torch.float64)[..., ::2]
    return torch.randn(*shape, generator=gen, dtype=torch.float64)


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
    """op in `dtype` and reference in float64, on the same (rounded) inputs and upstream gradient."""
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


# -- RMSNorm ----------------------------------------------------------------------------------------------------------


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@DTYPES
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
@pytest.mark.parametrize("shape", [(5, 1, 7), (3, 2, 33), (1, 1, 3), (2, 3, 4, 6)], ids=str)
def test_rms_norm(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    inputs = (randn(*shape, layout=layout), randn(shape[-1], seed=1))
    agree(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_reference(x, w, 1e-5), inputs, dtype, layout)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_rms_norm_of_tiny_and_huge_rows(scale: float) -> None:
    """eps matters for the one, overflow of x^2 would for the other; a row of zeros stays zero with finite gradients."""
    x = randn(4, 1, 8) * scale
    x[1] = 0
    op, reference = (functools.partial(f, eps=1e-6) for f in (rms_norm, rms_norm_reference))
    agree(op, reference, (x, randn(8, seed=1)), torch.float32)


@DTYPES
@pytest.mark.parametrize("shape", [(5, 1, 7), (2, 3, 4, 6)], ids=str)
def test_other_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Scaled by 1 + weight; over a dim that is cut, here in one part; with mean and bias."""
    x, w = randn(*shape), randn(shape[-1], seed=1)
    scaled = lambda x, w: rms_norm_reference(x, 1 + w, 1e-5)  # noqa: E731
    agree(lambda x, w: rms_norm(x, w, 1e-5, 1.0), scaled, (x, w), dtype)
    alone = Axis("tensor", 1, 0, (0,), None)
    spread = lambda x, w: spread_rms_norm(x, w, 1e-5, alone, 1)  # noqa: E731
    agree(spread, lambda x, w: rms_norm_reference(x, w, 1e-5), (x, w), dtype)

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * w + b

    agree(lambda x, w, b: layer_norm(x, w, b, 1e-5), plain, (x, w, randn(shape[-1], seed=2)), dtype)


def test_rms_norm_gradcheck() -> None:
    assert gradcheck(
        lambda x, w: rms_norm(x, w, 1e-3), (like(randn(3, 2, 5), torch.float64), like(randn(5), torch.float64))
    )


# -- RoPE -------------------------------------------------------------------------------------------------------------


def rope_reference(x: Tensor, theta: float) -> Tensor:
    """Hugging Face's rotate_half on [b, n, s, d], angles from numpy."""
    s, d = x.shape[-2:]
    angle = np.arange(s)[:, None] / theta ** (np.arange(0, d, 2) / d)
    angle = torch.from_numpy(np.concatenate([angle, angle], -1)).to(x.device)
    half = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
    return x * angle.cos() + half * angle.sin()


def rope_op(x: Tensor, theta: float) -> Tensor:
    s, d = x.shape[-2:]
    return rope(x, rope_table(s + 3, d, theta, x.device, x.dtype)[:, :s])


@DTYPES
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
@pytest.mark.parametrize("shape", [(1, 3, 5, 6), (2, 1, 7, 2), (1, 1, 1, 10)], ids=str)
def test_rope(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    op, reference = (functools.partial(f, theta=100.0) for f in (rope_op, rope_reference))
    agree(op, reference, (randn(*shape, layout=layout),), dtype, layout)


def test_rope_lays_out_for_attention() -> None:
    """From [s, b, n, d] as the projection gives it, heads become rows that lie one after another."""
    x = randn(5, 2, 3, 4).permute(1, 2, 0, 3)
    assert not x.is_contiguous() and rope_op(x, 100.0).is_contiguous()
    assert relative(rope_op(x, 100.0), rope_reference(x, 100.0)) < 1e-12


def test_rope_keeps_scores_relative() -> None:
    """The score of two rotated vectors depends on the distance of their positions only."""
    q, k = randn(8).expand(1, 1, 12, 8), randn(8, seed=1).expand(1, 1, 12, 8)
    scores = torch.einsum("bnsd,bntd->st", rope_op(q, 50.0), rope_op(k, 50.0))
    for distance in range(12):
        assert relative(scores.diagonal(distance), scores[0, distance].expand(12 - distance)) < 1e-12
    assert not torch.allclose(scores[0, 1], scores[0, 2])


def test_rope_gradcheck() -> None:
    assert gradcheck(lambda x: rope_op(x, 20.0), (like(randn(1, 2, 4, 4), torch.float64),))


@DTYPES
@pytest.mark.parametrize("width", [0, 2, 4, 6])
def test_part_of_a_head_is_rotated(width: int, dtype: torch.dtype) -> None:
    """The first values; the rest stays as it is, to the bit. None of them: a copy, laid out for attention."""
    x = randn(2, 3, 5, 6)

    def op(x: Tensor) -> Tensor:
        return rope(x, rope_table(5, width, 100.0, x.device, x.dtype))

    def reference(x: Tensor) -> Tensor:
        return torch.cat([rope_reference(x[..., :width], 100.0), x[..., width:]], -1) if width else x

    agree(op, reference, (x,), dtype)
    assert torch.equal(op(x)[..., width:], x[..., width:])


def test_rope_table_keeps_float32_positions_for_bf16_models() -> None:
    table = rope_table(4096, 8, 10000.0, torch.device("cpu"), torch.bfloat16)
    exact = torch.cos(torch.arange(4096, dtype=torch.float64))
    assert relative(table[0, :, 0].float(), exact) < 5e-3  # bf16 rounds cos, it must not round the position


# -- SwiGLU -----------------------------------------------------------------------------------------------------------


swiglu = functools.partial(gated, name="silu")


def swiglu_reference(fused: Tensor) -> Tensor:
    gate, up = fused.chunk(2, -1)
    return F.silu(gate) * up


@DTYPES
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
@pytest.mark.parametrize("shape", [(5, 1, 14), (3, 2, 2), (1, 1, 66)], ids=str)
def test_swiglu(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    agree(swiglu, swiglu_reference, (randn(*shape, layout=layout) * 3,), dtype, layout)


def test_swiglu_saturates_without_nan() -> None:
    agree(swiglu, swiglu_reference, (torch.tensor([[-200.0, 200.0, -1e4, 1e4, 1.0, 2.0, 3.0, 4.0]]),), torch.float32)


@DTYPES
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_activations(name: str, dtype: torch.dtype) -> None:
    """Gated and plain, against the formulas."""

    def formula(x: Tensor) -> Tensor:
        if name == "silu":
            return x / (1 + torch.exp(-x))
        if name == "gelu":
            return x * (1 + torch.erf(x / 2**0.5)) / 2
        return x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2

    def product(fused: Tensor) -> Tensor:
        gate, up = fused.chunk(2, -1)
        return formula(gate) * up

    x = randn(5, 2, 14) * 2
    agree(activation(name, False), formula, (x,), dtype)
    agree(activation(name, True), product, (x,), dtype)
    assert gradcheck(activation(name, True), (like(randn(3, 1, 6), torch.float64),))


# -- attention --------------------------------------------------------------------------------------------------------


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[b, n, s, d] -> [s, b, n * d], head by head, with the mask written out."""
    b, n, s, d = q.shape
    future = torch.ones(s, s, dtype=torch.bool).triu(1)
    heads = []
    for i in range(n):
        j = i * k.shape[1] // n
        scores = (q[:, i] @ k[:, j].transpose(1, 2) / d**0.5).masked_fill(future, -torch.inf)
        heads.append((scores.softmax(-1) @ v[:, j]).transpose(0, 1))
    return torch.stack(heads, 2).reshape(s, b, n * d)


@DTYPES
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
@pytest.mark.parametrize(
    ("b", "n", "m", "s", "d"), [(1, 4, 4, 5, 6), (2, 6, 2, 7, 5), (1, 3, 1, 1, 8), (3, 2, 1, 17, 4)]
)
def test_causal_attention(b: int, n: int, m: int, s: int, d: int, layout: str, dtype: torch.dtype) -> None:
    inputs = [randn(b, heads, s, d, seed=i, layout=layout) for i, heads in enumerate((n, m, m))]
    agree(causal_attention, attention_reference, inputs, dtype, layout, floor=1.0)  # of one position, q has none


def test_attention_does_not_look_ahead() -> None:
    q, k, v = (randn(1, 2, 6, 4, seed=i) for i in range(3))
    before = causal_attention(q, k, v)
    k[:, :, 4:] += 5
    v[:, :, 4:] -= 7
    after = causal_attention(q, k, v)
    assert torch.equal(before[:4], after[:4]) and not torch.equal(before[4:], after[4:])


def test_attention_gradcheck() -> None:
    assert gradcheck(causal_attention, tuple(like(randn(1, n, 3, 2, seed=n), torch.float64) for n in (2, 1, 1)))


# -- linear and embedding: gradients go into the bucket ----------------------------------------------------------------


def parameter(values: Tensor, dtype: torch.dtype = torch.float64, main: torch.dtype | None = None) -> Parameter:
    """A parameter with, if `main` is given, a main gradient of that dtype that holds ones."""
    p = Parameter(values.to(dtype), ShardSpec((Chunk("w", values.shape[0]),), other=values.shape[1]))
    p.main_grad = None if main is None else torch.ones(values.shape, dtype=main)
    return p


@DTYPES
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
@pytest.mark.parametrize("shape", [(5, 1, 7), (3, 2, 4), (1, 1, 1), (6, 3)], ids=str)
def test_linear_through_autograd(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    weight = parameter(randn(9, shape[-1], seed=1), dtype)
    agree(
        lambda x: linear(x, weight, CTX.copies, CTX.sequence),
        lambda x: x @ weight.double().t(),
        (randn(*shape, layout=layout),),
        dtype,
    )
    x = like(randn(*shape, layout=layout), dtype)
    grad = randn(*shape[:-1], 9, seed=3).to(dtype)
    linear(x, weight, CTX.copies, CTX.sequence).backward(grad)
    expected = torch.einsum("...o,...i->oi", grad.double(), x.detach().double())
    assert weight.grad is not None and relative(weight.grad, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("dtype", "main"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_linear_adds_into_main_grad(dtype: torch.dtype, main: torch.dtype) -> None:
    """Two microbatches add up on top of what is there; autograd's own .grad stays empty; on_grad is called for each."""
    weight, calls = parameter(randn(9, 7, seed=1), dtype, main), []
    weight.on_grad = lambda: calls.append(weight.main_grad.sum().item())  # type: ignore[union-attr]
    bucket = weight.main_grad
    expected = torch.ones(9, 7, dtype=torch.float64)
    for seed in (4, 5):
        x, grad = randn(5, 2, 7, seed=seed).to(dtype), randn(5, 2, 9, seed=seed + 9).to(dtype)
        linear(x, weight, CTX.copies, CTX.sequence).backward(grad)  # x needs no gradient
        expected += torch.einsum("sbo,sbi->oi", grad.double(), x.double())
    assert weight.main_grad is bucket and weight.grad is None
    assert relative(weight.main_grad, expected) < TOLERANCE[dtype]
    assert len(calls) == 2 and calls[0] != calls[1]
    assert calls[1] == weight.main_grad.sum().item(), "on_grad comes after the addition"


def test_linear_gradcheck() -> None:
    weight = parameter(randn(3, 4, seed=1))
    assert gradcheck(lambda x, w: linear(x, w, CTX.copies, CTX.sequence), (like(randn(2, 1, 4), torch.float64), weight))


def embedding_reference(weight: Tensor, tokens: Tensor, start: int) -> Tensor:
    inside = (tokens >= start) & (tokens < start + weight.shape[0])
    return torch.where(inside[..., None], weight[(tokens - start).clamp(0, weight.shape[0] - 1)], 0.0)


@DTYPES
@pytest.mark.parametrize("start", [0, 5, 100])
def test_embedding(start: int, dtype: torch.dtype) -> None:
    """Ids below and beyond the slice (and its last rows) give zeros and no gradient; repeated ids add up."""
    tokens = torch.tensor([[0, 4, 5, 6], [11, 12, 5, 5], [300, 10, 0, 11]]).t()
    weight = parameter(randn(7, 3), dtype)
    wide = weight.detach().double().requires_grad_()
    out, expected = embedding(weight, tokens, start), embedding_reference(wide, tokens, start)
    grad = randn(4, 3, 3, seed=2).to(dtype)
    out.backward(grad)
    expected.backward(grad.double())
    assert out.dtype == dtype and torch.equal(out.double(), expected)
    assert weight.grad is not None and wide.grad is not None
    assert relative(weight.grad, wide.grad) < TOLERANCE[dtype] or start == 100
    assert start < 100 or (not weight.grad.any() and not out.any())


@pytest.mark.parametrize(("dtype", "main"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)], ids=str)
def test_embedding_adds_into_main_grad(dtype: torch.dtype, main: torch.dtype) -> None:
    weight, calls = parameter(randn(7, 3), dtype, main), []
    weight.on_grad = lambda: calls.append(1)
    expected = torch.ones(7, 3, dtype=torch.float64)
    for seed in (1, 2):
        tokens = torch.randint(0, 12, (2, 9), generator=torch.Generator().manual_seed(seed))
        grad = randn(2, 9, 3, seed=seed).to(dtype)
        embedding(weight, tokens, 3).backward(grad)
        for token, row in zip(tokens.ravel().tolist(), grad.double().view(-1, 3), strict=True):
            if 3 <= token < 10:
                expected[token - 3] += row
    assert weight.grad is None and len(calls) == 2 and weight.main_grad is not None
    assert relative(weight.main_grad, expected) < (1e-12 if main == torch.float64 else 1e-6)  # summed in main's dtype


def test_embedding_gradcheck() -> None:
    weight, tokens = parameter(randn(4, 2)), torch.tensor([[1, 3, 3, 9]])
    assert gradcheck(lambda w: embedding(w, tokens, 1), (weight,))


def parallel_linear(ctx: ParallelContext, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Any, Any, Any]:
    """Column-parallel: this rank's rows of the weight. Returns output, gradient of x and of the rows."""
    rows = weight.shape[0] // ctx.tensor.size
    mine = slice(ctx.tensor.rank * rows, (ctx.tensor.rank + 1) * rows)
    p, x = parameter(weight[mine]), x.clone().requires_grad_()
    out = linear(x, p, ctx.copies, ctx.sequence)
    out.backward(grad[..., mine])
    assert x.grad is not None and p.grad is not None
    return out.detach().numpy(), x.grad.numpy(), p.grad.numpy()


def test_linear_sums_the_input_gradient_over_the_ranks() -> None:
    x, weight, grad = randn(3, 1, 5), randn(8, 5, seed=1), randn(3, 1, 8, seed=2)
    ranks = run_ranks(Layout(2, tensor=2), lambda ctx: parallel_linear(ctx, x, weight, grad))
    assert relative(torch.from_numpy(np.concatenate([r[0] for r in ranks], -1)), x @ weight.t()) < 1e-12
    for _, grad_x, _ in ranks:
        assert relative(torch.from_numpy(grad_x), grad @ weight) < 1e-12
    expected = torch.einsum("sbo,sbi->oi", grad, x)
    assert relative(torch.from_numpy(np.concatenate([r[2] for r in ranks])), expected) < 1e-12
