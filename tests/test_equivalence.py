"""Every layout equals one process: loss, gradient norm and every gradient at step 1, weights after 20 steps."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from cases import assemble, config, layout_of, pieces_of, random_batches, worst
from harness import run_ranks

from engine.config import Config
from engine.context import ParallelContext
from engine.train import setup, train_step

STEPS = 20


def trajectory(ctx: ParallelContext, cfg: Config, steps: int = STEPS) -> dict[str, Any]:
    """Train on random batches; what step 1 gave, the gradients it summed up, and the weights at the end."""
    state = setup(cfg, ctx)
    init = pieces_of(((p, p) for p in state.params), ctx)
    results, grads = [], []
    for step in range(steps):
        results.append(train_step(state, random_batches(cfg, ctx, step)))
        if step == 0:
            # clipping scaled the gradients in place: undo it, the norm is known
            factor = max(1.0, results[0].norms.norm / cfg.optimizer.clip_norm)
            grads = pieces_of(((p, p.main_grad * factor) for p in state.params), ctx)
    return {
        "losses": [r.loss for r in results],
        "norms": [r.norms.norm for r in results],
        "init": init,
        "grads": grads,
        "weights": pieces_of(((p, p) for p in state.params), ctx),
    }


def run(cfg: Config, steps: int = STEPS) -> dict[str, Any]:
    ranks = run_ranks(layout_of(cfg), lambda ctx: trajectory(ctx, cfg, steps), num_kv_heads=cfg.model.num_kv_heads)
    for other in ranks[1:]:
        assert other["losses"] == ranks[0]["losses"] and other["norms"] == ranks[0]["norms"]
    merged = {key: assemble([r[key] for r in ranks]) for key in ("init", "grads", "weights")}
    return {"losses": ranks[0]["losses"], "norms": ranks[0]["norms"], **merged}


@cache
def reference(**overrides: Any) -> dict[str, Any]:
    return run(config(1, **overrides))


GQA = {}
MHA = {"model_num_kv_heads": 8}
TIED = {"model_tie_embeddings": True}
QK_NORM = {"model_qk_norm": True}
MODELS = {"gqa": GQA, "mha": MHA, "tied": TIED, "qk_norm": QK_NORM, "tied_qk": TIED | QK_NORM}

# tensor, pipeline, data, schedule, micro-batch size
LAYOUTS = [
    (1, 1, 1, "gpipe", 2),
    (2, 1, 1, "1f1b", 2),
    (1, 2, 1, "1f1b", 1),
    (1, 2, 1, "gpipe", 2),
    (1, 1, 2, "1f1b", 2),
    (4, 1, 1, "1f1b", 4),
    (1, 4, 1, "1f1b", 1),
    (1, 4, 1, "gpipe", 4),
    (1, 1, 4, "gpipe", 1),
    (2, 2, 1, "1f1b", 2),
    (2, 2, 1, "gpipe", 1),
    (2, 1, 2, "1f1b", 1),
    (1, 2, 2, "1f1b", 1),
    (1, 2, 2, "gpipe", 2),
]
EIGHT = [(2, 2, 2, "1f1b", 1), (1, 4, 2, "gpipe", 2), (4, 2, 1, "1f1b", 2), (8, 1, 1, "1f1b", 4), (2, 4, 1, "1f1b", 1)]


def check_layout(model: dict[str, Any], layout: tuple[int, int, int, str, int]) -> None:
    tensor, pipeline, data, schedule, micro_batch_size = layout
    model = model | {"model_num_layers": max(2, pipeline)}
    cfg = config(
        tensor * pipeline * data,
        parallel_tensor=tensor,
        parallel_pipeline=pipeline,
        parallel_data=data,
        parallel_schedule=schedule,
        train_micro_batch_size=micro_batch_size,
        **model,
    )
    one, many = reference(**model), run(cfg)
    assert worst(many["init"], one["init"]) == 0
    assert many["losses"][0] == pytest.approx(one["losses"][0], rel=1e-11)
    assert many["norms"][0] == pytest.approx(one["norms"][0], rel=1e-11)
    assert worst(many["grads"], one["grads"]) < 1e-11
    assert worst(many["weights"], one["weights"]) < 1e-9


def matrix() -> list[Any]:
    """Every layout with every model; each layout meets two models in the quick set, all of them in `make test-all`."""
    names = list(MODELS)
    cases = []
    for i, layout in enumerate(LAYOUTS):
        for j, name in enumerate(names):
            quick = j in (i % len(names), (i + 2) % len(names))
            cases.append(pytest.param(name, layout, id=f"{name}-{layout}", marks=[] if quick else pytest.mark.heavy))
    for i, layout in enumerate(EIGHT):
        marks = [] if i in (0, 1) else pytest.mark.heavy
        cases.append(pytest.param(names[i], layout, id=f"{names[i]}-{layout}", marks=marks))
    return cases


@pytest.mark.parametrize(("model", "layout"), matrix())
def test_layout_equals_one_process(model: str, layout: tuple[int, int, int, str, int]) -> None:
    check_layout(MODELS[model], layout)
