"""Every op against plain torch autograd: values and gradients, odd shapes, strides, dtypes, tensor ranks."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from engine.distributed.context import ParallelContext
from engine.distributed.layout import Layout
from engine.ops.activation import activation, gated
from engine.ops.embedding import embedding
from engine.ops.linear import linear
from engine.ops.rope import rope_at, rope_table, split_and_rope
from tests.support import op_checks
from tests.support.harness import run_ranks
from tests.support.numbers import (
    CTX,
    DTYPES,
    TOLERANCE,
    agree,
    attention_reference,
    like,
    parameter,
    randn,
    relative,
    rope_reference,
    swiglu_reference,
)
from tests.support.op_checks import attention, rope_op

# -- RMSNorm ----------------------------------------------------------------------------------------------------------


@op_checks.over_cases(op_checks.check_rms_norm)
def test_rms_norm(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    op_checks.check_rms_norm(shape, layout, dtype)


@op_checks.over_cases(op_checks.check_rms_norm_of_tiny_and_huge_rows)
def test_rms_norm_of_tiny_and_huge_rows(scale: float) -> None:
    op_checks.check_rms_norm_of_tiny_and_huge_rows(scale)


@op_checks.over_cases(op_checks.check_other_norms)
def test_other_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    op_checks.check_other_norms(shape, dtype)


def test_rms_norm_gradcheck() -> None:
    op_checks.check_rms_norm_gradcheck()


# -- RoPE -------------------------------------------------------------------------------------------------------------


@op_checks.over_cases(op_checks.check_rope)
def test_rope(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    op_checks.check_rope(shape, layout, dtype)


@op_checks.over_cases(op_checks.check_part_of_a_head_is_rotated)
def test_part_of_a_head_is_rotated(width: int, dtype: torch.dtype) -> None:
    op_checks.check_part_of_a_head_is_rotated(width, dtype)


def test_rope_output_is_contiguous() -> None:
    """The output is contiguous for the projection's layout [s, b, n, d]."""
    x = randn(5, 2, 3, 4).permute(1, 2, 0, 3)
    assert not x.is_contiguous() and rope_op(x, 100.0).is_contiguous()
    assert relative(rope_op(x, 100.0), rope_reference(x, 100.0)) < 1e-12


def test_rope_keeps_scores_relative() -> None:
    """The score of two rotated vectors depends only on the distance of their positions."""
    q, k = randn(8).expand(1, 1, 12, 8), randn(8, seed=1).expand(1, 1, 12, 8)
    scores = torch.einsum("bnsd,bntd->st", rope_op(q, 50.0), rope_op(k, 50.0))
    for distance in range(12):
        assert relative(scores.diagonal(distance), scores[0, distance].expand(12 - distance)) < 1e-12
    assert not torch.allclose(scores[0, 1], scores[0, 2])


def test_rope_gradcheck() -> None:
    assert gradcheck(lambda x: rope_op(x, 20.0), (like(randn(1, 2, 4, 4), torch.float64),))


def test_rope_at_the_positions_of_each_sample() -> None:
    """One row of positions is shared by all samples; several rows are rotated as each row alone."""
    table = rope_table(9, 6, 100.0, torch.device("cpu"), torch.float64)
    positions = torch.tensor([[0, 1, 0, 1, 2], [4, 5, 6, 7, 8]])
    fused = randn(5, 2, 4 * 6)
    found = split_and_rope(fused, rope_at(table, positions), 2, 1)
    for sample in range(2):
        alone = split_and_rope(fused[:, sample : sample + 1], rope_at(table, positions[sample : sample + 1]), 2, 1)
        for x, y in zip(found, alone, strict=True):
            assert torch.allclose(x[sample], y[0], rtol=0, atol=1e-15)
    with pytest.raises(IndexError):
        rope_at(table, torch.tensor([[9]]))


def test_rope_table_keeps_float32_positions_for_bf16_models() -> None:
    table = rope_table(4096, 8, 10000.0, torch.device("cpu"), torch.bfloat16)
    exact = torch.cos(torch.arange(4096, dtype=torch.float64))
    assert relative(table[0, :, 0].float(), exact) < 5e-3  # bf16 may round cos, but not the position


# -- SwiGLU -----------------------------------------------------------------------------------------------------------


swiglu = functools.partial(gated, name="silu")


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


@DTYPES
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
@pytest.mark.parametrize(
    ("b", "n", "m", "s", "d"), [(1, 4, 4, 5, 6), (2, 6, 2, 7, 5), (1, 3, 1, 1, 8), (3, 2, 1, 17, 4)]
)
def test_causal_attention(b: int, n: int, m: int, s: int, d: int, layout: str, dtype: torch.dtype) -> None:
    inputs = [randn(b, heads, s, d, seed=i, layout=layout) for i, heads in enumerate((n, m, m))]
    agree(attention, attention_reference, inputs, dtype, layout, floor=1.0)  # of one position, q has none


def test_attention_does_not_look_ahead() -> None:
    q, k, v = (randn(1, 2, 6, 4, seed=i) for i in range(3))
    before = attention(q, k, v)
    k[:, :, 4:] += 5
    v[:, :, 4:] -= 7
    after = attention(q, k, v)
    assert torch.equal(before[:4], after[:4]) and not torch.equal(before[4:], after[4:])


def test_attention_gradcheck() -> None:
    op_checks.check_attention_gradcheck()


# -- linear and embedding: gradients go into the bucket ----------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
@pytest.mark.parametrize("shape", [(5, 1, 7), (3, 2, 4), (1, 1, 1), (6, 3)], ids=str)
def test_linear_through_autograd(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    weight = parameter(randn(9, shape[-1], seed=1), dtype)
    agree(
        lambda x: linear(x, weight, CTX.replicated, CTX.sequence),
        lambda x: x @ weight.double().t(),
        (randn(*shape, layout=layout),),
        dtype,
    )
    x = like(randn(*shape, layout=layout), dtype)
    grad = randn(*shape[:-1], 9, seed=3).to(dtype)
    linear(x, weight, CTX.replicated, CTX.sequence).backward(grad)
    expected = torch.einsum("...o,...i->oi", grad.double(), x.detach().double())
    assert weight.grad is not None and relative(weight.grad, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("dtype", "main"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_linear_adds_into_main_grad(dtype: torch.dtype, main: torch.dtype) -> None:
    """Two micro-batches accumulate onto the existing gradient; `.grad` stays None; on_grad is called for each."""
    weight, calls = parameter(randn(9, 7, seed=1), dtype, main), []
    weight.on_grad = lambda: calls.append(weight.main_grad.sum().item())  # type: ignore[union-attr]
    bucket = weight.main_grad
    expected = torch.ones(9, 7, dtype=torch.float64)
    for seed in (4, 5):
        x, grad = randn(5, 2, 7, seed=seed).to(dtype), randn(5, 2, 9, seed=seed + 9).to(dtype)
        linear(x, weight, CTX.replicated, CTX.sequence).backward(grad)  # x needs no gradient
        expected += torch.einsum("sbo,sbi->oi", grad.double(), x.double())
    assert weight.main_grad is bucket and weight.grad is None
    assert relative(weight.main_grad, expected) < TOLERANCE[dtype]
    assert len(calls) == 2 and calls[0] != calls[1]
    assert calls[1] == weight.main_grad.sum().item(), "on_grad comes after the addition"


def test_linear_gradcheck() -> None:
    weight = parameter(randn(3, 4, seed=1))
    assert gradcheck(
        lambda x, w: linear(x, w, CTX.replicated, CTX.sequence), (like(randn(2, 1, 4), torch.float64), weight)
    )


def embedding_reference(weight: Tensor, tokens: Tensor, start: int) -> Tensor:
    inside = (tokens >= start) & (tokens < start + weight.shape[0])
    return torch.where(inside[..., None], weight[(tokens - start).clamp(0, weight.shape[0] - 1)], 0.0)


@DTYPES
@pytest.mark.parametrize("start", [0, 5, 100])
def test_embedding(start: int, dtype: torch.dtype) -> None:
    """Ids outside the slice (and padding rows) give zeros and no gradient; gradients of repeated ids add up."""
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
    """Column-parallel linear with this rank's rows of the weight: (output, gradient of x, gradient of the rows)."""
    rows = weight.shape[0] // ctx.tensor.size
    mine = slice(ctx.tensor.rank * rows, (ctx.tensor.rank + 1) * rows)
    p, x = parameter(weight[mine]), x.clone().requires_grad_()
    out = linear(x, p, ctx.replicated, ctx.sequence)
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
