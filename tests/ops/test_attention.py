"""Attention: the selection of an implementation, and each implementation's call against the reference.

GPU packages and kernels are replaced by fakes with the same signatures that compute the same on the CPU.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.batch import Documents
from engine.distributed.context import ParallelContext
from engine.errors import ConfigError
from engine.ops import attention
from engine.ops.attention import (
    IMPLEMENTATIONS,
    AttentionCase,
    causal_attention,
    select_implementation,
    why_unavailable,
)
from engine.train import state
from engine.train.state import setup
from tests.support.cases import config, layout_of
from tests.support.errors import raises
from tests.support.harness import run_ranks

BF16, HOPPER, AMPERE = torch.bfloat16, (9, 0), (8, 0)
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
        (AttentionCase("cuda", BF16, 128, True, HOPPER), ALL_INSTALLED, "flash-attn-3"),
        (AttentionCase("cuda", BF16, 128, True, HOPPER), {"flash-attn-3": "no"}, "flash-attn-2"),
        (AttentionCase("cuda", BF16, 128, True, HOPPER), NO_PACKAGES, "varlen"),
        (AttentionCase("cuda", BF16, 128, True, (12, 0)), ALL_INSTALLED, "flash-attn-2"),
        (AttentionCase("cuda", BF16, 128, True, AMPERE), NOTHING_INSTALLED, "sdpa"),
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
        ("cudnn", AttentionCase("cuda", BF16, 128, True, HOPPER), "has no document masking"),
        ("varlen", AttentionCase("cuda", BF16, 128, False, HOPPER), "needs document masking"),
        ("flash-attn-3", AttentionCase("cuda", BF16, 128, False, AMPERE), "runs on Hopper only"),
        ("flash-attn-2", AttentionCase("cuda", BF16, 128, False, HOPPER), "no 2"),
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


def by_hand(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """Attention as in the formula: scores, softmax, weighted sum of values."""
    b, n, s, d = q.shape
    k, v = (x.repeat_interleave(n // x.shape[1], dim=1) for x in (k, v))
    seen = torch.ones(s, s, dtype=torch.bool).tril() if documents is None else documents.mask
    scores = (q @ k.transpose(2, 3) / math.sqrt(d)).masked_fill(~seen, -math.inf)
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).reshape(s, b, n * d)


def varlen_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Reference of a variable-length kernel, [total, n, d], one document at a time."""
    out = []
    for low, high in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
        part = [x[low:high].transpose(0, 1)[None] for x in (q, k, v)]
        out.append(by_hand(*part, None).view(high - low, *q.shape[1:]))
    return torch.cat(out)


DOCUMENTS = Documents.from_starts(torch.tensor([[0, 0, 2, 2, 2, 5, 6], [0] * 7]))


def assert_equals_reference(name: str, documents: Documents | None, m: int = 2) -> None:
    inputs = heads(2, 4, m, 7, 8)
    out, expected = IMPLEMENTATIONS[name](*inputs, documents), by_hand(*inputs, documents)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    assert out.shape == (7, 2, 32) and torch.allclose(out, expected, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
def test_reference(documents: Documents | None, m: int) -> None:
    assert_equals_reference("sdpa", documents, m)


@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_torch_kernels_are_restricted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA is called with the right backends in the right order, and handles grouped queries itself."""
    seen: list[Any] = []
    monkeypatch.setattr(attention, "sdpa_kernel", lambda order, set_priority: FakeSdpaKernel(seen, order, set_priority))

    def sdpa(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, enable_gqa: bool) -> Tensor:
        assert is_causal and enable_gqa == (q.shape[1] != k.shape[1]) and seen[-1] == "in"
        return by_hand(q, k, v, None).view(7, 2, 4, 8).permute(1, 2, 0, 3)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", sdpa)
    assert_equals_reference(name, None)
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
    assert window_size == (-1, 0) and key.shape == query.shape and cu_q is cu_k and cu_q.dtype == torch.int32
    assert max_q == max_k >= int(cu_q.diff().max())
    return varlen_reference(query, key, value, cu_q)


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
    assert window_size == (-1, 0) and enable_gqa == (key.shape != query.shape)
    return varlen_reference(query, key, value, cu_q)


@pytest.mark.parametrize("function", [varlen_of_2_11, varlen_of_2_12])
@pytest.mark.parametrize("m", [2, 4])
def test_varlen_of_two_torches(function: Any, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    assert_equals_reference("varlen", DOCUMENTS, m)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    assert causal
    b, s, n, d = q.shape
    return by_hand(*(x.transpose(1, 2) for x in (q, k, v)), None).view(s, b, n, d).transpose(0, 1)


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
) -> Tensor:
    assert causal and max_seqlen_q == max_seqlen_k == 7 and cu_seqlens_q is cu_seqlens_k
    return varlen_reference(q, k, v, cu_seqlens_q)


@pytest.mark.parametrize(("name", "module"), [("flash-attn-3", "flash_attn_interface"), ("flash-attn-2", "flash_attn")])
@pytest.mark.parametrize("pairs", [False, True], ids=["out", "out and log-sum-exp"])
def test_packages(name: str, module: str, pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = types.ModuleType(module)
    for function in (flash_attn_func, flash_attn_varlen_func):
        given = (lambda *a, f=function, **k: (f(*a, **k), None)) if pairs else function
        setattr(fake, function.__name__, given)
    monkeypatch.setitem(sys.modules, module, fake)
    for documents in (None, DOCUMENTS):
        assert_equals_reference(name, documents)
    attention.missing_packages.cache_clear()
    assert name not in attention.missing_packages()
    attention.missing_packages.cache_clear()


def test_a_package_that_fails_to_import_is_missing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    attention.missing_packages.cache_clear()
    assert attention.missing_packages()["flash-attn-2"] == "flash_attn cannot be imported (undefined symbol: _ZN3c10)"
    attention.missing_packages.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16], ids=str)
def test_the_selected_implementation_masks_documents(dtype: torch.dtype) -> None:
    inputs = heads(2, 4, 2, 7, 8, dtype)
    for documents in (None, DOCUMENTS):
        out = causal_attention(*inputs, documents)
        exact = by_hand(*(x.double() for x in inputs), documents)
        assert (out.double() - exact).abs().max() < {torch.float64: 1e-12, torch.float32: 1e-5, BF16: 3e-2}[dtype]


def test_setup_rejects_an_unavailable_implementation() -> None:
    def job(ctx: ParallelContext) -> None:
        with raises(ConfigError, "ops.attention-not-available", "train.attention = 'flash'", "cpu"):
            setup(config(2, parallel_data=2, train_attention="flash"), ctx)

    run_ranks(layout_of(config(2, parallel_data=2)), job)


def test_ranks_that_choose_differently_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(2, parallel_data=2)

    def job(ctx: ParallelContext) -> None:
        monkeypatch.setattr(state, "attention_name", lambda *a, **k: ["varlen", "sdpa"][ctx.rank])
        with raises(ConfigError, "train.ranks-choose-differently", "varlen on rank 0", "sdpa on rank 1"):
            setup(cfg, ctx)

    run_ranks(layout_of(cfg), job)
