"""Every layout equals one process: loss, gradient norm and every gradient at step 1, weights after 20 steps."""

from __future__ import annotations

import random
import sys
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from cases import assemble, config, gradients_of, layout_of, random_batches, weights_of, worst
from harness import run_ranks

from engine.config import Config
from engine.context import ParallelContext
from engine.train import setup, train_step

STEPS = 20


def trajectory(ctx: ParallelContext, cfg: Config, steps: int = STEPS) -> dict[str, Any]:
    """Train on random batches; what step 1 gave, the gradients it summed up, and the weights at the end."""
    state = setup(cfg, ctx)
    init = weights_of(state)
    results, grads = [], []
    for step in range(steps):
        results.append(train_step(state, random_batches(cfg, ctx, step)))
        if step == 0:
            # clipping scaled the gradients in place: undo it, the norm is known
            grads = gradients_of(state, max(1.0, results[0].norms.norm / cfg.optimizer.clip_norm))
    return {
        "losses": [r.loss for r in results],
        "norms": [r.norms.norm for r in results],
        "init": init,
        "grads": grads,
        "weights": weights_of(state),
    }


def run(cfg: Config, steps: int = STEPS) -> dict[str, Any]:
    ranks = run_ranks(
        layout_of(cfg), lambda ctx: trajectory(ctx, cfg, steps), num_kv_heads=cfg.model.num_kv_heads, timeout_s=240
    )
    for other in ranks[1:]:
        assert other["losses"] == ranks[0]["losses"] and other["norms"] == ranks[0]["norms"]
    merged = {key: assemble([r[key] for r in ranks]) for key in ("init", "grads", "weights")}
    return {"losses": ranks[0]["losses"], "norms": ranks[0]["norms"], **merged}


@cache
def reference(**overrides: Any) -> dict[str, Any]:
    return run(config(1, **overrides))


MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"model_num_kv_heads": 8},
    "tied": {"model_tie_embeddings": True},
    "qk_norm": {"model_qk_norm": True},
    "tied_qk": {"model_tie_embeddings": True, "model_qk_norm": True},
}

# What a layout chooses from. The cases below are drawn so that every two values of two factors that can meet do.
FACTORS: dict[str, tuple[Any, ...]] = {
    "tensor": (1, 2, 4),
    "pipeline": (1, 2, 4),
    "data": (1, 2, 4),
    "schedule": ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v"),
    "sequence": (True, False),
    "keep_gathered": (False, True),
    "zero": (1, 0),
    "recompute": ("none", "selective", "full"),
    "micro_batch_size": (1, 2),
    "model": tuple(MODELS),
}
Case = dict[str, Any]


def possible(case: Case, most: int) -> bool:
    """Whether the config takes it, and `most` processes are enough."""
    kept = case["keep_gathered"] and (not case["sequence"] or case["tensor"] == 1 or case["recompute"] == "selective")
    return not kept and case["tensor"] * case["pipeline"] * case["data"] <= most


def pairs(case: Case) -> set[tuple[Any, ...]]:
    return {(a, case[a], b, case[b]) for a, b in combinations(FACTORS, 2)}


def covering() -> list[Case]:
    """Cases in which every pair of values occurs that can: each the best of many drawn at random, always the same.

    First the pairs that four processes can show, then the rest on eight.
    """
    rng = random.Random(3)
    drawn = [{name: rng.choice(values) for name, values in FACTORS.items()} for _ in range(6_000)]
    found: list[Case] = []
    for most in (4, 8):
        pool = [(pairs(case), case) for case in drawn if possible(case, most)]
        missing = set().union(*(met for met, _ in pool)).difference(*map(pairs, found))
        while missing:
            met, case = max(pool, key=lambda entry: len(entry[0] & missing))
            found.append(case)
            missing -= met
    return found


def batch_of(case: Case) -> int:
    return max(4, case["data"] * case["micro_batch_size"])


def config_of(case: Case) -> Config:
    stages = case["pipeline"] * (1 if case["schedule"] in ("gpipe", "1f1b", "zb-h1") else 2)
    return config(
        case["tensor"] * case["pipeline"] * case["data"],
        train_micro_batch_size=case["micro_batch_size"],
        train_recompute=case["recompute"],
        model_num_layers=max(2, stages),
        train_global_batch_size=batch_of(case),
        **{f"parallel_{name}": case[name] for name in list(FACTORS)[:7]},
        **MODELS[case["model"]],
    )


def figures(case: Case) -> dict[str, float]:
    """The worst relative difference to one process of each thing that must not differ."""
    cfg = config_of(case)
    model = MODELS[case["model"]]
    one = reference(**model, model_num_layers=cfg.model.num_layers, train_global_batch_size=batch_of(case))
    many = run(cfg)
    return {
        "init": worst(many["init"], one["init"]),
        "loss": abs(many["losses"][0] / one["losses"][0] - 1),
        "norm": abs(many["norms"][0] / one["norms"][0] - 1),
        "gradients": worst(many["grads"], one["grads"]),
        "weights": worst(many["weights"], one["weights"]),
    }


def quick(case: Case) -> bool:
    """Whether `make test` runs it too, not only `make test-all`: the first, which show most pairs, and one of 8."""
    eight = [c for c in CASES if c["tensor"] * c["pipeline"] * c["data"] == 8]
    return case in CASES[:15] or case == eight[0]


LIMITS = {"init": 0.0, "loss": 1e-11, "norm": 1e-11, "gradients": 1e-11, "weights": 1e-9}
CASES = covering()


def name_of(case: Case) -> str:
    degrees = "x".join(str(case[name]) for name in ("tensor", "pipeline", "data"))
    flags = [name for name in ("sequence", "keep_gathered", "zero") if case[name] and case[name] is not False]
    return "-".join(
        [degrees, case["schedule"], *flags, case["recompute"], f"b{case['micro_batch_size']}", case["model"]]
    )


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=name_of(c), marks=[] if quick(c) else pytest.mark.heavy) for c in CASES],
)
def test_layout_equals_one_process(case: Case) -> None:
    found = figures(case)
    print({name: f"{value:.1e}" for name, value in found.items()})
    assert all(found[name] <= limit for name, limit in LIMITS.items()), found


SPECIAL = [
    {"parallel_tensor": 8, "train_micro_batch_size": 4, "model_num_layers": 2},  # two KV heads on eight ranks
    {"parallel_pipeline": 2, "parallel_layers": "3,1", "model_num_layers": 4},  # uneven stages
    {"parallel_pipeline": 2, "parallel_chunks": 3, "parallel_schedule": "interleaved", "model_num_layers": 6},
    {"parallel_pipeline": 2, "parallel_layers": "0,2,2,0", "parallel_schedule": "zb-v", "model_num_layers": 4},
    {"parallel_pipeline": 1, "parallel_schedule": "zb-v", "model_num_layers": 2, "model_tie_embeddings": True},
    {"train_recompute": "full", "train_recompute_layers": 1, "parallel_pipeline": 2, "model_num_layers": 4},
]


@pytest.mark.parametrize("overrides", SPECIAL, ids=str)
def test_special_layouts_equal_one_process(overrides: dict[str, Any]) -> None:
    world = overrides.get("parallel_tensor", 1) * overrides.get("parallel_pipeline", 1)
    model = {name: value for name, value in overrides.items() if name.startswith("model_")}
    one, many = reference(**model), run(config(world, **overrides))
    assert many["losses"][0] == pytest.approx(one["losses"][0], rel=1e-11)
    assert worst(many["grads"], one["grads"]) < 1e-11
    assert worst(many["weights"], one["weights"]) < 1e-9


def write_table(path: Path) -> None:
    """docs/equivalence.md: the figures of every case, as measured here and now."""
    lines = [
        "# Equivalence",
        "",
        "Layouts that cover every pair of values of degree, schedule, sequence parallelism, ZeRO-1, recomputation,",
        "micro-batch size and model, each beside one process, in float64. Written by",
        "",
        "    python tests/test_equivalence.py docs/equivalence.md",
        "",
        "The figures are the largest relative differences: loss and gradient norm of step 1, every gradient of step 1",
        "relative to the largest value of its tensor, all weights after 20 steps. Initial weights are the same bits.",
        "Limits of the test: 1e-11, 1e-11, 1e-11, 1e-9. `make test` runs a part of the cases, `make test-all` all.",
        "",
        "| tensor x pipeline x data | schedule | options | model | loss | norm | gradients | weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    worst_of = dict.fromkeys(LIMITS, 0.0)
    for number, case in enumerate(CASES):
        found = figures(case)
        assert found["init"] == 0
        worst_of = {name: max(value, worst_of[name]) for name, value in found.items()}
        degrees = " x ".join(str(case[name]) for name in ("tensor", "pipeline", "data"))
        options = [name for name, of in MATTERS.items() if case[name] and case[of] > 1]
        options += [f"recompute {case['recompute']}"] * (case["recompute"] != "none")
        texts = [degrees, case["schedule"], ", ".join([*options, f"micro-batch {case['micro_batch_size']}"])]
        lines.append(_row([*texts, case["model"]], found))
        print(f"{number + 1}/{len(CASES)} {lines[-1]}", flush=True)
    lines.append(_row(["the worst", "", "", ""], worst_of))
    path.write_text("\n".join(lines) + "\n")


# option -> the degree without which it has no effect
MATTERS = {"sequence": "tensor", "keep_gathered": "tensor", "zero": "data"}


def _row(texts: list[str], found: dict[str, float]) -> str:
    numbers = [f"{found[name]:.1e}" for name in ("loss", "norm", "gradients", "weights")]
    return f"| {' | '.join([*texts, *numbers])} |"


if __name__ == "__main__":
    write_table(Path(sys.argv[1]))
