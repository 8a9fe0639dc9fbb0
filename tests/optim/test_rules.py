"""A second update rule, registered here without a change of engine/: it needs whole matrices, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.checkpoint.format import read_manifest, step_dir
from engine.config.derived import derive
from engine.config.schema import Config, OptimizerConfig
from engine.distributed.context import ParallelContext
from engine.optim.optimizer import View
from engine.optim.update_rules import MODEL, RULES, RuleEntry
from engine.planner.memory import rank_states
from engine.train.resume import resume, save_state
from engine.train.state import TrainState, setup
from engine.train.step import train_step
from tests.support.cases import assemble, config, layout_of, max_relative_error, random_batches, shard_pieces
from tests.support.harness import run_ranks
from tests.support.runs import TINY, run

METADATA: dict[str, Any] = {"prefix": "x", "num_documents": 1, "num_tokens": 1, "tokenizer_digest": None}
GROUPS = ({"role": "matrix", "rule": "toy", "lr_factor": 0.5}, {"names": "norm.weight", "frozen": "true"})
OPTIONS = TINY | {"model_num_kv_heads": 2, "optimizer_groups": GROUPS}


class Toy:
    """Momentum, then three cubic Newton-Schulz steps towards the nearest orthogonal matrix (as in Muon)."""

    rounds = False

    def __init__(self, cfg: OptimizerConfig):
        self.beta = cfg.beta1

    def update(self, view: View, lr: float, weight_decay: float, grad_scale: float, step: int) -> None:
        momentum = view.states["toy_momentum"].mul_(self.beta).add_(view.grad, alpha=grad_scale)
        x = view.whole(momentum)
        assert x.dim() == 2
        view.master.mul_(1 - lr * weight_decay).sub_(view.cut(orthogonal(x)), alpha=lr)


def orthogonal(x: Tensor) -> Tensor:
    x = x / x.norm().clamp_min(1e-30)
    for _ in range(3):
        x = 1.5 * x - 0.5 * x @ x.t() @ x
    return x


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "toy", RuleEntry(f"{__name__}:Toy", ("toy_momentum",), whole_matrices=True))


LAYOUTS: list[dict[str, int | str]] = [
    {"data": 2, "zero": 0},
    {"data": 2, "zero": 1},
    {"data": 4, "zero": 0},
    {"data": 4, "zero": 1},
    {"data": 2, "zero": 1, "tensor": 2},
    {"data": 2, "zero": 0, "tensor": 2, "sequence": "false"},
    {"data": 2, "zero": 1, "pipeline": 2, "bucket_mib": 1e-4},
    {"tensor": 4},
]


def layout_config(layout: dict[str, Any], **options: Any) -> Config:
    world = int(np.prod([layout.get(axis, 1) for axis in ("tensor", "pipeline", "data")]))
    degrees = {f"parallel_{name}": value for name, value in layout.items()}
    return config(world, **OPTIONS | options, **degrees)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: "-".join(f"{k}{v}" for k, v in x.items()))
def test_a_rule_of_whole_matrices_equals_one_process(layout: dict[str, Any]) -> None:
    one, many = run(config(1, **OPTIONS), 4), run(layout_config(layout), 4)
    assert many["losses"] == pytest.approx(one["losses"], rel=1e-11)
    assert many["norms"] == pytest.approx(one["norms"], rel=1e-11)
    assert max_relative_error(many["weights"], one["weights"]) < 1e-10


def test_one_process_equals_the_rule_by_hand() -> None:
    """The first update of a matrix, of each canonical tensor: q, k and v are one parameter, but three matrices."""
    cfg = config(1, **OPTIONS, optimizer_weight_decay=0.3)
    found = run(cfg, 1)
    scale = min(1.0, cfg.optimizer.clip_norm / found["norms"][0])
    lr = 0.5 * cfg.optimizer.lr / cfg.lr_schedule.warmup_steps
    for name in ("layers.0.attention.k.weight", "layers.1.mlp.down.weight"):
        before, grad = (torch.from_numpy(found[key][at]) for key, at in (("init", name), ("grads", f"grad/{name}")))
        expected = before * (1 - lr * 0.3) - lr * orthogonal(grad * scale)
        assert torch.allclose(torch.from_numpy(found["weights"][name]), expected, rtol=1e-12, atol=1e-15)


def test_each_replica_owns_whole_parameters_in_balance() -> None:
    cfg = layout_config({"data": 4, "zero": 1}, model_num_layers=4)

    def job(ctx: ParallelContext) -> tuple[list[tuple[str, int, int]], int]:
        state = setup(cfg, ctx)
        held = [(s.param.name, s.begin, len(s.flat)) for s in state.optimizer.states() if s.kind == "toy_momentum"]
        assert all(begin == 0 for _, begin, _ in held)
        assert all(len(s.flat) == s.param.numel() for s in state.optimizer.states() if s.kind == "toy_momentum")
        return held, sum(size for *_, size in held)

    ranks = run_ranks(layout_of(cfg), job)
    names = [name for held, _ in ranks for name, *_ in held]
    assert len(names) == len(set(names)) == 4 * 4
    loads = [load for _, load in ranks]
    assert max(loads) < 1.5 * min(loads)


def snapshot(state: TrainState) -> list[Any]:
    state.wait_for_weights()
    return shard_pieces(state.optimizer.states(), state.ctx)


def test_a_resume_in_another_layout_continues(tmp_path: Path) -> None:
    """Owners differ: whole parameters of two replicas, of four, everything, and a rank with a part of each matrix."""
    reference = run(config(1, **OPTIONS), 5)["losses"]
    chain = [LAYOUTS[4], LAYOUTS[3], LAYOUTS[6], LAYOUTS[0], LAYOUTS[7]]
    after: dict[str, np.ndarray] | None = None
    for step, layout in enumerate(chain):
        cfg = layout_config(layout)

        def job(ctx: ParallelContext, cfg: Config = cfg, step: int = step) -> Any:
            state = setup(cfg, ctx)
            if step:
                resume(state, step_dir(tmp_path, step), METADATA)
            before = snapshot(state)
            loss = train_step(state, random_batches(cfg, ctx, state.step)).loss
            save_state(state, tmp_path, METADATA)
            return before, snapshot(state), loss

        ranks = run_ranks(layout_of(cfg), job)
        before, now = (assemble([r[i] for r in ranks]) for i in (0, 1))
        assert after is None or all(np.array_equal(before[name], after[name]) for name in after)
        assert ranks[0][2] == pytest.approx(reference[step], rel=1e-11)
        after = now
    manifest = read_manifest(step_dir(tmp_path, len(chain)))
    assert manifest.kinds == ("exp_avg", "exp_avg_sq", "toy_momentum")
    matrices, rest = manifest.tensors["toy_momentum"].keys(), manifest.tensors["exp_avg"].keys()
    assert not matrices & rest and matrices | rest | {"norm.weight"} == manifest.tensors[MODEL].keys()


def test_bf16_weights_are_the_rounded_master_weights() -> None:
    """A rule that does not write the rounded weights itself."""
    cfg = layout_config({"data": 2, "zero": 1}, train_precision="bf16")

    def job(ctx: ParallelContext) -> None:
        state = setup(cfg, ctx)
        train_step(state, random_batches(cfg, ctx, 0))
        state.wait_for_weights()
        for shard in state.optimizer.states():
            weights = shard.param.data.view(-1)[shard.begin : shard.begin + len(shard.flat)]
            assert shard.kind != MODEL or torch.equal(weights, shard.flat.to(torch.bfloat16)), shard.param.name

    run_ranks(layout_of(cfg), job, dtype=torch.bfloat16)


@pytest.mark.parametrize("zero", [0, 1])
def test_the_memory_sheet_counts_the_states_of_each_rule(zero: int) -> None:
    """Of the replica that owns most: its master weights, one state of a matrix, two of others, none of frozen ones."""
    cfg = layout_config({"data": 2, "zero": zero})

    def job(ctx: ParallelContext) -> dict[str, int]:
        kinds: dict[str, int] = {}
        for one in setup(cfg, ctx).optimizer.runs:
            for kind in ("master", *one.states):
                kinds[kind] = kinds.get(kind, 0) + len(one.span)
        return kinds

    largest = max(run_ranks(layout_of(cfg), job), key=lambda kinds: sum(kinds.values()))
    (state,) = rank_states(cfg, derive(cfg))
    assert state.states(owned=False) == largest
    assert largest["toy_momentum"] > 0 and largest["exp_avg"] == largest["exp_avg_sq"] > 0
    assert sum(largest.values()) == 2 * largest["toy_momentum"] + 3 * largest["exp_avg"]
