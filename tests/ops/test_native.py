"""Custom CPU kernels against the float64 reference and against the torch code that they replace.

tests/ops/test_ops.py runs every op as the engine calls it, so on these kernels if they are built. Here: both
implementations agree, for odd sizes and strides, and rows, threads and neighbours change no bit. For wrong arguments
see test_boundaries.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from engine.batch import AttentionDropout, Documents, Draws, Sequence
from engine.ops import native
from engine.ops.activation import gated
from engine.ops.attention_cores import CORES
from engine.ops.draws import Key, Places, keep
from engine.ops.norm import rms_norm
from tests.support import op_checks
from tests.support.numbers import ids, like, parameter, randn, relative, token_losses
from tests.support.op_checks import OPS, attention, both, reference

pytestmark = pytest.mark.skipif(OPS is None, reason=native.load()[1])
needs_tiles = pytest.mark.skipif(OPS is None or not OPS.attention_runs(), reason="needs AVX2")


@op_checks.over_cases(op_checks.check_kernels_equal_the_float64_reference)
def test_kernels_equal_the_float64_reference(name: str, dtype: torch.dtype) -> None:
    op_checks.check_kernels_equal_the_float64_reference(name, dtype)


@needs_tiles
@pytest.mark.parametrize(
    ("b", "n", "m", "s", "d"),
    [(1, 1, 1, 1, 1), (2, 4, 2, 33, 5), (1, 3, 3, 14, 32), (2, 2, 1, 300, 48), (1, 2, 2, 513, 64), (1, 6, 1, 1030, 80)],
)
def test_attention_equals_the_float64_reference(b: int, n: int, m: int, s: int, d: int) -> None:
    """Sizes around those of tiles and blocks of rows; scores up to 20, so that the softmax is peaked."""
    inputs = [randn(b, heads, s, d, seed=i).float() * 2 for i, heads in enumerate((n, m, m))]
    exact, (own, torchs) = reference(*inputs, op=attention), both(attention, *inputs)
    for a, c, e in zip(own, torchs, exact, strict=True):
        assert relative(a, e, floor=1.0) < max(3e-6, 3 * relative(c, e, floor=1.0))


@needs_tiles
def test_attention_accepts_any_strides_and_is_causal() -> None:
    fused = randn(120, 2, 8, 40).float().permute(1, 2, 0, 3)  # as the projection lays it out
    q, k, v = fused.split([4, 2, 2], dim=1)
    whole = attention(q, k, v)
    assert torch.equal(whole, attention(*(x.contiguous() for x in (q, k, v))))
    assert torch.equal(whole[:50], attention(*(x[:, :, :50] for x in (q, k, v))))
    assert torch.equal(whole[:, 1:], attention(q[1:], k[1:], v[1:]))


def document_starts(b: int, s: int, kind: str) -> Tensor:
    """int64 [b, s], the start of each position's document. kind: "single" is one token per document."""
    if kind == "single":
        return torch.arange(s).expand(b, s).contiguous()
    if kind == "one":
        return torch.zeros(b, s, dtype=torch.int64)
    new = torch.rand(b, s, generator=torch.Generator().manual_seed(s)) < (0.3 if kind == "short" else 0.01)
    return (torch.arange(s) * new).cummax(1).values


@needs_tiles
@pytest.mark.parametrize("kind", ["single", "one", "short", "long"])
@pytest.mark.parametrize(
    ("b", "n", "m", "s", "d"),
    [(1, 1, 1, 1, 1), (2, 4, 2, 33, 5), (2, 2, 1, 300, 48), (1, 2, 2, 513, 64), (2, 6, 1, 1030, 80)],
)
def test_attention_with_document_masking(b: int, n: int, m: int, s: int, d: int, kind: str) -> None:
    """Forward and backward against a float64 softmax with an explicit mask."""
    begin = document_starts(b, s, kind)
    q, k, v = (randn(b, heads, s, d, seed=i).float() * 2 for i, heads in enumerate((n, m, m)))
    grad, scale = randn(s, b, n * d, seed=9).float(), d**-0.5
    out, lse = OPS.attention(q, k, v, begin, scale)
    found = [out, *OPS.attention_backward(grad, q, k, v, out, lse, begin, scale)]
    column = torch.arange(s)
    visible = (column >= begin[:, None, :, None]) & (column <= column[:, None])
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(n // m, 1) for x in leaves[1:])
    scores = (leaves[0] @ keys.transpose(2, 3) * scale).masked_fill(~visible, -torch.inf)
    exact = (scores.softmax(-1) @ values).permute(2, 0, 1, 3).reshape(s, b, n * d)
    wanted = [exact, *torch.autograd.grad(exact, leaves, grad.double())]
    assert relative(lse, scores.logsumexp(-1)) < 3e-6 or s == 1
    for x, e in zip(found, wanted, strict=True):
        assert (
            relative(x, e, floor=10.0 if kind == "single" else 1.0) < 4e-6
        )  # single: terms that cancel to 0 are this large
    if kind == "one":
        whole = OPS.attention(q, k, v, None, scale)
        assert torch.equal(whole[0], out) and torch.equal(whole[1], lse)


@needs_tiles
@pytest.mark.parametrize("window", [1, 5, 64, 500])
@pytest.mark.parametrize("kind", ["one", "short", "long"])
@pytest.mark.parametrize(("b", "n", "m", "s", "d"), [(2, 4, 2, 33, 5), (1, 2, 2, 513, 64), (2, 3, 1, 700, 48)])
def test_attention_with_a_window(b: int, n: int, m: int, s: int, d: int, kind: str, window: int) -> None:
    """Forward and backward, with and without document masking, against a float64 softmax with an explicit mask."""
    starts = None if kind == "one" else document_starts(b, s, kind)
    inputs = [randn(b, heads, s, d, seed=i).float() * 2 for i, heads in enumerate((n, m, m))]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x.repeat_interleave(n // m, 1) for x in (k, v))
        column = torch.arange(s)
        seen = (column <= column[:, None]) & (column > column[:, None] - window)
        if starts is not None:
            seen = seen & (column >= starts[:, None, :, None])
        scores = (q @ keys.transpose(2, 3) * d**-0.5).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ values).permute(2, 0, 1, 3).reshape(s, b, n * d)

    documents = None if starts is None else Documents.from_starts(starts)
    found = both(lambda q, k, v: attention(q, k, v, documents, window), *inputs)[0]
    for x, e in zip(found, reference(*inputs, op=dense), strict=True):
        assert relative(x, e, floor=10.0 if window == 1 else 1.0) < 4e-6  # 1: terms that cancel to 0 are this large


@needs_tiles
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("kind", ["one", "short"])
@pytest.mark.parametrize(
    ("b", "n", "m", "s", "keys", "d"), [(2, 4, 2, 9, 9, 5), (1, 2, 1, 3, 77, 8), (1, 2, 2, 300, 300, 64)]
)
def test_attention_with_dropout(b: int, n: int, m: int, s: int, keys: int, d: int, kind: str, window: int) -> None:
    """Against a float64 softmax whose weights are multiplied by the mask of their index (sample, head, query, key)."""
    heads, first, samples, p = n + 3, 2, torch.tensor([7, 2])[:b], 0.3  # the n heads of a tensor rank
    starts = document_starts(b, keys, kind)
    inputs = [randn(b, x, size, d, seed=i).float() for i, (x, size) in enumerate(((n, s), (m, keys), (m, keys)))]
    draw = Key.of(3, "dropout", 5, "layers.1.weights")
    rows = [Places(x * heads * keys * keys, heads * keys * keys) for x in samples[:, None]]
    whole = torch.stack([keep(draw, row, p).view(heads, keys, keys) for row in rows])
    kept = whole[:, first : first + n, keys - s :] / (1 - p)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(n // m, 1) for x in (k, v))
        position, column = torch.arange(keys - s, keys)[:, None], torch.arange(keys)
        seen = (column <= position) & (column > position - (window or keys))
        seen = seen & (column >= starts[:, None, keys - s :, None])
        scores = (q @ k.transpose(2, 3) * d**-0.5).masked_fill(~seen, -torch.inf)
        return ((scores.softmax(-1) * kept) @ v).permute(2, 0, 1, 3).reshape(s, b, n * d)

    documents = None if kind == "one" else Documents.from_starts(starts)
    plain = replace(Sequence.of_rows(keys, documents), window=window, draws=Draws(3, 5, samples))
    sequence = plain.with_dropout(AttentionDropout(p, "layers.1.weights", heads, first))
    assert plain.with_dropout(AttentionDropout(0.0, "layers.1.weights", heads, first)).dropout is None
    found = both(lambda q, k, v: CORES["own"](q, k, v, sequence), *inputs)[0]
    for x, e in zip(found, reference(*inputs, op=dense), strict=True):
        assert x.shape == e.shape and relative(x, e, floor=1.0) < 4e-6


@needs_tiles
def test_attention_that_keeps_every_weight_changes_no_bit() -> None:
    q, k, v, places = *(randn(1, 2, 50, 8, seed=i).float() for i in range(3)), torch.zeros(1, 2, 50).long()
    for a, b in zip(OPS.attention(q, k, v, None, 0.3), OPS.attention(q, k, v, None, 0.3, places, 1, 2, 0, 1.0)):
        assert torch.equal(a, b)


@needs_tiles
def test_attention_without_queries_has_zero_gradients_of_keys() -> None:
    k, v, nothing = randn(2, 2, 300, 8).float(), randn(2, 2, 300, 8).float(), torch.empty(2, 4, 0, 8)
    for _ in range(20):  # freed memory that is not zero
        torch.full((2, 2, 300, 8), 7.0)
        grads = OPS.attention_backward(
            torch.empty(0, 2, 32), nothing, k, v, torch.empty(0, 2, 32), torch.empty(2, 4, 0), None, 0.4
        )
        assert [g.shape for g in grads] == [nothing.shape, k.shape, v.shape] and not any(g.any() for g in grads)


@needs_tiles
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("kind", ["one", "long"])
@pytest.mark.parametrize(
    ("b", "n", "m", "s", "keys", "d"),
    [(1, 1, 1, 1, 1, 8), (2, 4, 2, 1, 77, 5), (2, 2, 1, 3, 300, 48), (1, 2, 2, 211, 513, 64), (1, 2, 2, 500, 501, 16)],
)
def test_attention_of_the_last_queries(
    b: int, n: int, m: int, s: int, keys: int, d: int, kind: str, window: int
) -> None:
    """Fewer queries than keys: outputs and gradients are those of the last s positions of all queries, in float64."""
    starts = document_starts(b, keys, kind)
    documents = None if kind == "one" else Documents.from_starts(starts)
    inputs = [
        randn(b, heads, size, d, seed=i).float() for i, (heads, size) in enumerate(((n, s), (m, keys), (m, keys)))
    ]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(n // m, 1) for x in (k, v))
        position, column = torch.arange(keys - s, keys)[:, None], torch.arange(keys)
        seen = (column <= position) & (column > position - (window or keys))
        seen = seen & (column >= starts[:, None, keys - s :, None])
        scores = (q @ k.transpose(2, 3) * d**-0.5).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).reshape(s, b, n * d)

    found = both(lambda q, k, v: attention(q, k, v, documents, window), *inputs)[0]
    for x, e in zip(found, reference(*inputs, op=dense), strict=True):
        assert x.shape == e.shape and relative(x, e, floor=1.0) < 4e-6


@needs_tiles
def test_document_masking_isolates_documents_bitwise() -> None:
    """Other keys and values change no bit of a document's outputs and of its keys' gradients."""
    begin = document_starts(1, 200, "short")
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


@op_checks.over_cases(op_checks.check_add_norm_equals_addition_and_norm)
def test_add_norm_equals_addition_and_norm(own: bool, dtype: torch.dtype) -> None:
    op_checks.check_add_norm_equals_addition_and_norm(own, dtype)


def matrix(rows: int, cols: int, layout: str, seed: int) -> Tensor:
    """A float32 matrix: contiguous, transposed, or a slice of a larger one."""
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
def test_gemm(m: int, n: int, k: int, layout_a: str, layout_b: str) -> None:
    a, b = matrix(m, k, layout_a, 0), matrix(k, n, layout_b, 1)
    exact = a.double() @ b.double()
    buffer = torch.full((m + 2, n + 5), 7.0)
    out = buffer[1:-1, 2:-3]
    OPS.mm_(out, a, b, False)
    assert relative(out, exact, floor=1.0) < 3e-6
    OPS.mm_(out, a, b, True)
    assert relative(out, 2 * exact, floor=1.0) < 3e-6
    out.fill_(7.0)
    assert bool((buffer == 7.0).all()), "it wrote outside its result"


@needs_tiles
def test_gemm_of_empty_matrices() -> None:
    out = torch.ones(3, 4)
    OPS.mm_(out, torch.ones(3, 0), torch.ones(0, 4), True)
    assert bool((out == 1).all())
    OPS.mm_(out, torch.ones(3, 0), torch.ones(0, 4), False)
    assert not out.any()
    OPS.mm_(out[:0], torch.ones(0, 5), torch.ones(5, 4), False)


@needs_tiles
def test_rows_and_threads_change_no_bit() -> None:
    """A row of a matmul, norm or attention has the same bits alone or among other rows, and on one thread or three."""
    x, w = randn(200, 600, seed=1).float(), randn(70, 600, seed=2).float()
    heads = [randn(2, 3, 90, 32, seed=i).float() for i in range(3)]

    def everything() -> list[Tensor]:
        with native.forced(gemm=True):
            leaf = heads[0].clone().requires_grad_()
            out = attention(leaf, *heads[1:])
            out.backward(torch.ones_like(out))
            tokens, head = like(x[:, None], torch.float32), parameter(randn(3000, 600, seed=3), torch.float32)
            losses = token_losses(tokens, head, ids(3000, 200, 1), torch.ones(200, 1))
            losses.sum().backward()
            assert leaf.grad is not None and tokens.grad is not None and head.grad is not None
            matmuls = [native.matmul(x, w.t()), losses, tokens.grad, head.grad]
            return [matmuls[0], rms_norm(x, w[0], 1e-5), gated(x, "gelu"), out, leaf.grad, *matmuls[1:]]

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
        assert torch.equal(native.matmul(x[5:6], w.t()), one[0][5:6])
    assert torch.equal(rms_norm(x[5:6], w[0], 1e-5), one[1][5:6]) and torch.equal(gated(x[7:9], "gelu"), one[2][7:9])


@op_checks.over_cases(op_checks.check_softmax_kernels_equal_references)
def test_softmax_kernels_equal_references(dtype: torch.dtype, valid: int) -> None:
    op_checks.check_softmax_kernels_equal_references(dtype, valid)


@op_checks.over_cases(op_checks.check_adamw)
def test_adamw(low: torch.dtype | None, dtype: torch.dtype) -> None:
    op_checks.check_adamw(low, dtype)


def test_bf16_rounds_as_torch_does() -> None:
    op_checks.check_bf16_rounds_as_torch_does()


def test_references_run_where_kernels_are_unavailable() -> None:
    op_checks.check_references_run_where_kernels_are_unavailable()


@pytest.mark.parametrize(
    "test",
    [op_checks.check_rms_norm_gradcheck, op_checks.check_attention_gradcheck],
    ids=lambda f: f.__name__,
)
def test_references_pass_without_kernels(test: Callable[[], None]) -> None:
    with native.forced(kernels=False):
        test()


def test_a_build_of_another_interface_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number, and one without a number too: both would lack operators, or compute something else."""
    monkeypatch.setattr(native, "_INTERFACE", native._INTERFACE + 1)
    library, why = native.load.__wrapped__()
    now, torch_version = native._INTERFACE, f"and torch {torch.__version__}"
    built = f"engine._ops was built for interface {now - 1} {torch_version}"
    assert library is None and why == f"{built}, this is interface {now} {torch_version}"
    older = SimpleNamespace(load_library=lambda _: None, trident=SimpleNamespace(built_for=lambda: torch.__version__))
    monkeypatch.setattr(native.torch, "ops", older)
    assert native._open("engine._ops")[1] == f"interface 0 {torch_version}"


def test_a_missing_extension_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for cached in (native._library, native._gemm_wins, native._attention_runs):
        monkeypatch.setattr(native, cached.__name__, cached.__wrapped__)
    monkeypatch.setattr(native, "load", lambda: (None, "engine._ops is not built"))
    with pytest.warns(UserWarning, match="engine._ops is not built: torch's operators run instead"):
        assert native.kernels(torch.ones(2)) is None
    with pytest.warns(UserWarning):
        assert torch.equal(native.matmul(torch.eye(2), torch.ones(2, 2)), torch.ones(2, 2))
