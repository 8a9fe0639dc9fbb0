"""Communication volume: the bytes counted by the collectives in a training step equal the formulas exactly.

The formulas are for ring algorithms: for a tensor of X bytes over n ranks, all-gather and reduce-scatter send X
(n-1)/n, all-reduce twice that. X = s b h e for activations between blocks, as in Korthikanti et al. 2022, section 4.2.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config.derived import derive
from engine.config.schema import Config
from engine.distributed.context import ParallelContext
from engine.pipeline.executor import connect
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import config, layout_of, random_batches
from tests.support.harness import run_ranks

# every tensor has a multiple of 64 * 4 elements, so that no bucket is padded
SIZES: dict[str, Any] = {
    "model_vocab_size": 64,
    "model_hidden_size": 256,
    "model_num_heads": 8,
    "model_num_kv_heads": 4,
    "model_head_dim": 32,
    "model_ffn_size": 64,
    "model_num_layers": 4,
    "train_precision": "bf16",
    "train_global_batch_size": 8,
    "train_micro_batch_size": 2,
}
ACT, MAIN = 2, 4  # bytes of bf16 activations and of float32 gradients and statistics


def measured(cfg: Config) -> list[dict[tuple[str, str], float]]:
    """The bytes that each rank sent in one step, by (axis, collective)."""

    def job(ctx: ParallelContext) -> dict[tuple[str, str], float]:
        state = setup(cfg, ctx)
        batches = random_batches(cfg, ctx, 0)
        connect(state.plan, state.stages, ctx, [b.to(ctx.device) for b in batches])  # once per run, not once per step
        ctx.world.traffic.clear()
        train_step(state, batches)
        state.wait_for_weights()
        return {key: count for key, count in ctx.world.traffic.items() if key[0] not in ("world", "tensor_parts")}

    return run_ranks(layout_of(cfg), job, dtype=torch.bfloat16)


def tensor_bytes(cfg: Config, layers: int, *, first: bool, last: bool) -> dict[tuple[str, str], float]:
    """The bytes that a rank sends over the tensor axis in one step, by (axis, collective)."""
    m, t, p = cfg.model, cfg.train, cfg.parallel
    microbatches, share = derive(cfg).first_plan.microbatches, (p.tensor - 1) / p.tensor
    x = t.seq_len * t.micro_batch_size * m.hidden_size * ACT * share  # one activation around the ring
    full = t.recompute == "full"
    statistics = 2 * 3 * t.seq_len * t.micro_batch_size * MAIN * share * last  # cross entropy: peak, sum, target
    if not p.sequence:
        passes = layers * (2 + 2 + 2 * full) + first + last
        return {("tensor", "all_reduce"): microbatches * (2 * x * passes + statistics)}
    again = not p.keep_gathered
    gathers = layers * (2 + 2 + 2 * again + 2 * full) + first + last
    scatters = layers * (2 + 2 + 2 * full) + first + last
    norms = 2 * (2 * layers + last) * m.hidden_size * MAIN * share  # gradients of norm weights, once per step
    return {
        ("tensor", "all_gather"): microbatches * gathers * x,
        ("tensor", "reduce_scatter"): microbatches * scatters * x,
        ("tensor", "all_reduce"): microbatches * statistics + norms,
    }


@pytest.mark.parametrize(
    "change",
    [
        {"parallel_sequence": False},
        {},
        {"parallel_keep_gathered": True},
        {"train_recompute": "full"},
        {"train_recompute": "selective"},
        {"parallel_sequence": False, "train_recompute": "full"},
    ],
    ids=str,
)
def test_tensor_axis(change: dict[str, Any]) -> None:
    cfg = config(4, parallel_tensor=4, **SIZES, **change)
    expected = tensor_bytes(cfg, 4, first=True, last=True)
    for sent in measured(cfg):
        assert {k: v for k, v in sent.items() if v} == expected


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(("schedule", "times"), [("1f1b", 1), ("interleaved", 2), ("zb-v", 2)])
def test_pipeline_axis(schedule: str, times: int, tensor: int) -> None:
    """One activation forward and one gradient backward for every micro-batch and boundary between ranks."""
    cfg = config(2 * tensor, parallel_pipeline=2, parallel_tensor=tensor, parallel_schedule=schedule, **SIZES)
    t = cfg.train
    x = (
        t.seq_len * t.micro_batch_size * cfg.model.hidden_size * ACT / tensor
    )  # each tensor rank sends its part of the sequence
    crossings = {"1f1b": 1, "interleaved": 3, "zb-v": 2}[schedule]
    total = sum(sent["pipeline", "send"] for sent in measured(cfg)) / tensor
    assert total == derive(cfg).first_plan.microbatches * crossings * 2 * x


@pytest.mark.parametrize(
    ("change", "collectives"),
    [
        ({"parallel_zero": 0}, {"all_reduce": 2 * MAIN}),
        ({"parallel_zero": 0, "parallel_reduce_dtype": "bf16"}, {"all_reduce": 2 * ACT}),
        ({}, {"reduce_scatter": MAIN, "all_gather": ACT}),
        ({"parallel_reduce_dtype": "bf16"}, {"reduce_scatter": ACT, "all_gather": ACT}),
    ],
    ids=str,
)
def test_data_axis(change: dict[str, Any], collectives: dict[str, int]) -> None:
    cfg = config(4, parallel_data=4, **SIZES, **change)
    m = cfg.model
    block = m.hidden_size * m.head_dim * (2 * m.num_heads + 2 * m.num_kv_heads) + 3 * m.hidden_size * m.ffn_size
    weights = m.num_layers * (block + 2 * m.hidden_size) + m.hidden_size + 2 * m.vocab_size * m.hidden_size
    for sent in measured(cfg):
        assert {k: v for k, v in sent.items() if v} == {
            ("data", name): weights * size * 3 / 4 for name, size in collectives.items()
        }
