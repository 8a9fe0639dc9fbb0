"""The state of a rank in the memory sheet, compared with hand-computed bytes per parameter."""

from __future__ import annotations

import pytest

from engine.config.derived import derive
from engine.planner.sheet import checkpoint_bytes, sheets
from tests.support.cases import config

EMBEDDING = ({"role": "embedding", "frozen": True},)


@pytest.mark.parametrize(
    ("precision", "zero", "expected"),
    [("fp32", 0, 16), ("fp32", 1, 12), ("fp64", 1, 24), ("bf16", 0, 18), ("bf16", 1, 12), ("fp16", 1, 12)],
)
def test_bytes_of_a_parameter_on_two_data_ranks(precision: str, zero: int, expected: float) -> None:
    cfg = config(2, parallel_zero=zero, train_precision=precision, parallel_bucket_mib=1000)
    (sheet,) = sheets(cfg, derive(cfg))
    count = sum(p.local_shape()[0] * (p.local_shape() + (1,))[1] for p in sheet.states.specs)
    assert sum(sheet.state.values()) / count == pytest.approx(expected, rel=0.02)  # 0.02: padding


@pytest.mark.parametrize(("precision", "bytes_each"), [("fp32", 4 * 3), ("bf16", 4 * 3), ("fp64", 8 * 3)])
def test_a_checkpoint_has_master_weights_and_two_moments_of_each_parameter(precision: str, bytes_each: int) -> None:
    cfg = config(4, parallel_pipeline=2, train_precision=precision, checkpoint_every=1)
    h, ffn, vocab, kv = 32, 48, 61, 8
    count = 2 * vocab * h + h + 4 * (2 * h + 2 * h * h + 2 * h * kv + 3 * h * ffn)
    assert checkpoint_bytes(cfg) == count * bytes_each
    found = sheets(cfg, derive(cfg))
    assert 2 * sum(sheet.checkpoint for sheet in found) == pytest.approx(count * bytes_each, rel=0.05)  # 0.05: padding
    assert all(sheet.host["staging"] == sheet.checkpoint for sheet in found)


def test_frozen_parameters_have_neither_gradients_nor_state() -> None:
    cfg, frozen = (config(1, train_precision="bf16", optimizer_groups=rows) for rows in ((), EMBEDDING))
    (whole,), (part,) = (sheets(c, derive(c)) for c in (cfg, frozen))
    size = 61 * 32
    assert whole.state["weights"] - part.state["weights"] in range(0, 64 * 2)  # no padding of a bucket
    assert whole.state["gradients"] - part.state["gradients"] == pytest.approx(4 * size, abs=4 * 64)
    assert whole.state["optimizer"] - part.state["optimizer"] == pytest.approx(8 * size, abs=8 * 64)
    assert checkpoint_bytes(cfg) - checkpoint_bytes(frozen) == size * (12 - 2)
