"""Every layout equals one process: loss, gradient norm and every gradient at step 1, weights after 20 steps."""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engine.parallel.gradients as gradients_module
from engine.batch import Documents, Sequence
from engine.config.phases import model_of as model_in
from engine.config.phases import phases_of
from engine.config.schema import Config
from engine.distributed.collectives import all_gather_into_start, all_reduce_start, reduce_scatter_start
from engine.distributed.context import Axis, ParallelContext, make_context
from engine.distributed.layout import Layout
from engine.ops import native
from engine.optim.lr import learning_rate
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
from tests.support.plain_model import plain_loss, plain_z
from tests.support.runs import TINY, run


@cache
def reference(groups: str = "none", **overrides: Any) -> dict[str, Any]:
    return run(config(1, **overrides, optimizer_groups=GROUPS[groups]))


# optimizer.groups. "frozen": a stage with nothing to train gets no gradient.
GROUPS: dict[str, tuple[dict[str, Any], ...]] = {
    "none": (),
    "mixed": (
        {"names": "layers.1.attention.*", "frozen": "true"},
        {"names": "layers.0.*", "role": "matrix", "lr_factor": 0.5, "weight_decay": 0.0},
        {"role": "embedding", "weight_decay": 0.0},
        {"role": "vector", "lr_factor": 2.0},
    ),
    "frozen": ({"names": "embed.weight layers.0.*", "frozen": "true"},),
}


MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha_parallel": {"model_num_kv_heads": 8, "model_parallel_residual": True},
    "tied": {"model_tie_embeddings": True},
    "qk_norm_post": {"model_qk_norm": True, "model_norm_position": "post"},
    "sandwich": {"model_norm_position": "sandwich"},
    "tied_qk": {"model_tie_embeddings": True, "model_qk_norm": True},
}

# The options of a layout. The cases below cover every possible pair of values of two different options.
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
    "window": (0, 5),
    "documents": (False, True),
    "phases": ("none", "ramp"),
    "dropout": (0.0, 0.2),
    "z_loss": (0.0, 0.03),
    "model": tuple(MODELS),
    "groups": tuple(GROUPS),
}
Case = dict[str, Any]


def is_possible(case: Case, most: int) -> bool:
    """Whether the config is valid and needs at most `most` processes."""
    invalid = case["keep_gathered"] and (
        not case["sequence"] or case["tensor"] == 1 or case["recompute"] == "selective"
    )
    return not invalid and case["tensor"] * case["pipeline"] * case["data"] <= most


def pairs(case: Case) -> set[tuple[Any, ...]]:
    return {(a, case[a], b, case[b]) for a, b in combinations(FACTORS, 2)}


def covering_cases() -> list[Case]:
    """A covering array: cases in which every possible pair of values occurs.

    Greedy: each case is the best of a fixed random sample. First the pairs that fit four processes, then those that
    need eight.
    """
    rng = random.Random(3)
    drawn = [{name: rng.choice(values) for name, values in FACTORS.items()} for _ in range(6_000)]
    found: list[Case] = []
    for most in (4, 8):
        pool = [(pairs(case), case) for case in drawn if is_possible(case, most)]
        missing = set().union(*(covered for covered, _ in pool)).difference(*map(pairs, found))
        while missing:
            covered, case = max(pool, key=lambda entry: len(entry[0] & missing))
            found.append(case)
            missing -= covered
    return found


def batch_of(case: Case) -> int:
    return max(4, case["data"] * case["micro_batch_size"])


def ramp_of(case: Case) -> dict[str, Any]:
    """Phases with twice the batch, then with twice the micro-batch."""
    if case["phases"] == "none":
        return {}
    larger = {"phase_1_from_step": 3, "phase_1_global_batch_size": 2 * batch_of(case)}
    return larger | {"phase_2_from_step": 7, "phase_2_micro_batch_size": 2 * case["micro_batch_size"]}


def config_of(case: Case) -> Config:
    stages = case["pipeline"] * (1 if case["schedule"] in ("gpipe", "1f1b", "zb-h1") else 2)
    return config(
        case["tensor"] * case["pipeline"] * case["data"],
        train_micro_batch_size=case["micro_batch_size"],
        train_recompute=case["recompute"],
        model_num_layers=max(2, stages),
        train_global_batch_size=batch_of(case),
        **{f"parallel_{name}": case[name] for name in list(FACTORS)[:7]},
        optimizer_groups=GROUPS[case["groups"]],
        **ramp_of(case),
        **model_of(case),
        **dropout_of(case["dropout"]),
    )


def dropout_of(p: float) -> dict[str, float]:
    return {"train_dropout": p, "train_attention_dropout": p / 2} if p else {}


def model_of(case: Case) -> dict[str, Any]:
    """Options of model, data and objective. Every second layer of a case with a window has it."""
    window = {"model_window": case["window"], "model_window_layers": "wf"} if case["window"] else {}
    window |= {"data_separate_documents": True} if case["documents"] else {}
    return MODELS[case["model"]] | window | ({"train_z_loss": case["z_loss"]} if case["z_loss"] else {})


def figures(case: Case) -> dict[str, float]:
    """The largest relative difference to one process: initial weights, loss, norm, gradients, final weights."""
    cfg = config_of(case)
    options = model_of(case) | dropout_of(case["dropout"]) | {"model_num_layers": cfg.model.num_layers}
    one = reference(case["groups"], **options, train_global_batch_size=batch_of(case), **ramp_of(case))
    many = run(cfg)
    return {
        "init": max_relative_error(many["init"], one["init"]),
        "loss": abs(many["losses"][0] / one["losses"][0] - 1),
        "z_loss": abs(many["z_losses"][0] / one["z_losses"][0] - 1) if case["z_loss"] else 0.0,
        "norm": abs(many["norms"][0] / one["norms"][0] - 1),
        "gradients": max_relative_error(many["grads"], one["grads"]),
        "weights": max_relative_error(many["weights"], one["weights"]),
    }


def is_quick(case: Case) -> bool:
    """Whether `make test` runs the case, not only `make test-all`: the first, with most pairs, and one on 8 ranks."""
    eight = [c for c in CASES if c["tensor"] * c["pipeline"] * c["data"] == 8]
    return case in CASES[:10] or case == eight[0]


LIMITS = {"init": 0.0, "loss": 1e-11, "z_loss": 1e-11, "norm": 1e-11, "gradients": 1e-11, "weights": 1e-9}
CASES = covering_cases()


def name_of(case: Case) -> str:
    degrees = "x".join(str(case[name]) for name in ("tensor", "pipeline", "data"))
    flags = [name for name in ("sequence", "keep_gathered", "zero") if case[name] and case[name] is not False]
    return "-".join(
        [
            degrees,
            case["schedule"],
            *flags,
            case["recompute"],
            f"b{case['micro_batch_size']}",
            *(name for name in ("window", "documents", "dropout") if case[name]),
            *(["ramp"] if case["phases"] == "ramp" else []),
            *(["z"] if case["z_loss"] else []),
            case["model"],
            *([f"groups-{case['groups']}"] if case["groups"] != "none" else []),
        ]
    )


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=name_of(c), marks=[] if is_quick(c) else pytest.mark.heavy) for c in CASES],
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
    {"parallel_data": 4, "parallel_transport": "gloo", "model_num_layers": 2},  # gloo's ring adds in another order
]


@pytest.mark.parametrize("overrides", SPECIAL, ids=str)
def test_special_layouts_equal_one_process(overrides: dict[str, Any]) -> None:
    world = math.prod(overrides.get(f"parallel_{axis}", 1) for axis in ("tensor", "pipeline", "data"))
    model = {name: value for name, value in overrides.items() if name.startswith("model_")}
    one, many = reference(**model), run(config(world, **overrides))
    assert many["losses"][0] == pytest.approx(one["losses"][0], rel=1e-11)
    assert max_relative_error(many["grads"], one["grads"]) < 1e-11
    assert max_relative_error(many["weights"], one["weights"]) < 1e-9


# -- two ranks and two steps: one small case per way of sharding, fast enough for proofs/mutations ---------------------

SMALL: dict[str, dict[str, Any]] = {
    "sequence": {"parallel_tensor": 2, "model_num_kv_heads": 1, "train_z_loss": 0.1},
    "replicated": {
        "parallel_tensor": 2,
        "model_num_kv_heads": 1,
        "parallel_sequence": False,
        "train_recompute": "full",
        "train_z_loss": 0.1,
    },
    "pipeline": {"parallel_pipeline": 2, "train_z_loss": 0.1},
    "split": {"parallel_pipeline": 2, "parallel_schedule": "zb-h1", "train_recompute": "full"},
    "interleaved": {"parallel_pipeline": 2, "parallel_schedule": "interleaved", "model_num_layers": 4},
    "zero": {"parallel_data": 2},
    "data": {"parallel_data": 2, "parallel_zero": 0, "parallel_overlap": False, "train_z_loss": 0.1},
    "dropout": {"parallel_tensor": 2, "train_recompute": "full"} | dropout_of(0.3),
    "dropout_data": {"parallel_data": 2} | dropout_of(0.3),
}


@pytest.mark.parametrize("name", SMALL)
def test_two_ranks_equal_one_over_gloo(name: str) -> None:
    """Other tests use shared memory if it is built."""
    test_two_ranks_equal_one(name, parallel_transport="gloo")


@pytest.mark.parametrize("name", SMALL)
def test_two_ranks_equal_one(name: str, **more: Any) -> None:
    options = TINY | SMALL[name] | more
    model = {key: x for key, x in options.items() if not key.startswith("parallel") and key != "train_recompute"}
    one, many = run(config(1, **model), 2), run(config(2, **options), 2)
    assert max_relative_error(many["init"], one["init"]) == 0
    assert many["losses"] == pytest.approx(one["losses"], rel=1e-11)
    assert many["z_losses"] == pytest.approx(one["z_losses"], rel=1e-11)
    assert many["norms"] == pytest.approx(one["norms"], rel=1e-11)
    assert max_relative_error(many["grads"], one["grads"]) < 1e-11
    assert max_relative_error(many["weights"], one["weights"]) < 1e-9


@pytest.mark.skipif(native.load()[0] is None or not native.load()[0].attention_runs(), reason="needs AVX2")
@pytest.mark.parametrize(("norm", "dropout"), [("rmsnorm", 0.0), ("layernorm", 0.0), ("rmsnorm", 0.3)])
def test_custom_float32_kernels_in_a_layout(norm: str, dropout: float) -> None:
    """The custom GEMM and attention exist in float32 only: two steps on one and two ranks, compared with float64.

    float32 has a precision of 6e-8, and about thirty sums of up to 320 terms follow one another: 5e-6 of a tensor's
    largest gradient. A missing sum, a swapped half or an extra head causes errors of 1e-2 and more.
    """
    sizes: dict[str, Any] = {
        "train_seq_len": 80,
        "model_max_seq_len": 80,
        "model_hidden_size": 64,
        "model_ffn_size": 96,
        "model_norm": norm,
        **dropout_of(dropout),
    }
    exact = run(config(1, **sizes), 2)
    with native.forced(gemm=True):
        single = {**sizes, "train_precision": "fp32"}
        one = run(config(1, **single), 2, torch.float32)
        many = run(config(2, **single, parallel_tensor=2), 2, torch.float32)
    for found in (one, many):
        assert found["losses"] == pytest.approx(exact["losses"], rel=1e-6)
        assert 1e-8 < max_relative_error(found["grads"], exact["grads"]) < 5e-6


def test_a_step_does_not_modify_its_batches() -> None:
    """A batch whose weights are modified in a forward would be a different batch when it is used again."""
    cfg = config(1, **TINY)

    def job(ctx: ParallelContext) -> bool:
        batches, again = random_batches(cfg, ctx, 0), random_batches(cfg, ctx, 0)
        train_step(setup(cfg, ctx), batches)
        values = [[*vars(batch).values(), batch.sequence.positions] for batch in (*batches, *again)]
        pairs = [pair for a, b in zip(values, values[len(batches) :]) for pair in zip(a, b)]
        return all(torch.equal(x, y) for x, y in pairs if isinstance(x, torch.Tensor))

    assert run_ranks(layout_of(cfg), job) == [True]


class SlowCollective:
    """A collective on an infinitely slow network: nothing is transferred before `wait`."""

    def __init__(self, start: Any, x: torch.Tensor, axis: Axis):
        self.start, self.x, self.axis = start, x, axis
        new_tensor = start is reduce_scatter_start  # its result is a new tensor, not yet written
        self.value = x.new_full((len(x) // axis.size,), torch.nan) if new_tensor else x

    def wait(self) -> torch.Tensor:
        return self.start(self.x, self.axis).wait()


@pytest.mark.parametrize("bucket_mib", [0.01, 1e-5])  # 1e-5: a bucket for each parameter
@pytest.mark.parametrize("zero", [1, 0])
def test_pending_collectives_are_waited_for(zero: int, bucket_mib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum or all-gather without a `wait` may finish in time on an idle machine; here it never does."""
    cfg = config(2, **TINY, parallel_data=2, parallel_zero=zero, parallel_bucket_mib=bucket_mib)
    expected = run(cfg, 3)
    for start in (all_gather_into_start, all_reduce_start, reduce_scatter_start):
        late = lambda x, axis, start=start: SlowCollective(start, x, axis)  # noqa: E731
        monkeypatch.setattr(gradients_module, start.__name__, late)
    found = run(cfg, 3)
    assert found["losses"] == expected["losses"] and found["norms"] == expected["norms"]
    assert max_relative_error(found["weights"], expected["weights"]) == 0


# -- one process against plain torch: errors that are the same in every layout -----------------------------------------


@pytest.mark.parametrize("phases", ["none", "ramp"])
@pytest.mark.parametrize("tied", [True, False])
def test_one_process_equals_plain_torch(tied: bool, phases: str) -> None:
    """Accumulation, uneven masks, clipping, AdamW, weight decay, with a ramp also z-loss: what other tests refer to."""
    ramp = {"phase_1_from_step": 2, "phase_1_global_batch_size": 12, "phase_1_micro_batch_size": 2}
    ramp |= {"phase_1_rope_theta": 50.0, "phase_2_from_step": 3, "phase_2_seq_len": 12, "train_z_loss": 0.2}
    more = ramp if phases == "ramp" else {}
    cfg = config(1, **TINY | {"model_tie_embeddings": tied} | more, optimizer_weight_decay=0.3)
    z_loss = cfg.train.z_loss
    found = run(cfg, 3)
    w = {name: torch.from_numpy(x.copy()).requires_grad_() for name, x in found["init"].items()}
    groups: list[dict[str, Any]] = [
        {"params": [x for x in w.values() if x.dim() == 2], "weight_decay": 0.3},
        {"params": [x for x in w.values() if x.dim() == 1], "weight_decay": 0.0},
    ]
    o = cfg.optimizer
    optimizer = torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.eps)
    ctx = make_context(Layout(), 0, dtype=torch.float64)
    for step in range(3):
        batches, model = random_batches(cfg, ctx, step), model_in(cfg.model, phases_of(cfg).at(step + 1))
        counted = sum(int(b.weights.sum()) for b in batches)
        loss = sum(plain_loss(model, w, b) for b in batches) / counted
        z = z_loss * sum(plain_z(model, w, b) for b in batches) / counted
        optimizer.zero_grad()
        (loss + z).backward()
        grads = {f"grad/{name}": x.grad.numpy().copy() for name, x in w.items()}
        norm = float(torch.nn.utils.clip_grad_norm_(w.values(), o.clip_norm))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, cfg.train.steps, o, cfg.lr_schedule)
        optimizer.step()
        assert found["losses"][step] == pytest.approx(loss.item(), rel=1e-9 if step else 1e-11)
        assert found["z_losses"][step] == pytest.approx(z.item(), rel=1e-8 if step else 1e-11)
        assert found["norms"][step] == pytest.approx(
            norm, rel=1e-8 if step else 1e-11
        )  # AdamW divides tiny gradients by themselves
        if step == 0:
            assert max_relative_error(found["grads"], grads) < 1e-10
    assert max_relative_error(found["weights"], {name: x.detach().numpy() for name, x in w.items()}) < 1e-7


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("position", ["pre", "post", "sandwich"])
def test_residual_forms_equal_plain_torch(position: str, parallel: bool) -> None:
    cfg = config(1, **TINY, model_norm_position=position, model_parallel_residual=parallel)
    found = run(cfg, 1)
    w = {name: torch.from_numpy(x.copy()).requires_grad_() for name, x in found["init"].items()}
    batches = random_batches(cfg, make_context(Layout(), 0, dtype=torch.float64), 0)
    loss = sum(plain_loss(cfg.model, w, b) for b in batches) / sum(b.weights.sum() for b in batches)
    loss.backward()
    assert found["losses"][0] == pytest.approx(loss.item(), rel=1e-11)
    assert max_relative_error(found["grads"], {f"grad/{name}": x.grad.numpy() for name, x in w.items()}) < 1e-10


STARTS = [0, 0, 0, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("pattern", ["", "wf", "fw"])
@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("documents", [False, True])
def test_windows_equal_a_dense_mask(documents: bool, window: int, pattern: str) -> None:
    """Loss and gradients of layers with a sliding window and without one, and of packed documents."""
    change = {"model_window": window, "model_window_layers": pattern, "data_separate_documents": documents}
    cfg = config(1, **TINY | change)

    def batches(ctx: ParallelContext) -> list[Any]:
        found = random_batches(cfg, ctx, 0)
        starts = torch.tensor(STARTS).expand(cfg.train.micro_batch_size, -1)
        packed = Sequence.of_rows(len(STARTS), Documents.from_starts(starts))
        return [replace(batch, sequence=packed) if documents else batch for batch in found]

    def job(ctx: ParallelContext) -> Any:
        state = setup(cfg, ctx)
        init = weights_of(state)
        return init, train_step(state, batches(ctx)).loss, gradients_of(state)

    ((init, loss, grads),) = run_ranks(layout_of(cfg), job)
    w = {name: torch.from_numpy(x.copy()).requires_grad_() for name, x in assemble([init]).items()}
    there = batches(make_context(Layout(), 0, dtype=torch.float64))
    starts = [STARTS] * cfg.train.micro_batch_size if documents else None
    plain = sum(plain_loss(cfg.model, w, b, starts) for b in there) / sum(float(b.weights.sum()) for b in there)
    plain.backward()
    assert loss == pytest.approx(plain.item(), rel=1e-11)
    assert max_relative_error(assemble([grads]), {f"grad/{name}": x.grad.numpy() for name, x in w.items()}) < 1e-10


def mixed_group(name: str, x: torch.Tensor) -> tuple[float, float] | None:
    """(learning-rate factor, weight decay) of a tensor in GROUPS["mixed"], written by hand; None if frozen."""
    if name.startswith("layers.1.attention."):
        return None
    if x.dim() == 1:
        return 2.0, 0.0
    if name.startswith("layers.0."):
        return 0.5, 0.0
    return (1.0, 0.0) if name == "embed.weight" else (1.0, 0.3)


def test_groups_equal_the_parameter_groups_of_torch() -> None:
    """Frozen parameters are not in the norm; each other one has its rate and decay."""
    options = TINY | {"model_tie_embeddings": False, "optimizer_weight_decay": 0.3}
    cfg = config(1, **options, optimizer_groups=GROUPS["mixed"])
    found = run(cfg, 3)
    w = {name: torch.from_numpy(x.copy()) for name, x in found["init"].items()}
    groups = {name: group for name, x in w.items() if (group := mixed_group(name, x))}
    trained = [w[name].requires_grad_() for name in groups]
    o, ctx = cfg.optimizer, make_context(Layout(), 0, dtype=torch.float64)
    rows = [{"params": [w[name]], "weight_decay": decay} for name, (_, decay) in groups.items()]
    optimizer = torch.optim.AdamW(rows, betas=(o.beta1, o.beta2), eps=o.eps)
    for step in range(3):
        batches = random_batches(cfg, ctx, step)
        loss = sum(plain_loss(cfg.model, w, b) for b in batches) / sum(float(b.weights.sum()) for b in batches)
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(trained, o.clip_norm))
        for row, (factor, _) in zip(optimizer.param_groups, groups.values(), strict=True):
            row["lr"] = factor * learning_rate(step + 1, cfg.train.steps, o, cfg.lr_schedule)
        optimizer.step()
        assert found["losses"][step] == pytest.approx(loss.item(), rel=1e-11)
        assert found["norms"][step] == pytest.approx(norm, rel=1e-10)
    assert max_relative_error(found["weights"], {name: x.detach().numpy() for name, x in w.items()}) < 1e-7
    for name, x in found["weights"].items():
        assert np.array_equal(x, found["init"][name]) is (name not in groups), name
    assert {name.removeprefix("grad/") for name in found["grads"]} == groups.keys()


def write_table(path: Path) -> None:
    """Write docs/equivalence.md, with the differences of every case as measured now."""
    lines = [
        "# Equivalence",
        "",
        "Every layout gives the result of one process. A small case, two pipeline ranks compared with one process:",
        "",
        "```bash test",
        "python -m pytest -q 'tests/proofs/test_equivalence.py::test_two_ranks_equal_one[pipeline]'",
        "```",
        "",
        "The cases below cover every pair of values of degree, schedule, sequence parallelism, ZeRO-1, recomputation,",
        "micro-batch size, sliding window, document masking, phases (ramp), dropout, z-loss, model (with its form of",
        "the residual stream) and parameter groups, each compared with one process in float64. This command measures",
        "them, and takes too long for a test of this page:",
        "",
        "    python -m tests.proofs.test_equivalence docs/equivalence.md",
        "",
        "The columns are the largest relative differences: loss and gradient norm of step 1, every gradient of step 1",
        "relative to the largest value of its tensor, all weights after 20 steps. Initial weights are bitwise equal.",
        "Limits of the test: 1e-11, 1e-11, 1e-11, 1e-9. `make test` runs some of the cases, `make test-all` all.",
        "",
        "| tensor x pipeline x data | schedule | options | model | loss | norm | gradients | weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    worst_of = dict.fromkeys(LIMITS, 0.0)
    for number, case in enumerate(CASES):
        found = figures(case)
        assert all(found[name] <= limit for name, limit in LIMITS.items()), (case, found)
        worst_of = {name: max(value, worst_of[name]) for name, value in found.items()}
        degrees = " x ".join(str(case[name]) for name in ("tensor", "pipeline", "data"))
        options = [name for name, of in RELEVANT_DEGREE.items() if case[name] and case[of] > 1]
        options += [f"recompute {case['recompute']}"] * (case["recompute"] != "none")
        options += ["window"] * (case["window"] > 0) + ["documents"] * case["documents"]
        options += [f"groups {case['groups']}"] * (case["groups"] != "none")
        options += ["ramp"] * (case["phases"] == "ramp") + ["dropout"] * (case["dropout"] > 0)
        options += ["z-loss"] * (case["z_loss"] > 0)
        texts = [degrees, case["schedule"], ", ".join([*options, f"micro-batch {case['micro_batch_size']}"])]
        lines.append(_row([*texts, case["model"]], found))
        print(f"{number + 1}/{len(CASES)} {lines[-1]}", flush=True)
    lines.append(_row(["largest of all", "", "", ""], worst_of))
    path.write_text("\n".join(lines) + "\n")


# option -> the axis whose degree must exceed 1 for it to have an effect
RELEVANT_DEGREE = {"sequence": "tensor", "keep_gathered": "tensor", "zero": "data"}


def _row(texts: list[str], found: dict[str, float]) -> str:
    numbers = [f"{found[name]:.1e}" for name in ("loss", "norm", "gradients", "weights")]
    return f"| {' | '.join([*texts, *numbers])} |"


if __name__ == "__main__":
    write_table(Path(sys.argv[1]))
