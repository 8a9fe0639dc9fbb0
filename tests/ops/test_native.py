"""Our CPU kernels against the float64 reference and against the torch code that they replace; their error paths.

tests/test_ops.py runs every op as the engine calls it, hence on these kernels where they are built. Here: both ways
agree, odd sizes and strides of matrices, and that rows, threads and neighbours change no bit. A wrong call:
test_op_boundaries.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import test_ops
import torch
from test_loss import ids, whole
from test_ops import DTYPES, TOLERANCE, like, parameter, randn, relative
from torch import Tensor

from engine.ops import loss as loss_module
from engine.ops import native
from engine.ops.activation import gated
from engine.ops.attention import causal_attention
from engine.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from engine.ops.rope import rope_table, split_and_rope

OPS = native.load()[0]
pytestmark = pytest.mark.skipif(OPS is None, reason=native.load()[1])
needs_tiles = pytest.mark.skipif(OPS is None or not OPS.attention_runs(), reason="needs AVX2")


def both(op: Callable[..., Any], *inputs: Tensor) -> list[list[Tensor]]:
    """Outputs and gradients of op, on our kernels and on the references."""
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
    """Outputs and gradients of op by torch's code in float64."""
    return both(op, *(x.double() for x in inputs))[1]


def rotated(fused: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    d = fused.shape[2] // (n + 2 * m)
    table = rope_table(fused.shape[0] + 2, d, 100.0, fused.device, fused.dtype)[:, : fused.shape[0]]
    return split_and_rope(fused, table, n, m)


CASES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
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


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_float64_reference(name: str, dtype: torch.dtype) -> None:
    """Forward and backward, each within the tolerance of its type; and as near to it as torch's own code (twofold)."""
    op, shapes = CASES[name]
    inputs = [randn(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    exact, (own, torchs) = reference(*inputs, op=op), both(op, *inputs)
    for a, b, c in zip(own, torchs, exact, strict=True):
        assert a.dtype == dtype and a.shape == c.shape
        if c.numel() == 0 or not c.any():
            assert not a.any()
            continue
        assert relative(a, c) < TOLERANCE[dtype]
        units = 16 if dtype == torch.float64 else 4  # in float64 the reference is as inexact as what it judges
        assert relative(a, c) < 2 * relative(b, c) + units * torch.finfo(dtype).eps


@needs_tiles
@pytest.mark.parametrize(
    ("b", "n", "m", "s", "d"),
    [(1, 1, 1, 1, 1), (2, 4, 2, 33, 5), (1, 3, 3, 14, 32), (2, 2, 1, 300, 48), (1, 2, 2, 513, 64), (1, 6, 1, 1030, 80)],
)
def test_attention_equals_the_float64_reference(b: int, n: int, m: int, s: int, d: int) -> None:
    """Sizes around those of tiles and blocks of rows; scores up to 20, so that softmax is anything but flat."""
    inputs = [randn(b, heads, s, d, seed=i).float() * 2 for i, heads in enumerate((n, m, m))]
    exact, (own, torchs) = reference(*inputs, op=causal_attention), both(causal_attention, *inputs)
    for a, c, e in zip(own, torchs, exact, strict=True):
        assert relative(a, e, floor=1.0) < max(3e-6, 3 * relative(c, e, floor=1.0))


@needs_tiles
def test_attention_takes_any_strides_and_no_row_depends_on_what_follows() -> None:
    fused = randn(120, 2, 8, 40).float().permute(1, 2, 0, 3)  # as the projection lays it out
    q, k, v = fused.split([4, 2, 2], dim=1)
    whole = causal_attention(q, k, v)
    assert torch.equal(whole, causal_attention(*(x.contiguous() for x in (q, k, v))))
    assert torch.equal(whole[:50], causal_attention(*(x[:, :, :50] for x in (q, k, v))))
    assert torch.equal(whole[:, 1:], causal_attention(q[1:], k[1:], v[1:]))


def begins(b: int, s: int, kind: str) -> Tensor:
    """int64 [b, s], the first position of each position's document."""
    if kind == "alone":
        return torch.arange(s).expand(b, s).contiguous()
    if kind == "one":
        return torch.zeros(b, s, dtype=torch.int64)
    new = torch.rand(b, s, generator=torch.Generator().manual_seed(s)) < (0.3 if kind == "short" else 0.01)
    return (torch.arange(s) * new).cummax(1).values


@needs_tiles
@pytest.mark.parametrize("kind", ["alone", "one", "short", "long"])
@pytest.mark.parametrize(
    ("b", "n", "m", "s", "d"),
    [(1, 1, 1, 1, 1), (2, 4, 2, 33, 5), (2, 2, 1, 300, 48), (1, 2, 2, 513, 64), (2, 6, 1, 1030, 80)],
)
def test_attention_keeps_documents_apart(b: int, n: int, m: int, s: int, d: int, kind: str) -> None:
    """Forward and backward beside a softmax over a written-out mask in float64."""
    begin = begins(b, s, kind)
    q, k, v = (randn(b, heads, s, d, seed=i).float() * 2 for i, heads in enumerate((n, m, m)))
    grad, scale = randn(s, b, n * d, seed=9).float(), d**-0.5
    out, lse = OPS.attention(q, k, v, begin, scale)
    found = [out, *OPS.attention_backward(grad, q, k, v, out, lse, begin, scale)]
    column = torch.arange(s)
    seen = (column >= begin[:, None, :, None]) & (column <= column[:, None])
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(n // m, 1) for x in leaves[1:])
    scores = (leaves[0] @ keys.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
    exact = (scores.softmax(-1) @ values).permute(2, 0, 1, 3).reshape(s, b, n * d)
    wanted = [exact, *torch.autograd.grad(exact, leaves, grad.double())]
    assert relative(lse, scores.logsumexp(-1)) < 3e-6 or s == 1
    for x, e in zip(found, wanted, strict=True):
        assert relative(x, e, floor=10.0 if kind == "alone" else 1.0) < 4e-6  # alone: what cancels to 0 is as large
    if kind == "one":
        whole = OPS.attention(q, k, v, None, scale)
        assert torch.equal(whole[0], out) and torch.equal(whole[1], lse)


@needs_tiles
def test_attention_does_not_see_other_documents() -> None:
    """Other keys and values change no bit of a document's outputs and of its keys' gradients."""
    begin = begins(1, 200, "short")
    apart = int(begin[0, 120])
    q, k, v, grad = (randn(1, 2, 200, 24, seed=i).float() for i in range(4))
    grad = grad.permute(2, 0, 1, 3).reshape(200, 1, 48)
    found = []
    for _ in range(2):
        out, lse = OPS.attention(q, k, v, begin, 0.2)
        grads = OPS.attention_backward(grad, q, k, v, out, lse, begin, 0.2)
        found.append([out[apart:], *(g[:, :, apart:] for g in grads)])
        k[:, :, :apart] += 3
        v[:, :, :apart] -= 5
    assert apart > 0 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("own", [True, False])
def test_a_norm_after_a_sum_is_the_two_in_turn(own: bool, dtype: torch.dtype) -> None:
    """To the bit forward; backward to rounding, 1e-12 in float64; the sum's own gradient comes along, or alone."""
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


def matrix(rows: int, cols: int, layout: str, seed: int) -> Tensor:
    """float32, as rows, as the transpose of rows, or cut out of a larger one."""
    if layout == "transposed":
        return randn(cols, rows, seed=seed).float().t()
    if layout == "cut":
        return randn(rows + 2, cols + 3, seed=seed).float()[1:-1, 2:-1]
    return randn(rows, cols, seed=seed).float()


@needs_tiles
@pytest.mark.parametrize("layout_b", ["plain", "transposed", "cut"])
@pytest.mark.parametrize("layout_a", ["plain", "transposed", "cut"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (14, 32, 16), (15, 33, 17), (3, 1, 600), (1, 70, 513), (29, 257, 1025), (2115, 40, 5)]
)
def test_matrix_product(m: int, n: int, k: int, layout_a: str, layout_b: str) -> None:
    a, b = matrix(m, k, layout_a, 0), matrix(k, n, layout_b, 1)
    exact = a.double() @ b.double()
    room = torch.full((m + 2, n + 5), 7.0)
    out = room[1:-1, 2:-3]
    OPS.mm_(out, a, b, False)
    assert relative(out, exact, floor=1.0) < 3e-6
    OPS.mm_(out, a, b, True)
    assert relative(out, 2 * exact, floor=1.0) < 3e-6
    out.fill_(7.0)
    assert bool((room == 7.0).all()), "it wrote beside its result"


@needs_tiles
def test_matrix_product_of_nothing() -> None:
    out = torch.ones(3, 4)
    OPS.mm_(out, torch.ones(3, 0), torch.ones(0, 4), True)
    assert bool((out == 1).all())
    OPS.mm_(out, torch.ones(3, 0), torch.ones(0, 4), False)
    assert not out.any()
    OPS.mm_(out[:0], torch.ones(0, 5), torch.ones(5, 4), False)


@needs_tiles
def test_rows_and_threads_change_no_bit() -> None:
    """A row of a product, a norm or an attention is the same alone, among others, and on one thread or two."""
    x, w = randn(200, 600, seed=1).float(), randn(70, 600, seed=2).float()
    heads = [randn(2, 3, 90, 32, seed=i).float() for i in range(3)]

    def everything() -> list[Tensor]:
        with native.forced(gemm=True):
            leaf = heads[0].clone().requires_grad_()
            out = causal_attention(leaf, *heads[1:])
            out.backward(torch.ones_like(out))
            tokens, head = like(x[:, None], torch.float32), parameter(randn(3000, 600, seed=3), torch.float32)
            losses = whole(tokens, head, ids(3000, 200, 1), torch.ones(200, 1))
            losses.sum().backward()
            assert leaf.grad is not None and tokens.grad is not None and head.grad is not None
            products = [native.multiply(x, w.t()), losses, tokens.grad, head.grad]
            return [products[0], rms_norm(x, w[0], 1e-5), gated(x, "gelu"), out, leaf.grad, *products[1:]]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(3)
        three = everything()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    with native.forced(gemm=True):
        assert torch.equal(native.multiply(x[5:6], w.t()), one[0][5:6])
    assert torch.equal(rms_norm(x[5:6], w[0], 1e-5), one[1][5:6]) and torch.equal(gated(x[7:9], "gelu"), one[2][7:9])


@pytest.mark.parametrize("valid", [66, 0])
@DTYPES
def test_softmax_ways_agree(dtype: torch.dtype, valid: int) -> None:
    """Huge logits, minus infinity, targets of other ranks, padding, a rank without a part of the vocabulary."""
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
        shift = peak if valid else torch.zeros_like(peak)  # as the ranks that have a part say
        gradient(x, targets, shift, grad / total.clamp_min(1), grad, valid)
        inside = (targets >= 0) & (targets < valid)
        assert torch.equal(x, logits) is False and not x[:, valid:].any()
        results.append((peak[peak.isfinite()], total, at_target[inside], x))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b) or relative(a, b.double()) < (1e-6 if a.dtype == torch.float32 else TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16], ids=str)
def test_adamw(dtype: torch.dtype, low: torch.dtype | None) -> None:
    """Five steps as torch.optim's, gradients scaled on the way; the low-precision copy is the rounded master."""
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


def test_bf16_rounds_as_torch_does() -> None:
    x = torch.cat(
        [randn(1000).float() * 10.0**e for e in range(-38, 38, 4)] + [torch.tensor([torch.inf, torch.nan, 0.0])]
    )
    for low in (torch.bfloat16, torch.float16):
        zero, out = torch.zeros_like(x), torch.empty(len(x), dtype=low)
        OPS.adamw_(x.clone(), zero, zero.clone(), zero.clone(), out, 0.0, 0.9, 0.9, 1.0, 0.0, 1.0, 1)
        assert torch.equal(out.nan_to_num(123.0), x.to(low).nan_to_num(123.0))


def test_references_run_where_kernels_are_refused() -> None:
    """The two ways differ in their last bits, which shows that `forced` reaches the ops."""
    x, w = randn(64, 500).float(), randn(500, seed=1).float()
    with native.forced(kernels=False):
        assert native.kernels(x) is None
        slow = rms_norm(x, w, 1e-5)
    assert native.kernels(x) is OPS and native.kernels(x, w.double()) is None and native.kernels(x.long()) is None
    assert not torch.equal(slow, rms_norm(x, w, 1e-5)) and relative(slow, rms_norm(x, w, 1e-5)) < 1e-6


@pytest.mark.parametrize(
    "test",
    [test_ops.test_rms_norm_gradcheck, test_ops.test_attention_gradcheck],
    ids=lambda f: f.__name__,
)
def test_references_still_pass(test: Callable[[], None]) -> None:
    with native.forced(kernels=False):
        test()


def test_a_missing_extension_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for cached in (native._library, native._gemm_wins, native._attention_runs):
        monkeypatch.setattr(native, cached.__name__, cached.__wrapped__)
    monkeypatch.setattr(native, "load", lambda: (None, "engine._ops is not built"))
    with pytest.warns(UserWarning, match="engine._ops is not built: torch's own operators run instead"):
        assert native.kernels(torch.ones(2)) is None
    with pytest.warns(UserWarning):
        assert torch.equal(native.multiply(torch.eye(2), torch.ones(2, 2)), torch.ones(2, 2))
