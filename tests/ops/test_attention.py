"""Attention: the selection of an implementation, and each implementation's call against the reference.

GPU packages and kernels are replaced by fakes with the same signatures that compute the same on the CPU.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.batch import AttentionDropout, Documents, Draws, Sequence
from engine.distributed.context import ParallelContext
from engine.errors import ConfigError
from engine.ops import attention, attention_cores
from engine.ops.attention import AttentionCase, attention_case, select_core, select_implementation, why_unavailable
from engine.ops.attention_cores import CORES
from engine.train import state
from engine.train.state import setup
from tests.support.cases import config, layout_of
from tests.support.errors import raises
from tests.support.harness import run_ranks

CPU, BF16, HOPPER, AMPERE = torch.device("cpu"), torch.bfloat16, (9, 0), (8, 0)
ALL_INSTALLED: dict[str, str] = {}
NO_PACKAGES = {"flash-attn-3": "no 3", "flash-attn-2": "no 2"}
NOTHING_INSTALLED = NO_PACKAGES | {"varlen": "no varlen"}


@pytest.fixture(autouse=True)
def _no_cache() -> Iterator[None]:
    select_implementation.cache_clear()
    yield
    select_implementation.cache_clear()


@pytest.mark.parametrize(
    ("case", "missing", "expected"),
    [
        (AttentionCase("cpu", torch.float32, 64, custom=True), NOTHING_INSTALLED, "own"),
        (AttentionCase("cpu", torch.float32, 64), ALL_INSTALLED, "sdpa"),
        (AttentionCase("cpu", BF16, 64, documents=True), ALL_INSTALLED, "sdpa"),
        (AttentionCase("cuda", BF16, 128, capability=HOPPER), ALL_INSTALLED, "flash-attn-3"),
        (AttentionCase("cuda", BF16, 128, capability=HOPPER), NO_PACKAGES, "cudnn"),
        (AttentionCase("cuda", torch.float16, 256, capability=HOPPER), NO_PACKAGES, "flash"),
        (AttentionCase("cuda", BF16, 100, capability=HOPPER), ALL_INSTALLED, "sdpa"),
        (AttentionCase("cuda", torch.float32, 128, capability=HOPPER), ALL_INSTALLED, "sdpa"),
        (AttentionCase("cuda", BF16, 128, capability=AMPERE), ALL_INSTALLED, "flash"),
        (AttentionCase("cuda", BF16, 128, capability=(7, 5)), ALL_INSTALLED, "sdpa"),
        (AttentionCase("cuda", BF16, 128, documents=True, capability=HOPPER), ALL_INSTALLED, "flash-attn-3"),
        (AttentionCase("cuda", BF16, 128, documents=True, capability=HOPPER), {"flash-attn-3": "no"}, "flash-attn-2"),
        (AttentionCase("cuda", BF16, 128, documents=True, capability=HOPPER), NO_PACKAGES, "varlen"),
        (AttentionCase("cuda", BF16, 128, documents=True, capability=(12, 0)), ALL_INSTALLED, "flash-attn-2"),
        (AttentionCase("cuda", BF16, 128, documents=True, capability=AMPERE), NOTHING_INSTALLED, "sdpa"),
        (AttentionCase("cpu", torch.float32, 64, window=9, custom=True), NOTHING_INSTALLED, "own"),
        (AttentionCase("cpu", torch.float32, 64, causal=False, custom=True), NOTHING_INSTALLED, "sdpa"),
        (AttentionCase("cuda", BF16, 128, window=9, capability=HOPPER), ALL_INSTALLED, "flash-attn-3"),
        (AttentionCase("cuda", BF16, 128, window=9, capability=AMPERE), NO_PACKAGES, "varlen"),
        (AttentionCase("cuda", BF16, 128, causal=False, capability=HOPPER), NO_PACKAGES, "cudnn"),
        (AttentionCase("meta", BF16, 128), ALL_INSTALLED, "sdpa"),
    ],
    ids=str,
)
def test_auto(case: AttentionCase, missing: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "missing_packages", lambda: missing)
    assert select_implementation("auto", case) == expected
    assert select_implementation(expected, case) == expected


@pytest.mark.parametrize(
    ("requested", "case", "why"),
    [
        ("own", AttentionCase("cuda", BF16, 128, capability=HOPPER), "needs fp32 on a CPU"),
        ("cudnn", AttentionCase("cpu", BF16, 128), "this is cpu"),
        ("flash", AttentionCase("cuda", BF16, 128, capability=(7, 5)), "this is cuda 7.5"),
        ("flash", AttentionCase("cuda", torch.float32, 128, capability=HOPPER), "bf16 or fp16"),
        ("cudnn", AttentionCase("cuda", BF16, 192, capability=HOPPER), "multiple of 8 and at most 128, not 192"),
        ("flash", AttentionCase("cuda", BF16, 260, capability=HOPPER), "multiple of 8 and at most 256, not 260"),
        ("cudnn", AttentionCase("cuda", BF16, 128, documents=True, capability=HOPPER), "has no document masking"),
        ("flash", AttentionCase("cuda", BF16, 128, window=9, capability=HOPPER), "no sliding window (model.window)"),
        ("own", AttentionCase("cpu", torch.float32, 64, causal=False, custom=True), "is causal only"),
        ("flash-attn-3", AttentionCase("cuda", BF16, 128, capability=AMPERE), "runs on Hopper only"),
        ("flash-attn-2", AttentionCase("cuda", BF16, 128, capability=HOPPER), "no 2"),
    ],
    ids=str,
)
def test_unavailable_by_name(requested: str, case: AttentionCase, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "missing_packages", lambda: NO_PACKAGES)
    problem = why_unavailable(requested, case, NO_PACKAGES)
    with raises(ConfigError, "ops.attention-not-available", f"train.attention = '{requested}'", problem):
        select_implementation(requested, case)
    assert why in problem


def heads(b: int, n: int, m: int, s: int, d: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(b, h, s, d, generator=draw, dtype=torch.float64).to(dtype) for h in (n, m, m))
    return [x.requires_grad_() for x in (q, k, v)]


def visible(s: int, keys: int, starts: list[list[int]] | None, causal: bool = True, window: int = 0) -> Tensor:
    """bool [rows, s, keys], element by element: the key that each of the last s positions of each row attends to."""
    rows = []
    for begin in starts or [[0] * keys]:
        row = torch.zeros(s, keys, dtype=torch.bool)
        for i in range(s):
            p = keys - s + i
            for j in range(keys):
                near = not window or abs(p - j) < window
                row[i, j] = near and begin[p] == begin[j] and (j <= p or not causal)
        rows.append(row)
    return torch.stack(rows)


def by_hand(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention as in the formula: scores, softmax, weighted sum of values. seen: from `visible`."""
    b, n, s, d = q.shape
    k, v = (x.repeat_interleave(n // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) / math.sqrt(d)).masked_fill(~seen[:, None], -math.inf)
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).reshape(s, b, n * d)


def flash_reference(q: Tensor, k: Tensor, v: Tensor, window_size: tuple[int, int]) -> Tensor:
    """FlashAttention of [b, n, s, d]: keys from `left` before a query's position to `right` after it, -1: all."""
    s, (left, right) = q.shape[2], window_size
    seen = [[(left < 0 or i - j <= left) and (right < 0 or j - i <= right) for j in range(s)] for i in range(s)]
    return by_hand(q, k, v, torch.tensor(seen)[None])


def varlen_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Reference of a variable-length kernel, [total, n, d], one document at a time."""
    out = []
    for low, high in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
        part = [x[low:high].transpose(0, 1)[None] for x in (q, k, v)]
        out.append(flash_reference(*part, window_size).view(high - low, *q.shape[1:]))
    return torch.cat(out)


STARTS = [[0, 0, 2, 2, 2, 5, 6], [0] * 7]
KINDS = [(starts, causal, window) for starts in (None, STARTS) for causal in (True, False) for window in (0, 1, 3)]
kinds = pytest.mark.parametrize(("starts", "causal", "window"), KINDS, ids=str)


def sequence_of(starts: list[list[int]] | None, causal: bool = True, window: int = 0, keys: int = 7) -> Sequence:
    documents = None if starts is None else Documents.from_starts(torch.tensor(starts))
    return Sequence(torch.arange(keys)[None], documents, causal, window)


def assert_equals_reference(
    name: str,
    starts: list[list[int]] | None,
    causal: bool = True,
    window: int = 0,
    m: int = 2,
    s: int = 7,
) -> None:
    """Output and gradients of the last s of 7 positions."""
    q, k, v = heads(2, 4, m, 7, 8)
    inputs = [q.detach()[:, :, 7 - s :].requires_grad_(), k, v]
    out = CORES[name](*inputs, sequence_of(starts, causal, window))
    expected = by_hand(*inputs, visible(s, 7, starts, causal, window))
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    assert out.shape == (s, 2, 32) and torch.allclose(out, expected, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@kinds
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("s", [7, 3, 1])
def test_reference(starts: list[list[int]] | None, causal: bool, window: int, m: int, s: int) -> None:
    """Also with fewer queries than keys: the queries are the last positions."""
    assert_equals_reference("sdpa", starts, causal, window, m, s)


@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_torch_kernels_are_restricted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA is called with the right backends in the right order, and handles grouped queries itself."""
    seen: list[Any] = []
    fake = lambda order, set_priority: FakeSdpaKernel(seen, order, set_priority)  # noqa: E731
    monkeypatch.setattr(attention_cores, "sdpa_kernel", fake)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, enable_gqa: bool) -> Tensor:
        assert enable_gqa == (q.shape[1] != k.shape[1]) and seen[-1] == "in"
        return flash_reference(q, k, v, (-1, 0 if is_causal else -1)).view(7, 2, 4, 8).permute(1, 2, 0, 3)

    monkeypatch.setattr(attention_cores, "scaled_dot_product_attention", sdpa)
    assert_equals_reference(name, None)
    assert_equals_reference(name, None, causal=False)
    assert_equals_reference(name, None, m=4)
    assert [b.name for b in seen[0]] == ["CUDNN_ATTENTION", "FLASH_ATTENTION"][name == "flash" :] and seen[1] is True


class FakeSdpaKernel:
    """Replaces torch's sdpa_kernel and records its arguments."""

    def __init__(self, seen: list[Any], *arguments: Any):
        self.seen = seen
        seen += arguments

    def __enter__(self) -> None:
        self.seen.append("in")

    def __exit__(self, *_: object) -> None:
        self.seen.append("out")


def varlen_of_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    assert key.shape == query.shape and cu_q is cu_k and cu_q.dtype == torch.int32
    assert max_q == max_k >= int(cu_q.diff().max())
    return varlen_reference(query, key, value, cu_q, window_size)


def varlen_of_2_12(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    assert enable_gqa == (key.shape != query.shape)
    return varlen_reference(query, key, value, cu_q, window_size)


@kinds
@pytest.mark.parametrize("function", [varlen_of_2_11, varlen_of_2_12])
def test_varlen_of_two_torches(
    function: Any, starts: list[list[int]] | None, causal: bool, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    for m in (2, 4):
        assert_equals_reference("varlen", starts, causal, window, m)


def _within(window_size: tuple[int, int], causal: bool) -> tuple[int, int]:
    """The keys that FlashAttention's two arguments leave: the causal mask and the window."""
    return window_size[0], 0 if causal else window_size[1]


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window_size: tuple[int, int] = (-1, -1)
) -> Tensor:
    b, s, n, d = q.shape
    out = flash_reference(*(x.transpose(1, 2) for x in (q, k, v)), _within(window_size, causal))
    return out.view(s, b, n, d).transpose(0, 1)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    assert max_seqlen_q == max_seqlen_k == 7 and cu_seqlens_q is cu_seqlens_k
    return varlen_reference(q, k, v, cu_seqlens_q, _within(window_size, causal))


@pytest.mark.parametrize(("name", "module"), [("flash-attn-3", "flash_attn_interface"), ("flash-attn-2", "flash_attn")])
@pytest.mark.parametrize("pairs", [False, True], ids=["out", "out and log-sum-exp"])
def test_packages(name: str, module: str, pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = types.ModuleType(module)
    for function in (flash_attn_func, flash_attn_varlen_func):
        given = (lambda *a, f=function, **k: (f(*a, **k), None)) if pairs else function
        setattr(fake, function.__name__, given)
    monkeypatch.setitem(sys.modules, module, fake)
    for starts, causal, window in KINDS:
        assert_equals_reference(name, starts, causal, window)
    attention.missing_packages.cache_clear()
    assert name not in attention.missing_packages()
    attention.missing_packages.cache_clear()


@pytest.mark.parametrize(
    ("name", "sequence", "why"),
    [
        ("cudnn", sequence_of(STARTS), "has no document masking"),
        ("flash", sequence_of(None, window=3), "has no sliding window"),
        ("own", sequence_of(None, causal=False), "is causal only"),
        ("varlen", sequence_of(None), "needs as many queries as keys"),
        ("flash-attn-3", sequence_of(STARTS), "needs as many queries as keys"),
    ],
    ids=str,
)
def test_a_core_refuses_what_it_cannot_compute(name: str, sequence: Sequence, why: str) -> None:
    q, k, v = heads(2, 4, 2, 7, 8)
    if "queries" in why:
        q = q[:, :, 2:]
    with raises(ConfigError, "ops.attention-cannot", f"train.attention = '{name}'", why, "sdpa"):
        CORES[name](q, k, v, sequence)


def test_a_package_that_fails_to_import_is_missing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    attention.missing_packages.cache_clear()
    assert attention.missing_packages()["flash-attn-2"] == "flash_attn cannot be imported (undefined symbol: _ZN3c10)"
    attention.missing_packages.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16], ids=str)
def test_the_selected_core_computes_every_kind(dtype: torch.dtype) -> None:
    inputs = heads(2, 4, 2, 7, 8, dtype)
    for starts, causal, window in KINDS:
        case = attention_case(CPU, dtype, 8, documents=starts is not None, causal=causal, window=window)
        out = select_core("auto", case)(*inputs, sequence_of(starts, causal, window))
        exact = by_hand(*(x.double() for x in inputs), visible(7, 7, starts, causal, window))
        assert (out.double() - exact).abs().max() < {torch.float64: 1e-12, torch.float32: 1e-5, BF16: 3e-2}[dtype]


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_scores_under_dropout_are_not_rounded(dtype: torch.dtype) -> None:
    """Scores of about 100: in the dtype of the heads, their rounding alone would change the weights by a fifth."""
    draws, how = Draws(1, 2, torch.arange(2)), AttentionDropout(0.25, "layers.0.attention.weights", 4, 0)
    sequence = replace(sequence_of(STARTS), draws=draws, dropout=how)
    q, k, v = (x.detach() + mean for x, mean in zip(heads(2, 4, 2, 7, 8, dtype), (6, 6, 0)))
    exact = CORES["sdpa"](*(x.double() for x in (q, k, v)), sequence)
    error = (CORES["sdpa"](q, k, v, sequence).double() - exact).abs().max() / exact.abs().max()
    assert error < 4 * torch.finfo(dtype).eps


def test_setup_rejects_an_unavailable_implementation() -> None:
    def job(ctx: ParallelContext) -> None:
        with raises(ConfigError, "ops.attention-not-available", "train.attention = 'flash'", "cpu"):
            setup(config(2, parallel_data=2, train_attention="flash"), ctx)

    run_ranks(layout_of(config(2, parallel_data=2)), job)


def test_ranks_that_choose_differently_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(2, parallel_data=2)

    def job(ctx: ParallelContext) -> None:
        monkeypatch.setattr(state, "attention_names", lambda *_: (["varlen", "sdpa"][ctx.rank],))
        with raises(ConfigError, "train.ranks-choose-differently", "varlen on rank 0", "sdpa on rank 1"):
            setup(cfg, ctx)

    run_ranks(layout_of(cfg), job)
