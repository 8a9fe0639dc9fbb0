"""The memory estimate from the config equals the memory of a run's state."""

from __future__ import annotations

import pytest

from engine.distributed.context import ParallelContext
from engine.optim.groups import ParameterGroup
from engine.optim.precision import PRECISIONS
from engine.planner.memory import bytes_per_parameter
from engine.train.state import setup
from tests.support.cases import config, layout_of
from tests.support.harness import run_ranks

GROUP = ParameterGroup(0, "adamw", 1.0, 0.0)


@pytest.mark.parametrize(
    ("precision", "zero", "expected"),
    [("fp32", 0, 16), ("fp32", 1, 12), ("fp64", 1, 24), ("bf16", 0, 18), ("bf16", 1, 12), ("fp16", 1, 12)],
)
def test_bytes_of_a_parameter_on_two_data_ranks(precision: str, zero: int, expected: float) -> None:
    cfg = config(2, parallel_zero=zero, train_precision=precision)
    assert bytes_per_parameter(cfg, 2, GROUP) == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_equals_the_state_of_a_run(precision: str) -> None:
    """Weights and gradients of one of two data ranks, and its half of moments and master weights, up to padding."""
    cfg = config(2, train_precision=precision, parallel_bucket_mib=1000)

    def job(ctx: ParallelContext) -> tuple[int, int]:
        state = setup(cfg, ctx)
        tensors = [*state.params, *(p.main_grad for p in state.params)]
        tensors += [shard.flat for shard in state.optimizer.states(owned=True)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        return sum(p.numel() for p in state.params), sum(storages.values())

    dtype = PRECISIONS[precision].compute
    ranks = run_ranks(layout_of(cfg), job, dtype=dtype)
    count, total = ranks[0][0], sum(size for _, size in ranks)
    assert total / 2 / count == pytest.approx(bytes_per_parameter(cfg, 2, GROUP), rel=0.02)
