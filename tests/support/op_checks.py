"""Checks of the operators for every device, and their cases.

tests/ops runs them on the CPU, tests/gpu on a GPU: tensors are created on torch's default device.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from engine.batch import Documents, Sequence
from engine.distributed.context import Axis
from engine.ops import draws, native
from engine.ops import loss as loss_module
from engine.ops.activation import gated
from engine.ops.attention import attention_case, select_core
from engine.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm, sharded_rms_norm
from engine.ops.rope import rope, rope_table, split_and_rope
from tests.support.numbers import (
    TOLERANCE,
    agree,
    like,
    randn,
    relative,
    rms_norm_reference,
    rope_reference,
)


def check_rms_norm(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    inputs = (randn(*shape, layout=layout), randn(shape[-1], seed=1))
    agree(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_reference(x, w, 1e-5), inputs, dtype, layout)


def check_rms_norm_of_tiny_and_huge_rows(scale: float) -> None:
    """eps matters for tiny rows, x^2 may overflow for huge ones; a zero row stays zero with finite gradients."""
    x = randn(4, 1, 8) * scale
    x[1] = 0
    op, reference = (functools.partial(f, eps=1e-6) for f in (rms_norm, rms_norm_reference))
    agree(op, reference, (x, randn(8, seed=1)), torch.float32)


def check_other_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Scaled by 1 + weight; over a sharded dim (here one shard); with mean and bias."""
    x, w = randn(*shape), randn(shape[-1], seed=1)
    scaled = lambda x, w: rms_norm_reference(x, 1 + w, 1e-5)  # noqa: E731
    agree(lambda x, w: rms_norm(x, w, 1e-5, 1.0), scaled, (x, w), dtype)
    alone = Axis("tensor", 1, 0, (0,), None)
    spread = lambda x, w: sharded_rms_norm(x, w, 1e-5, alone, 1)  # noqa: E731
    agree(spread, lambda x, w: rms_norm_reference(x, w, 1e-5), (x, w), dtype)

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * w + b

    agree(lambda x, w, b: layer_norm(x, w, b, 1e-5), plain, (x, w, randn(shape[-1], seed=2)), dtype)


def check_rms_norm_gradcheck() -> None:
    assert gradcheck(
        lambda x, w: rms_norm(x, w, 1e-3), (like(randn(3, 2, 5), torch.float64), like(randn(5), torch.float64))
    )


def rope_op(x: Tensor, theta: float) -> Tensor:
    s, d = x.shape[-2:]
    return rope(x, rope_table(s + 3, d, theta, x.device, x.dtype)[:, :s])


def check_rope(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    op, reference = (functools.partial(f, theta=100.0) for f in (rope_op, rope_reference))
    agree(op, reference, (randn(*shape, layout=layout),), dtype, layout)


def check_part_of_a_head_is_rotated(width: int, dtype: torch.dtype) -> None:
    """The first `width` values are rotated, the rest is bitwise unchanged. Width 0: a copy laid out for attention."""
    x = randn(2, 3, 5, 6)

    def op(x: Tensor) -> Tensor:
        return rope(x, rope_table(5, width, 100.0, x.device, x.dtype))

    def reference(x: Tensor) -> Tensor:
        return torch.cat([rope_reference(x[..., :width], 100.0), x[..., width:]], -1) if width else x

    agree(op, reference, (x,), dtype)
    assert torch.equal(op(x)[..., width:], x[..., width:])


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None, window: int = 0) -> Tensor:
    """Causal attention with the core that `auto` selects for these tensors."""
    case = attention_case(q.device, q.dtype, q.shape[-1], documents=documents is not None, window=window)
    sequence = Sequence.of_rows(k.shape[2], documents, device=q.device).with_window(window)
    return select_core("auto", case)(q, k, v, sequence)


def check_attention_gradcheck() -> None:
    assert gradcheck(attention, tuple(like(randn(1, n, 3, 2, seed=n), torch.float64) for n in (2, 1, 1)))


OPS = native.load()[0]


def both(op: Callable[..., Any], *inputs: Tensor) -> list[list[Tensor]]:
    """Outputs and gradients of op, with the custom kernels and with the references."""
    found = []
    for kernels in (True, False):
        with native.forced(kernels=kernels, gemm=kernels):
            mine = [like(x, x.dtype) for x in inputs]
            out = op(*mine)
            outs = out if isinstance(out, tuple) else (out,)
            grads = [randn(*x.shape, seed=7 + i).to(x.dtype) for i, x in enumerate(outs)]
            found.append([*outs, *torch.autograd.grad(outs, mine, grads)])
    return found


def reference(*inputs: Tensor, op: Callable[..., Any]) -> list[Tensor]:
    """Outputs and gradients of op with torch's operators in float64."""
    return both(op, *(x.double() for x in inputs))[1]


def rotated(fused: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    d = fused.shape[2] // (n + 2 * m)
    table = rope_table(fused.shape[0] + 2, d, 100.0, fused.device, fused.dtype)[:, : fused.shape[0]]
    return split_and_rope(fused, table, n, m)


OPERATORS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-5), [(3, 5, 33), (33,)]),
    "rms_norm, many rows": (lambda x, w: rms_norm(x, w, 1e-5), [(517, 70), (70,)]),
    "rms_norm, no rows": (lambda x, w: rms_norm(x, w, 1e-5), [(0, 7), (7,)]),
    "rms_norm, offset": (lambda x, w: rms_norm(x, w, 1e-5, 1.0), [(3, 5, 33), (33,)]),
    "add_rms_norm": (lambda x, r, w: add_rms_norm(x, r, w, 1e-5), [(3, 70, 33), (3, 70, 33), (33,)]),
    "add_rms_norm, offset": (lambda x, r, w: add_rms_norm(x, r, w, 1e-5, 1.0), [(5, 17), (5, 17), (17,)]),
    "layer_norm": (lambda x, w, b: layer_norm(x, w, b, 1e-5), [(3, 5, 33), (33,), (33,)]),
    "layer_norm, many rows": (lambda x, w, b: layer_norm(x, w, b, 1e-5), [(517, 70), (70,), (70,)]),
    "layer_norm, no rows": (lambda x, w, b: layer_norm(x, w, b, 1e-5), [(0, 7), (7,), (7,)]),
    "add_layer_norm": (lambda x, r, w, b: add_layer_norm(x, r, w, b, 1e-5), [(3, 70, 33), (3, 70, 33), (33,), (33,)]),
    "silu": (functools.partial(gated, name="silu"), [(5, 3, 34)]),
    "silu, many rows": (functools.partial(gated, name="silu"), [(300, 2, 258)]),
    "silu, no rows": (functools.partial(gated, name="silu"), [(0, 2, 6)]),
    "gelu": (functools.partial(gated, name="gelu"), [(30, 2, 258)]),
    "gelu_tanh": (functools.partial(gated, name="gelu_tanh"), [(30, 2, 258)]),
    "rope, grouped": (functools.partial(rotated, n=6, m=2), [(7, 3, 60)]),
    "rope, one position": (functools.partial(rotated, n=1, m=1), [(1, 2, 30)]),
    "rope, many": (functools.partial(rotated, n=4, m=4), [(40, 5, 24 * 12)]),
}


def check_kernels_equal_the_float64_reference(name: str, dtype: torch.dtype) -> None:
    """Forward and backward are within the tolerance of the dtype, and at most twice as inexact as torch's operators."""
    op, shapes = OPERATORS[name]
    inputs = [randn(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    exact, (own, torchs) = reference(*inputs, op=op), both(op, *inputs)
    for a, b, c in zip(own, torchs, exact, strict=True):
        assert a.dtype == dtype and a.shape == c.shape
        if c.numel() == 0 or not c.any():
            assert not a.any()
            continue
        assert relative(a, c) < TOLERANCE[dtype]
        units = 16 if dtype == torch.float64 else 4  # in float64 the reference is as inexact as the kernel
        assert relative(a, c) < 2 * relative(b, c) + units * torch.finfo(dtype).eps


def check_add_norm_equals_addition_and_norm(own: bool, dtype: torch.dtype) -> None:
    """Forward bitwise, backward within rounding (1e-12 in float64); the sum has a gradient too, or the only one."""
    x, r, w, b = (randn(*shape, seed=i).to(dtype) for i, shape in enumerate(((70, 3, 33), (70, 3, 33), (33,), (33,))))
    pairs: list[tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]] = [
        (lambda x, r, w: add_rms_norm(x, r, w, 1e-5), lambda s, w: rms_norm(s, w, 1e-5), (w,)),
        (lambda x, r, w: add_rms_norm(x, r, w, 1e-5, 1.0), lambda s, w: rms_norm(s, w, 1e-5, 1.0), (w,)),
        (lambda x, r, w, b: add_layer_norm(x, r, w, b, 1e-5), lambda s, w, b: layer_norm(s, w, b, 1e-5), (w, b)),
    ]
    with native.forced(kernels=own):
        for fused, norm, vectors in pairs:
            grads = [randn(70, 3, 33, seed=7 + i).to(dtype) for i in range(2)]
            results = []
            for op in (fused, lambda x, r, *vectors, norm=norm: (x + r, norm(x + r, *vectors))):
                leaves = [like(t, dtype) for t in (x, r, *vectors)]
                total, y = op(*leaves)
                both_ways = torch.autograd.grad((total, y), leaves, grads, retain_graph=True)
                of_sum = torch.autograd.grad(total, leaves, grads[0], retain_graph=True, allow_unused=True)
                of_norm = torch.autograd.grad(y, leaves, grads[1])
                results.append((total, y, both_ways, of_sum, of_norm))
            (total, y, *ours), (total2, y2, *theirs) = results
            assert torch.equal(total, total2) and torch.equal(y, y2)
            assert ours[1][2:] == (None,) * len(vectors) and torch.equal(ours[1][0], grads[0])
            for a, c in zip((*ours[0], *ours[2]), (*theirs[0], *theirs[2]), strict=True):
                assert relative(a, c.double()) < {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 2e-2)


def check_softmax_kernels_equal_references(dtype: torch.dtype, valid: int) -> None:
    """Huge logits, minus infinity, targets on other ranks, padding, a rank without a part of the vocabulary."""
    logits = randn(30, 70).to(dtype) * 10
    logits[3] += 1000
    logits[4, 5:] = -torch.inf
    targets = torch.arange(30) * 3 - 6
    targets[4] = 2
    results = []
    for stats, gradient in (
        (OPS.softmax_stats, OPS.softmax_gradient_),
        (loss_module._softmax_stats, loss_module._softmax_gradient_),
    ):
        x = logits.clone()
        peak, total, at_target = stats(x, targets, valid)
        grad = torch.linspace(0.1, 1, 30, dtype=peak.dtype)
        shift = peak if valid else torch.zeros_like(peak)  # the maximum over the ranks that have a part
        gradient(x, targets, shift, grad / total.clamp_min(1), grad, valid)
        inside = (targets >= 0) & (targets < valid)
        assert torch.equal(x, logits) is False and not x[:, valid:].any()
        results.append((peak[peak.isfinite()], total, at_target[inside], x))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b) or relative(a, b.double()) < (1e-6 if a.dtype == torch.float32 else TOLERANCE[dtype])


def check_adamw(low: torch.dtype | None, dtype: torch.dtype) -> None:
    """Five steps equal torch.optim's, with scaled gradients; the low-precision copy is the rounded master weight."""
    if low and dtype == torch.float64:
        return
    n = 10_001
    p = randn(n).to(dtype).requires_grad_()
    mine, first, second = p.detach().clone(), torch.zeros(n, dtype=dtype), torch.zeros(n, dtype=dtype)
    values = None if low is None else torch.empty(n, dtype=low)
    theirs = torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        grad = randn(n, seed=step).to(dtype)
        p.grad = grad * 0.25
        theirs.step()
        OPS.adamw_(mine, grad, first, second, values, 1e-2, 0.9, 0.95, 1e-8, 0.1, 0.25, step)
    assert relative(mine, p) < (1e-13 if dtype == torch.float64 else 1e-6)
    if values is not None:
        assert torch.equal(values, mine.to(low))


def check_bf16_rounds_as_torch_does() -> None:
    x = torch.cat(
        [randn(1000).float() * 10.0**e for e in range(-38, 38, 4)] + [torch.tensor([torch.inf, torch.nan, 0.0])]
    )
    for low in (torch.bfloat16, torch.float16):
        zero, out = torch.zeros_like(x), torch.empty(len(x), dtype=low)
        OPS.adamw_(x.clone(), zero, zero.clone(), zero.clone(), out, 0.0, 0.9, 0.9, 1.0, 0.0, 1.0, 1)
        assert torch.equal(out.nan_to_num(123.0), x.to(low).nan_to_num(123.0))


def check_references_run_where_kernels_are_unavailable() -> None:
    """Kernel and reference differ in their last bits, which shows that `forced` reaches the operators."""
    x, w = randn(64, 500).float(), randn(500, seed=1).float()
    with native.forced(kernels=False):
        assert native.kernels(x) is None
        slow = rms_norm(x, w, 1e-5)
    assert native.kernels(x) is OPS and native.kernels(x, w.double()) is None and native.kernels(x.long()) is None
    assert not torch.equal(slow, rms_norm(x, w, 1e-5)) and relative(slow, rms_norm(x, w, 1e-5)) < 1e-6


def places(shape: tuple[int, int]) -> draws.Places:
    """Rows of any alignment, some in parts of the same group, one at a place above 2^32."""
    rows, width = shape
    starts = torch.arange(rows) * (width + 3) + 61
    return draws.Places(torch.where(torch.arange(rows) % 4 == 3, starts + 2**40 + 5, starts), width)


def check_draws_have_the_bits_of_the_reference(kind: str, shape: tuple[int, int]) -> None:
    key, where = draws.Key.of(2**62 + 1, "check", 7, kind), places(shape)
    found = draws.keep(key, where, 0.3) if kind == "keep" else getattr(draws, kind)(key, where)
    on_cpu = draws.Places(where.starts.cpu(), where.width)
    with native.forced(kernels=False):
        expected = draws.keep(key, on_cpu, 0.3) if kind == "keep" else getattr(draws, kind)(key, on_cpu)
    assert found.shape == shape and found.dtype == expected.dtype and torch.equal(found.cpu(), expected)


def check_dropout_has_the_bits_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Forward and backward; a value that is not finite is dropped too."""
    key, where = draws.Key.of(1, "check"), places((math.prod(shape[:-1]), shape[-1]))
    x, results = randn(*shape).to(dtype), []
    x.view(-1)[:90:7] = torch.inf
    for kernels in (True, False):
        with native.forced(kernels=kernels):
            leaf = like(x, dtype)
            y = draws.dropout(leaf, key, where, 0.3)
            results.append((y, *torch.autograd.grad(y, leaf, randn(*shape, seed=1).to(dtype))))
    for own, torchs in zip(*results, strict=True):
        assert own.dtype == dtype and own.shape == shape and torch.equal(own, torchs)
    assert not torch.isnan(results[0][0]).any()


LAYOUTS = ("plain", "transposed", "sliced")
REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# check -> the arguments that it is called with
CASES: dict[Callable[..., None], list[tuple[Any, ...]]] = {
    check_rms_norm: list(product([(5, 1, 7), (3, 2, 33), (1, 1, 3), (2, 3, 4, 6)], LAYOUTS, TOLERANCE)),
    check_rms_norm_of_tiny_and_huge_rows: [(1e-12,), (1e12,)],
    check_other_norms: list(product([(5, 1, 7), (2, 3, 4, 6)], TOLERANCE)),
    check_rope: list(product([(1, 3, 5, 6), (2, 1, 7, 2), (1, 1, 1, 10)], LAYOUTS, TOLERANCE)),
    check_part_of_a_head_is_rotated: list(product([0, 2, 4, 6], TOLERANCE)),
    check_kernels_equal_the_float64_reference: list(product(OPERATORS, TOLERANCE)),
    check_add_norm_equals_addition_and_norm: list(product([True, False], REAL)),
    check_softmax_kernels_equal_references: list(product(TOLERANCE, [66, 0])),
    check_adamw: list(product([None, torch.bfloat16, torch.float16], [torch.float32, torch.float64])),
    check_bf16_rounds_as_torch_does: [()],
    check_references_run_where_kernels_are_unavailable: [()],
    check_draws_have_the_bits_of_the_reference: list(
        product(["bits", "uniform", "normal", "keep"], [(0, 5), (1, 1), (9, 70), (3, 128), (40, 3), (1, 600_001)])
    ),
    check_dropout_has_the_bits_of_the_reference: list(product([(0, 2, 6), (5, 3, 34), (2, 64), (70, 2, 300)], REAL)),
}


def over_cases(check: Callable[..., None]) -> pytest.MarkDecorator:
    """Parametrise a test with the arguments of a check."""
    return pytest.mark.parametrize(list(inspect.signature(check).parameters), CASES[check], ids=str)
