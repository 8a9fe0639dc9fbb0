"""Models with the shape of every family equal one process in every layout, and every model field has its effect.

All weights are redrawn, biases and norms included: with the usual initial zeros and ones, a bias that is added twice or
a norm that is skipped would not show.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.schema import Config
from engine.distributed.context import ParallelContext
from engine.distributed.sharding import cut_piece, piece_of
from engine.model.build import num_parameters, tensor_shapes
from engine.planner.flops import flops_per_token
from engine.train.state import TrainState, setup
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
from tests.support.model_shapes import SHAPES
from tests.support.numbers import named

STEPS = 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "t2": {"parallel_tensor": 2, "train_recompute": "selective"},
    "t4": {"parallel_tensor": 4, "parallel_keep_gathered": True},
    "t4-replicated": {"parallel_tensor": 4, "parallel_sequence": False, "train_recompute": "selective"},
    "p2-zb-full": {"parallel_pipeline": 2, "parallel_schedule": "zb-h1", "train_recompute": "full"},
    "d2-t2-full": {"parallel_data": 2, "parallel_tensor": 2, "train_recompute": "full"},
    "t2-p2-zb": {
        "parallel_tensor": 2,
        "parallel_pipeline": 2,
        "parallel_schedule": "zb-h1",
        "train_recompute": "selective",
    },
}


def draw(state: TrainState) -> None:
    """Redraw every canonical tensor around its usual initial value, seeded by its name."""
    with torch.no_grad():
        for p in state.params:
            for piece in p.spec.pieces(state.ctx):
                middle = 0.0 if p.spec.init_std is not None else p.spec.init_value
                whole = middle + 0.2 * named(piece.global_shape, 5, piece.name)
                piece_of(piece, p).copy_(cut_piece(piece, whole))


def run(cfg: Config) -> dict[str, Any]:
    def job(ctx: ParallelContext) -> dict[str, Any]:
        state = setup(cfg, ctx)
        draw(state)
        results = [train_step(state, random_batches(cfg, ctx, 0))]
        grads = gradients_of(state)
        results += [train_step(state, random_batches(cfg, ctx, step)) for step in range(1, STEPS)]
        return {"losses": [r.loss for r in results], "grads": grads, "weights": weights_of(state)}

    ranks = run_ranks(layout_of(cfg), job, timeout_s=120)
    merged = {key: assemble([r[key] for r in ranks]) for key in ("grads", "weights")}
    return {"losses": ranks[0]["losses"], **merged}


@cache
def reference(shape: str) -> dict[str, Any]:
    return run(config(1, model_num_layers=2, **SHAPES[shape]))


@pytest.mark.parametrize(  # heavy: others have 2 tensor ranks, selective recomputation and sequence parallelism too
    "layout", [pytest.param(name, marks=[pytest.mark.heavy] * (name == "t2")) for name in LAYOUTS]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_layout_equals_one_process(shape: str, layout: str) -> None:
    cut = LAYOUTS[layout]
    world = cut.get("parallel_tensor", 1) * cut.get("parallel_pipeline", 1) * cut.get("parallel_data", 1)
    one, many = reference(shape), run(config(world, model_num_layers=2, **SHAPES[shape], **cut))
    assert many["losses"] == pytest.approx(one["losses"], rel=1e-11)
    if shape == "gpt2":  # without a rotation a key's bias adds the same to all scores of a query: its gradient is 0
        biases = [found["grads"].pop(name) for found in (many, one) for name in [*found["grads"]] if "k.bias" in name]
        assert all(np.abs(grad).max() < 1e-15 for grad in biases)
        many["weights"] = {
            name: x if "k.bias" not in name else one["weights"][name] for name, x in many["weights"].items()
        }
    assert max_relative_error(many["grads"], one["grads"]) < 1e-11
    assert max_relative_error(many["weights"], one["weights"]) < 1e-9
    assert all(np.abs(grad).max() > 1e-8 for grad in one["grads"].values())


@pytest.mark.parametrize("field", ["scale_embeddings", "parallel_residual", "qkv_bias", "mlp_bias"])
def test_every_model_field_changes_the_loss(field: str) -> None:
    """A field that is parsed and ignored would pass every comparison above."""
    losses = [run(config(1, model_num_layers=2, **{f"model_{field}": on}))["losses"][0] for on in (False, True)]
    assert abs(losses[1] / losses[0] - 1) > 1e-6


def test_a_norm_offset_of_one_equals_weights_larger_by_one() -> None:
    """`draw` centres the weights at their initial value, 0 or 1, so the two models are equal."""
    one, other = (run(config(1, model_num_layers=2, model_norm_offset=on)) for on in (False, True))
    assert other["losses"] == pytest.approx(one["losses"], rel=1e-11)
    assert max_relative_error(other["grads"], one["grads"]) < 1e-11


def test_counts_follow_the_model_fields() -> None:
    gated, plain = (config(1, model_gated_mlp=on).model for on in (True, False))
    matrix = gated.num_layers * gated.hidden_size * gated.ffn_size
    assert num_parameters(gated) - num_parameters(plain) == matrix
    assert flops_per_token(gated, 16) - flops_per_token(plain, 16) == 6 * matrix
    shapes = tensor_shapes(config(1, **SHAPES["gpt2"]).model)
    assert shapes["positions.weight"] == (64, 32) and shapes["layers.0.attention.k.bias"] == (32,)
    assert shapes["norm.bias"] == (32,) and "layers.0.mlp.gate.weight" not in shapes
    assert tensor_shapes(config(1, **SHAPES["olmo2"]).model)["layers.0.attention.k_norm.weight"] == (2 * 4,)
