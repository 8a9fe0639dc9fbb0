"""The checks of the operators on a GPU, and GPU-only behaviour: streams, tensors on two devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from engine.cli import selftest
from engine.ops import native
from engine.ops.norm import rms_norm
from tests.support.numbers import randn
from tests.support.op_checks import CASES

GPU = torch.device("cuda", 0)
WHY_NOT = native.why_no_cuda(GPU) if torch.cuda.is_available() else "there is no GPU"
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
EVERY = [
    pytest.param(check, case, id="-".join(map(str, (check.__name__, *case))))
    for check, cases in CASES.items()
    for case in cases
]


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    with GPU:
        yield


@pytest.mark.parametrize(("check", "case"), EVERY)
def test_an_operator(check: Callable[..., None], case: tuple[Any, ...]) -> None:
    check(*case)


def test_each_op_of_the_doctor_runs_on_custom_kernels() -> None:
    tried = {t.name: t for t in selftest.check_ops(GPU)}
    assert not [t for t in tried.values() if t.broken]
    for name in ("RMSNorm", "RoPE", "cross entropy", "AdamW"):
        assert tried[name].custom, name


def test_kernels_go_to_the_current_stream() -> None:
    """The stream waits long before the input is written: a kernel on another stream would read the old input."""
    x, w = torch.zeros(4000, 512), torch.ones(512)
    y = torch.ops.trident.rms_norm(x, w, 1e-5, 0.0)[0]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        x.fill_(3.0)
        y = rms_norm(x, w, 1e-5)
    torch.cuda.synchronize()
    assert float((y - 1).abs().max()) < 1e-5


def test_a_second_call_has_the_same_bits() -> None:
    x, w = randn(3000, 1000).float(), randn(1000, seed=1).float()
    ops = native.load()[0]
    scale = ops.rms_norm(x, w, 1e-5, 0.0)[1]
    one, two = (ops.rms_norm_backward(x.flip(0), None, x, w, scale, 0.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_tensors_on_two_devices_are_rejected() -> None:
    with pytest.raises(ValueError, match="weight is on cpu, the others on cuda:0"):
        torch.ops.trident.rms_norm(torch.ones(2, 3), torch.ones(3, device="cpu"), 1e-5, 0.0)


def test_cpu_only_operators_are_rejected_by_name() -> None:
    with pytest.raises(NotImplementedError, match="trident::attention"):
        torch.ops.trident.attention(*[torch.ones(1, 1, 2, 4)] * 3, None, 0.5)
