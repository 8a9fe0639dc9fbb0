"""Fused linear cross entropy against torch's: losses, gradients, chunks, tensor ranks, memory, misuse."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.distributed.context import ParallelContext
from engine.distributed.layout import Layout
from engine.ops import chunks, native
from engine.ops.loss import VocabSlice, linear_cross_entropy
from tests.support.harness import run_ranks
from tests.support.numbers import CTX, DTYPES, TOLERANCE, ids, like, parameter, randn, relative, token_losses

SELF_AXIS = CTX.self_axis
BOTH_IMPLEMENTATIONS = pytest.mark.parametrize("kernels", [True, False], ids=["own", "torch"])


def plain(x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return F.cross_entropy((x @ weight.t()).permute(0, 2, 1), targets, reduction="none") * weights


@BOTH_IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 1), (7, 13), (5, 2), (0, 3), (1100, 100)])
def test_losses_and_gradients_of_given_logits(tokens: int, vocab: int, dtype: torch.dtype, kernels: bool) -> None:
    """With the identity as weight, the logits are bitwise equal to the input; the last shape has two chunks."""
    logits = randn(tokens, 1, vocab) * 5
    logits[:1] += 1000  # its exp would overflow
    leaf, head = like(logits, dtype), parameter(torch.eye(vocab), dtype)
    targets, weights = ids(vocab, tokens, 1), randn(tokens, 1, seed=2)
    with native.forced(kernels=kernels and native.load()[0] is not None):
        losses = token_losses(leaf, head, targets, weights)
        losses.sum().backward()
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide, matrix = (x.detach().double().requires_grad_() for x in (leaf, head))
    expected = plain(wide, matrix, targets, weights)
    expected.sum().backward()
    assert wide.grad is not None and leaf.grad is not None and leaf.grad.dtype == dtype
    assert matrix.grad is not None and head.grad is not None and head.grad.dtype == dtype
    tolerance = TOLERANCE[losses.dtype] * 10  # the difference of logits near 1000 cancels three digits
    if tokens:
        assert relative(losses, expected, floor=1e-6) < tolerance
        scale = max(tolerance, TOLERANCE[dtype]) * weights.abs().max()
        assert (leaf.grad.double() - wide.grad).abs().max() < scale
        assert (head.grad.double() - matrix.grad).abs().max() < scale * wide.detach().abs().sum(0).max()


@BOTH_IMPLEMENTATIONS
@pytest.mark.parametrize(("dtype", "main"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)], ids=str)
def test_chunks_and_main_gradients(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, main: torch.dtype, kernels: bool
) -> None:
    """Two micro-batches of 200 tokens in 1, 2 and 4 chunks: the gradient is in the bucket after the forward, `on_grad`
    fires in each backward, and neither loss nor gradient depends on the chunks."""
    found = []
    for rows in (200, 128, 1):
        monkeypatch.setattr(chunks, "_CPU_ROWS", rows)
        head, calls = parameter(randn(33, 7, seed=1), dtype, main), []
        head.on_grad = lambda: calls.append(1)  # noqa: B023
        expected, parts = torch.ones(33, 7, dtype=torch.float64), []
        for seed in (4, 5):
            x, targets, weights = (
                like(randn(100, 2, 7, seed=seed), dtype),
                ids(33, 100, 2),
                randn(100, 2, seed=seed + 1),
            )
            wide, matrix = (t.detach().double().requires_grad_() for t in (x, head))
            reference = plain(wide, matrix, targets, weights)
            grads = torch.autograd.grad(reference.sum(), (wide, matrix))
            expected += grads[1]
            with native.forced(kernels=kernels and native.load()[0] is not None):
                with torch.no_grad():
                    without_grad = token_losses(x, head, targets, weights)
                losses = token_losses(x, head, targets, weights)
            assert torch.equal(without_grad, losses)
            assert head.main_grad is not None and relative(head.main_grad, expected) < TOLERANCE[dtype]
            before = head.main_grad.clone()
            losses.sum().backward()
            assert x.grad is not None and relative(x.grad, grads[0]) < TOLERANCE[dtype]
            assert relative(losses, reference) < TOLERANCE[dtype] and torch.equal(head.main_grad, before)
            parts += [losses.detach(), x.grad]
        assert len(calls) == 2 and head.grad is None
        found.append([*parts, head.main_grad])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert relative(a, b.double()) < (1e-13 if dtype == torch.float64 else 1e-2)


@BOTH_IMPLEMENTATIONS
def test_gradients_equal_finite_differences(kernels: bool) -> None:
    """Gradients equal central differences of the objective. torch's gradcheck cannot be used: it also tests a result
    gradient of zero, which this op rejects."""
    x, head = like(randn(3, 2, 3), torch.float64), parameter(randn(5, 3, seed=1))
    targets, weights, part = ids(4, 3, 2), randn(3, 2, seed=2), VocabSlice(0, 4, SELF_AXIS)

    def objective() -> Tensor:
        return linear_cross_entropy(x, head, targets, weights, part, SELF_AXIS, SELF_AXIS)[0].sum()

    with native.forced(kernels=kernels and native.load()[0] is not None):
        objective().backward()
        for leaf in (x, head):
            slopes, flat = torch.zeros_like(leaf), leaf.data.view(-1)
            for i in range(len(flat)):
                value = float(flat[i])
                for step in (1e-6, -1e-6):
                    flat[i] = value + step
                    with torch.no_grad():
                        slopes.view(-1)[i] += objective() / (2 * step)
                flat[i] = value
            assert leaf.grad is not None and relative(leaf.grad, slopes) < 1e-8


@pytest.mark.parametrize("wrong", [0.5, 0.0, float("nan")])
def test_a_gradient_other_than_one_raises(wrong: float) -> None:
    x, head = like(randn(3, 2, 5), torch.float64), parameter(randn(7, 5, seed=1))
    losses = token_losses(x, head, ids(7, 3, 2), torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="scale the objective by `weights`"):
        (losses.sum() * wrong).backward()
    assert x.grad is None and head.grad is None


class Sizes(TorchDispatchMode):
    """Records the largest tensor, and the peak bytes of large tensors (at least `least` elements) alive at once."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.largest, self.most = least, 0, 0
        self.large: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in (out,) if isinstance(out, Tensor) else out if isinstance(out, tuple | list) else ():
            self.largest = max(self.largest, x.numel())
            if x.numel() >= self.least:
                self.large.append(weakref.ref(x))
        alive = [x.untyped_storage() for ref in self.large if (x := ref()) is not None]
        self.most = max(self.most, sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values()))
        return out


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("implementation", ["own", "torch"])
def test_full_logits_are_never_materialised(monkeypatch: pytest.MonkeyPatch, implementation: str, grad: bool) -> None:
    """300 tokens in 5 chunks of 64: no tensor exceeds a chunk, and only one chunk is alive (in torch, plus a copy)."""
    if implementation == "own" and native.load()[0] is None:
        pytest.skip(native.load()[1])
    monkeypatch.setattr(chunks, "_CPU_ROWS", 64)
    x, head = like(randn(150, 2, 8), torch.float32), parameter(randn(1000, 8, seed=1), torch.float32, torch.float32)
    chunk = 64 * 1000
    with native.forced(kernels=implementation == "own"), torch.set_grad_enabled(grad), Sizes(chunk // 2) as sizes:
        losses = token_losses(x, head, ids(1000, 150, 2), torch.ones(150, 2))
        if grad:
            losses.sum().backward()
    assert sizes.largest == chunk
    assert sizes.most <= chunk * 4 * (1 if implementation == "own" else 2)


def parallel(ctx: ParallelContext, x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> dict[str, Any]:
    """Losses and gradients of this rank's part of x and rows of the weight; padding values must not matter."""
    axis, vocab = ctx.tensor, len(weight)
    width = -(-vocab // axis.size)
    start = min(axis.rank * width, vocab)
    valid = max(0, min(width, vocab - start))
    rows = torch.full((width, weight.shape[1]), 1e3, dtype=weight.dtype)
    rows[:valid] = weight[start : start + valid]
    mine, head = like(x.chunk(ctx.sequence.size)[ctx.sequence.rank], x.dtype), parameter(rows, x.dtype)
    losses, _ = linear_cross_entropy(
        mine, head, targets, weights, VocabSlice(start, valid, axis), ctx.replicated, ctx.sequence
    )
    losses.sum().backward()
    assert mine.grad is not None and head.grad is not None and not head.grad[valid:].any()
    found = {"losses": losses, "x": mine.grad, "weight": head.grad[:valid]}
    return {name: value.detach().double().numpy() for name, value in found.items()}


@BOTH_IMPLEMENTATIONS
@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize(
    ("tensor", "vocab", "dtype"),
    [
        (2, 13, torch.float64),
        (4, 13, torch.float64),
        (4, 5, torch.float64),  # the last rank holds none
        (2, 8, torch.float32),
        (4, 13, torch.bfloat16),
    ],
)
def test_tensor_ranks(
    monkeypatch: pytest.MonkeyPatch, tensor: int, vocab: int, dtype: torch.dtype, sequence: bool, kernels: bool
) -> None:
    """Vocabulary sharded with padding, with and without sequence parallelism, two chunks."""
    monkeypatch.setattr(chunks, "_CPU_ROWS", 64)
    x, weight = (randn(48, 2, 6) * 2).to(dtype), randn(vocab, 6, seed=1).to(dtype)
    x[3] *= 40
    targets, weights = torch.arange(96).view(48, 2) % vocab, randn(48, 2, seed=2)
    with native.forced(kernels=kernels and native.load()[0] is not None):
        ranks = run_ranks(
            Layout(tensor, tensor=tensor, sequence=sequence), lambda ctx: parallel(ctx, x, weight, targets, weights)
        )
    wide, matrix = (t.double().requires_grad_() for t in (x, weight))
    expected = plain(wide, matrix, targets, weights)
    expected.sum().backward()
    tolerance = {torch.float64: 1e-11, torch.float32: 6e-5, torch.bfloat16: 2e-2}[dtype]
    for rank in ranks:
        assert np.array_equal(rank["losses"], ranks[0]["losses"])
        assert relative(torch.from_numpy(rank["losses"]), expected) < tolerance
    parts = [rank["x"] for rank in ranks]
    got = np.concatenate(parts) if sequence else parts[-1]
    assert wide.grad is not None and matrix.grad is not None
    assert relative(torch.from_numpy(got), wide.grad) < tolerance
    got = np.concatenate([rank["weight"] for rank in ranks])
    assert relative(torch.from_numpy(got), matrix.grad) < tolerance
