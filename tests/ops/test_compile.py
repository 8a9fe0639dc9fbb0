"""train.compile: training with compiled functions equals training without, in every kind of run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config.phases import phases_of
from engine.config.schema import Config
from engine.distributed.collectives import all_reduce_
from engine.distributed.context import ParallelContext, make_context
from engine.monitor.progress import Progress
from engine.ops.activation import activation
from engine.ops.compile import compiled
from engine.pipeline.executor import execute
from engine.pipeline.schedules import forward_only
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import (
    assemble,
    config,
    gradients_of,
    layout_of,
    max_relative_error,
    random_batches,
    weights_of,
)
from tests.support.harness import run_ranks


def trained(cfg: Config) -> tuple[list[float], dict[str, Any], dict[str, Any]]:
    """(losses of two steps and of a validation, gradients of the second step, weights)."""

    def job(ctx: ParallelContext) -> Any:
        state = setup(cfg, ctx)
        found = [train_step(state, random_batches(cfg, ctx, step)).loss for step in range(2)]
        grads, batches = gradients_of(state), random_batches(cfg, ctx, 2)
        scored = execute(forward_only(state.plan, len(batches)), state.stages, ctx, batches).losses
        return [*found, float(all_reduce_(scored.sum(), ctx.world))], grads, weights_of(state)

    ranks = run_ranks(layout_of(cfg), job, timeout_s=400)
    return ranks[0][0], assemble([r[1] for r in ranks]), assemble([r[2] for r in ranks])


@pytest.mark.parametrize(
    "layout",
    [
        {},
        pytest.param({"model_qk_norm": True, "train_recompute": "selective"}, marks=pytest.mark.heavy),
        pytest.param({"parallel_tensor": 2, "train_recompute": "selective"}, marks=pytest.mark.heavy),
        pytest.param(
            {"parallel_pipeline": 2, "parallel_schedule": "zb-h1", "train_recompute": "full"}, marks=pytest.mark.heavy
        ),
        pytest.param({"parallel_pipeline": 2, "parallel_schedule": "dualpipe-v"}, marks=pytest.mark.heavy),
        pytest.param(
            {"parallel_data": 2, "model_norm": "layernorm", "model_activation": "gelu", "model_qk_norm": True},
            marks=pytest.mark.heavy,
        ),
        pytest.param(
            {
                "parallel_tensor": 2,
                "parallel_sequence": False,
                "model_norm_position": "post",
                "model_norm_offset": True,
            },
            marks=pytest.mark.heavy,
        ),
    ],
    ids=str,
)
@pytest.mark.timeout(600)
def test_equal_to_uncompiled(layout: dict[str, Any]) -> None:
    world = 2 if any(name.startswith("parallel") for name in layout) else 1
    losses, grads, weights = trained(config(world, **layout))
    other = trained(config(world, train_compile=True, **layout))
    assert other[0] == pytest.approx(losses, rel=1e-12)
    assert max_relative_error(other[1], grads) < 1e-10 and max_relative_error(other[2], weights) < 1e-10


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_rounding_to_fp8_compiled() -> None:
    """Compiled amax and rounding give the same numbers up to one rounding of bf16."""
    small = {"train_precision": "bf16", "model_head_dim": 16, "model_ffn_size": 64, "train_fp8": "tensorwise"}
    losses = []
    for compile in (False, True):
        cfg = config(1, train_compile=compile, **small)

        def job(ctx: ParallelContext, cfg: Config = cfg) -> float:
            return train_step(setup(cfg, ctx), random_batches(cfg, ctx, 1)).loss

        losses += run_ranks(layout_of(cfg), job, dtype=torch.bfloat16, timeout_s=400)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_graph_break_is_an_error() -> None:
    def asks_for_a_value(x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x

    with pytest.raises(Exception, match=r"(?i)data-dependent"):
        compiled(asks_for_a_value)(torch.ones(3))
    assert compiled(activation) is compiled(activation)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ""),
        ({"train_compile": True}, "; between matmuls: torch.compile"),
        (
            {"train_compile": True, "train_precision": "bf16", "train_fp8": "rowwise", "model_ffn_size": 64}
            | {"model_head_dim": 16},
            "; matmuls of blocks: fp8 rowwise; between matmuls: torch.compile",
        ),
    ],
    ids=["plain", "compile", "fp8"],
)
def test_a_run_prints_its_compute_backends(
    changes: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(1, **changes)
    ctx = make_context(layout_of(cfg), 0, dtype=torch.float64)
    Progress(cfg, ctx, phases_of(cfg)).start(phases_of(cfg), "", 1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " kernels: " in line]
    assert line.partition("attention: ")[2].partition(";")[0] in ("own", "sdpa") and line.endswith(expected or "sdpa")
