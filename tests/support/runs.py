"""Runs a config on the ranks of its layout, and collects losses, norms, gradients and weights of the whole model."""

from __future__ import annotations

from typing import Any

import torch

from engine.config.schema import Config
from engine.distributed.context import ParallelContext
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import assemble, gradients_of, layout_of, random_batches, weights_of
from tests.support.harness import run_ranks

STEPS = 20

# A small model, for two ranks and a few steps.
TINY: dict[str, Any] = {"model_num_layers": 2, "model_hidden_size": 16, "model_num_heads": 4, "model_ffn_size": 24}
TINY |= {"train_seq_len": 8, "optimizer_clip_norm": 0.05, "model_tie_embeddings": True, "model_qk_norm": True}


def trajectory(ctx: ParallelContext, cfg: Config, steps: int = STEPS) -> dict[str, Any]:
    """Train on random batches: losses, z-losses, norms of all steps, gradients of step 1, initial and final weights."""
    state = setup(cfg, ctx)
    init = weights_of(state)
    results, grads = [], []
    for step in range(steps):
        results.append(train_step(state, random_batches(cfg, ctx, step)))
        if step == 0:
            grads = gradients_of(state)
    return {
        "losses": [r.loss for r in results],
        "z_losses": [r.sums.get("z_loss", 0.0) for r in results],
        "norms": [r.norms.norm for r in results],
        "init": init,
        "grads": grads,
        "weights": weights_of(state),
    }


def run(cfg: Config, steps: int = STEPS, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    ranks = run_ranks(
        layout_of(cfg),
        lambda ctx: trajectory(ctx, cfg, steps),
        timeout_s=240,
        dtype=dtype,
        transport=cfg.parallel.transport,
    )
    for other in ranks[1:]:
        assert all(other[key] == ranks[0][key] for key in ("losses", "z_losses", "norms"))
    merged = {key: assemble([r[key] for r in ranks]) for key in ("init", "grads", "weights")}
    return ranks[0] | merged
