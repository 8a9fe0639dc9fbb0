"""Norms of NVIDIA apex: used if it is installed and custom kernels are not; the other package named apex is ignored."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.ops import apex, norm
from engine.ops.norm import add_rms_norm, layer_norm, rms_norm


@pytest.fixture
def fake_apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A fake apex that computes the same norms; yields the names of the functions that were called."""
    called: list[str] = []

    def fused_rms_norm_affine(x: Tensor, weight: Tensor, normalized_shape: Any, eps: float = 1e-6) -> Tensor:
        called.append("rms_norm")
        return F.rms_norm(x, normalized_shape, weight, eps)

    def fused_layer_norm_affine(x: Tensor, weight: Tensor, bias: Tensor, normalized_shape: Any, eps: float) -> Tensor:
        called.append("layer_norm")
        return F.layer_norm(x, normalized_shape, weight, bias, eps)

    names = ("apex", "apex.normalization", "apex.normalization.fused_layer_norm", "fused_layer_norm_cuda")
    modules: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    modules["apex.normalization.fused_layer_norm"].fused_rms_norm_affine = fused_rms_norm_affine
    modules["apex.normalization.fused_layer_norm"].fused_layer_norm_affine = fused_layer_norm_affine
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(norm, "fused_norms", lambda x: apex._load()[0])  # as if x were on a GPU
    apex._load.cache_clear()
    yield called
    apex._load.cache_clear()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()


def test_second_choice(fake_apex: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "kernels", lambda *x: None)
    x, residual, w, b = randn(4, 6), randn(4, 6), randn(6), randn(6)
    found = torch.autograd.grad(rms_norm(x, w, 1e-5).sum(), (x, w))
    assert fake_apex == ["rms_norm"]
    layer_norm(x, w, b, 1e-5)
    add_rms_norm(x, residual, w, 1e-5)
    assert fake_apex == ["rms_norm", "layer_norm", "rms_norm"]
    rms_norm(x, w, 1e-5, offset=1.0)  # apex has no offset
    monkeypatch.setattr(norm, "references_only", lambda: True)
    exact = torch.autograd.grad(rms_norm(x, w, 1e-5).sum(), (x, w))
    assert len(fake_apex) == 3
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(found, exact, strict=True))


def test_custom_kernels_come_first(fake_apex: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Own:
        @staticmethod
        def apply(x: Tensor, *rest: Any) -> Tensor:
            return x

    monkeypatch.setattr(norm, "kernels", lambda *x: True)
    monkeypatch.setattr(norm, "_CustomNorm", Own)
    rms_norm(randn(2, 3), randn(3), 1e-5)
    assert fake_apex == []


def test_another_apex_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    apex._load.cache_clear()
    module, why = apex._load()
    assert module is None and "fused_layer_norm_cuda" in why
    apex._load.cache_clear()
    assert apex.fused_norms(torch.ones(1)) is None
