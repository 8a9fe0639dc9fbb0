"""Parameter groups: learning-rate factor, weight decay and frozen parameters, in layouts and in checkpoints."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.checkpoint.format import MANIFEST, read_manifest, step_dir, with_digest
from engine.config.schema import Config
from engine.distributed.context import ParallelContext, make_context
from engine.distributed.layout import Layout
from engine.distributed.sharding import units
from engine.distributed.specs import Role
from engine.errors import CheckpointError, ConfigError, DamageError
from engine.model.layers import Build
from engine.model.transformer import StageShape, Transformer
from engine.ops import linear, loss
from engine.optim.groups import group_of
from engine.optim.update_rules import MODEL
from engine.train.resume import resume, save_state
from engine.train.state import TrainState, check_groups, setup
from engine.train.step import train_step
from tests.support.cases import (
    assemble,
    config,
    gradients_of,
    layout_of,
    max_relative_error,
    random_batches,
    shard_pieces,
    weights_of,
)
from tests.support.errors import raises
from tests.support.harness import run_ranks
from tests.support.runs import TINY, run

Rows = tuple[dict[str, Any], ...]
METADATA: dict[str, Any] = {"prefix": "x", "num_documents": 1, "num_tokens": 1, "tokenizer_digest": None}
MIXED: Rows = (
    {"names": "embed.weight layers.0.attention.q_norm.weight", "frozen": "true"},
    {"names": "layers.1.*", "role": "matrix", "lr_factor": 0.5},
    {"role": "head", "lr_factor": 0.25, "weight_decay": 0.0},
    {"role": "vector", "weight_decay": 0.2},
)
ALL_BUT_HEAD: Rows = ({"names": "head.weight", "lr_factor": 2.0}, {"names": "*", "frozen": "true"})
PREFIX: Rows = ({"names": "embed.weight layers.0.*", "frozen": "true"},)


# -- which group a parameter is in -------------------------------------------------------------------------------------


def group_table(cfg: Config) -> dict[str, tuple[int, float, float, bool]]:
    """Canonical name -> row, learning-rate factor, weight decay, frozen."""
    found = {}
    for spec in check_groups(cfg):
        group = group_of(spec, cfg.optimizer)
        for chunk in spec.chunks:
            found[chunk.name] = (group.row, group.lr_factor, group.weight_decay, group.frozen)
    return found


def test_the_first_row_that_matches_wins() -> None:
    cfg = config(1, **TINY | {"model_tie_embeddings": False}, optimizer_groups=MIXED, optimizer_weight_decay=0.3)
    table = group_table(cfg)
    assert table["embed.weight"] == (1, 1.0, 0.0, True)
    assert table["layers.0.attention.q_norm.weight"] == (1, 1.0, 0.0, True)
    assert table["layers.1.mlp.down.weight"] == table["layers.1.attention.k.weight"] == (2, 0.5, 0.3, False)
    assert table["layers.0.mlp.down.weight"] == (0, 1.0, 0.3, False)
    assert table["head.weight"] == (3, 0.25, 0.0, False)
    assert table["norm.weight"] == table["layers.1.mlp_norm.weight"] == (4, 1.0, 0.2, False)


@pytest.mark.parametrize(
    ("rows", "code", "values"),
    [
        (({"names": "embd.weight", "frozen": "true"},), "group-matches-nothing", ("embd.weight", "embed.weight")),
        (({"names": "embed.weight layers.9.*", "frozen": "true"},), "group-matches-nothing", ("layers.9.*",)),
        (({"role": "head", "frozen": "true"},), "group-matches-nothing", ("role", "embedding")),
        (({"names": "norm.weight", "role": "matrix", "frozen": "true"},), "group-matches-nothing", ("matrix",)),
        (({"names": "layers.*.attention.q.weight", "lr_factor": 2},), "group-splits-a-parameter", ("k.weight",)),
        (({"names": "*", "lr_factor": 2}, {"role": "vector", "frozen": "true"}), "group-has-no-effect", ("groups.2",)),
        (({"names": "*", "frozen": "true"},), "everything-frozen", ()),
        (({"lr_factor": 2},), "group-selects-nothing", ("groups.1",)),
        (({"names": " ", "lr_factor": 2},), "group-selects-nothing", ("groups.1",)),
        (({"role": "vector"},), "group-changes-nothing", ("groups.1",)),
        (({"role": "vector", "frozen": "true", "lr_factor": 2},), "frozen-has-no-rate", ("lr_factor",)),
        (({"role": "vector", "rule": "adam"},), "unknown-rule", ("adamw",)),
    ],
)
def test_rows_that_are_wrong(rows: Rows, code: str, values: tuple[str, ...]) -> None:
    with raises(ConfigError, f"optim.{code}", "optimizer.groups", *values):
        check_groups(config(1, **TINY, optimizer_groups=rows))


def test_a_rule_that_does_not_exist() -> None:
    with raises(ConfigError, "optim.unknown-rule", "optimizer.rule", "adamw"):
        config(1, optimizer_rule="adamwide")


# -- layouts in which ranks or stages have nothing to train ------------------------------------------------------------

FROZEN_LAYOUTS: list[dict[str, Any]] = [
    *({"parallel_pipeline": 2, "parallel_schedule": name} for name in ("gpipe", "1f1b", "zb-h1")),
    *({"parallel_pipeline": 2, "parallel_schedule": name} for name in ("interleaved", "zb-v", "dualpipe-v")),
    {"parallel_pipeline": 2, "parallel_schedule": "zb-v", "parallel_layers": "0,2,2,0"},
    {"parallel_pipeline": 2, "parallel_chunks": 2, "parallel_schedule": "interleaved", "parallel_layers": "1,0,0,3"},
    {"parallel_pipeline": 4, "parallel_layers": "0,3,0,1", "train_recompute": "full"},
    {"parallel_tensor": 2, "train_recompute": "selective"},
    {"parallel_data": 2, "parallel_zero": 1},
    {"parallel_pipeline": 2, "parallel_data": 2, "parallel_zero": 1, "parallel_overlap": False},
]


@pytest.mark.parametrize("rows", [ALL_BUT_HEAD, PREFIX], ids=["all but the head", "the first block"])
@pytest.mark.parametrize("layout", FROZEN_LAYOUTS, ids=lambda x: "-".join(str(v) for v in x.values()))
def test_frozen_layouts_equal_one_process(layout: dict[str, Any], rows: Rows) -> None:
    degrees = [layout.get(f"parallel_{axis}", 1) for axis in ("tensor", "pipeline", "data")]
    model = TINY | {"model_tie_embeddings": False, "model_num_layers": 4, "optimizer_groups": rows}
    one, many = run(config(1, **model), 3), run(config(int(np.prod(degrees)), **model, **layout), 3)
    assert many["losses"] == pytest.approx(one["losses"], rel=1e-11)
    assert many["norms"] == pytest.approx(one["norms"], rel=1e-11)
    assert max_relative_error(many["grads"], one["grads"]) < 1e-11
    assert max_relative_error(many["weights"], one["weights"]) < 1e-9
    frozen = [name for name, row in group_table(config(1, **model)).items() if row[3]]
    assert frozen and all(np.array_equal(many["weights"][name], many["init"][name]) for name in frozen)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_recomputation_changes_no_bit_behind_frozen_parameters(recompute: str) -> None:
    """The input of the first trainable block needs no gradient, but its parameters do."""
    cfg = config(1, **TINY, optimizer_groups=PREFIX)
    one, other = run(cfg, 2), run(cfg.model_copy(update={"train": _with(cfg, recompute)}), 2)
    assert one["losses"] == other["losses"] and max_relative_error(other["grads"], one["grads"]) == 0
    assert any(name.startswith("grad/layers.1.") for name in one["grads"])


def _with(cfg: Config, recompute: str) -> Any:
    return cfg.train.model_copy(update={"recompute": recompute})


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_no_gradient_is_sent_to_a_frozen_prefix(schedule: str) -> None:
    """With all but the head frozen the stages exchange activations only: half of the bytes."""
    sent = []
    for rows in ((), ALL_BUT_HEAD):
        options = TINY | {"model_tie_embeddings": False, "optimizer_groups": rows}
        cfg = config(2, **options, parallel_pipeline=2, parallel_schedule=schedule)

        def job(ctx: ParallelContext, cfg: Config = cfg) -> tuple[float, int, int]:
            state = setup(cfg, ctx)
            ctx.world.traffic.clear()
            train_step(state, random_batches(cfg, ctx, 0))
            grads = sum(p.main_grad is not None for p in state.params)
            waiting = sum(len(stage.live) + len(stage.deferred) for stage in state.stages.values())
            assert waiting == 0
            return ctx.world.traffic["pipeline", "send"], grads, len(list(state.optimizer.states()))

        sent.append(run_ranks(layout_of(cfg), job))
    trained, (first, last) = sent
    assert trained[0][0] == trained[1][0] > 0 and (first[0], last[0]) == (trained[0][0], 0.0)
    assert first[1] == 0 and last[1] == 1 and last[2] > first[2] > 0


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_no_weight_gradient_is_computed_for_frozen_matrices(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a trainable embedding, gradients pass through frozen matrices; no weight gradient is computed."""
    rows = ({"role": "matrix", "frozen": "true"}, {"role": "head", "frozen": "true"})
    options = TINY | {"model_tie_embeddings": False, "optimizer_groups": rows}
    cfg = config(1, **options, parallel_schedule=schedule)
    computed: list[str] = []
    monkeypatch.setattr(linear, "accumulate", lambda weight, *_: computed.append(weight.name))
    monkeypatch.setattr(loss, "add_outer_", lambda *_: computed.append("head"))
    ctx = make_context(Layout(), 0, dtype=torch.float64)
    state = setup(cfg, ctx)
    train_step(state, random_batches(cfg, ctx, 0))
    assert not computed
    assert all((p.main_grad is None) is (p.spec.role in (Role.MATRIX, Role.HEAD)) for p in state.params)


def test_a_bucket_belongs_to_one_unit() -> None:
    """A block, the embeddings, or the final norm with the head; several only if a unit is larger than a bucket."""
    options = {"model_positions": "learned", "model_norm": "layernorm", "model_qkv_bias": True}
    cfg = config(1, **options, parallel_bucket_mib=100, optimizer_groups=MIXED[1:])
    ctx = make_context(Layout(), 0, dtype=torch.float64)
    model = Transformer(cfg.model, Build(ctx), StageShape(range(4), True, True))
    owner = {p.name: index for index, unit in enumerate(units(model)) for p in unit}
    assert len(set(owner.values())) == 6
    for mib in (100, 0.02):
        cfg = cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update={"bucket_mib": mib})})
        buckets = setup(cfg, ctx).buckets[0].buckets
        of = [{owner[p.name] for p in bucket.params} for bucket in buckets]
        assert all(len(found) == 1 for found in of) and (len(buckets) == 6) is (mib == 100)
        for bucket in buckets:
            groups = [group_of(p.spec, cfg.optimizer) for p in bucket.params]
            changes = sum(a != b for a, b in pairwise(groups))
            assert changes == len(set(groups)) - 1, "parameters of a group are not adjacent"


# -- checkpoints -------------------------------------------------------------------------------------------------------


def trained(tmp_path: Path, cfg: Config, dtype: torch.dtype = torch.float64, count: int = 2) -> Any:
    def job(ctx: ParallelContext) -> Any:
        state = setup(cfg, ctx)
        before = weights_of(state)
        losses = [train_step(state, random_batches(cfg, ctx, state.step)).loss for _ in range(count)]
        save_state(state, tmp_path, METADATA)
        more = train_step(state, random_batches(cfg, ctx, state.step)).loss
        return before, weights_of(state), [*losses, more], snapshot(state)

    ranks = run_ranks(layout_of(cfg), job, dtype=dtype)
    before, after, states = (assemble([r[i] for r in ranks]) for i in (0, 1, 3))
    return before, after, ranks[0][2], states


def resumed(tmp_path: Path, cfg: Config, step: int = 2) -> Any:
    def job(ctx: ParallelContext) -> Any:
        state = setup(cfg, ctx)
        resume(state, step_dir(tmp_path, step), METADATA)
        loss = train_step(state, random_batches(cfg, ctx, state.step)).loss
        assert not {
            name for name in state.lineage[-1].changed if name.startswith(("optimizer.groups", "optimizer.rule"))
        }
        return loss, snapshot(state), state.lineage[-1].allowed

    ranks = run_ranks(layout_of(cfg), job)
    return ranks[0][0], assemble([r[1] for r in ranks]), ranks[0][2]


def snapshot(state: TrainState) -> list[Any]:
    state.wait_for_weights()
    return shard_pieces(state.optimizer.states(), state.ctx)


def test_frozen_parameters_in_checkpoints_of_all_layouts(tmp_path: Path) -> None:
    """Saved once, without moments; a resume in another layout continues with the same bits of state."""
    options = TINY | {"model_tie_embeddings": False, "optimizer_groups": MIXED}
    first = config(4, **options, parallel_tensor=2, parallel_data=2)
    before, after, losses, states = trained(tmp_path, first)
    manifest = read_manifest(step_dir(tmp_path, 2))
    assert manifest.kinds == ("exp_avg", "exp_avg_sq")
    assert np.array_equal(before["embed.weight"], after["embed.weight"])
    assert "embed.weight" in manifest.tensors[MODEL] and "embed.weight" not in manifest.tensors["exp_avg"]
    assert manifest.tensors[MODEL].keys() - manifest.tensors["exp_avg"].keys() == {
        "embed.weight",
        "layers.0.attention.q_norm.weight",
    }
    for layout in (
        {},
        {"parallel_pipeline": 2, "parallel_schedule": "zb-h1"},
        {"parallel_data": 2, "parallel_zero": 0},
    ):
        world = 2 if layout else 1
        loss, now, _ = resumed(tmp_path, config(world, **options, **layout))
        assert loss == pytest.approx(losses[-1], rel=1e-11)
        assert max_relative_error(now, states) < 1e-11


def test_frozen_parameters_keep_their_bits_in_bf16(tmp_path: Path) -> None:
    """There is no master copy: the checkpoint has the values that the model computes with."""
    rows = ({"names": "embed.weight", "frozen": "true"},)
    cfg = config(
        2, **TINY | {"model_tie_embeddings": False}, parallel_data=2, train_precision="bf16", optimizer_groups=rows
    )
    before, after, _, _ = trained(tmp_path, cfg, torch.bfloat16, 3)
    assert np.array_equal(before["embed.weight"], after["embed.weight"])
    assert not np.array_equal(before["head.weight"], after["head.weight"])
    tensors = read_manifest(step_dir(tmp_path, 3)).tensors[MODEL]
    assert (tensors["embed.weight"].dtype, tensors["head.weight"].dtype) == ("BF16", "F32")


def test_a_resume_with_other_groups_needs_permission(tmp_path: Path) -> None:
    options = TINY | {"model_tie_embeddings": False}
    trained(tmp_path, config(1, **options, optimizer_groups=PREFIX))
    faster = ({"role": "vector", "lr_factor": 2.0},)
    with pytest.raises(AssertionError, match=r"(?s)optimizer\.groups: .*optimizer\.state of embed\.weight"):
        resumed(tmp_path, config(1, **options, optimizer_groups=faster))
    with pytest.raises(AssertionError, match=r"another run:\n  - optimizer\.state of"):
        resumed(tmp_path, config(1, **options, optimizer_groups=faster, checkpoint_allow="optimizer.groups"))
    allowed = "optimizer.groups optimizer.state"
    _, states, reported = resumed(tmp_path, config(1, **options, optimizer_groups=faster, checkpoint_allow=allowed))
    assert sorted(name.partition(" ")[0] for name in reported) == ["optimizer.groups", "optimizer.state"]
    beta = 1 - config(1).optimizer.beta1
    assert np.abs(states["exp_avg/embed.weight"]).max() > 0, "it is trained now"
    assert np.abs(states["exp_avg/embed.weight"]).max() <= beta * config(1, **options).optimizer.clip_norm


def test_state_that_should_be_there_is_never_zero(tmp_path: Path) -> None:
    """Permission for new state does not hide a checkpoint that has lost the state of a trained tensor."""
    cfg = config(1, **TINY, checkpoint_allow="optimizer.state optimizer.groups")
    trained(tmp_path, cfg)
    folder = step_dir(tmp_path, 2)
    manifest = read_manifest(folder)
    del manifest.tensors["exp_avg"]["embed.weight"]
    (folder / MANIFEST).write_bytes(with_digest(manifest.model_dump_json().encode()))
    ctx = make_context(Layout(), 0, dtype=torch.float64)
    with raises(DamageError, "checkpoint.tensor-missing", "embed.weight"):
        resume(setup(cfg, ctx), folder, METADATA)


def test_weights_only_is_said_by_the_manifest(tmp_path: Path) -> None:
    cfg = config(1, **TINY)
    trained(tmp_path, cfg)
    folder = step_dir(tmp_path, 2)
    manifest = read_manifest(folder)
    weights = manifest.model_copy(update={"tensors": {MODEL: manifest.tensors[MODEL]}, "state_kinds": None})
    (folder / MANIFEST).write_bytes(with_digest(weights.model_dump_json().encode()))
    with raises(CheckpointError, "train.weights-only", folder):
        resume(setup(cfg, make_context(Layout(), 0, dtype=torch.float64)), folder, METADATA)
    listed = weights.model_copy(update={"tensors": manifest.tensors})
    (folder / MANIFEST).write_bytes(with_digest(listed.model_dump_json().encode()))
    with raises(CheckpointError, "checkpoint.manifest-damaged", "exp_avg"):
        read_manifest(folder)


def unsharded(cfg: Config) -> dict[str, Tensor]:
    ctx = make_context(Layout(), 0, dtype=torch.float64)
    state = setup(cfg, ctx)
    train_step(state, random_batches(cfg, ctx, 0))
    return {name: torch.from_numpy(x) for name, _, _, x in gradients_of(state)}


def test_a_frozen_tied_embedding_has_no_head_gradient() -> None:
    rows = ({"names": "embed.weight", "frozen": "true"},)
    assert "grad/embed.weight" not in unsharded(config(1, **TINY, optimizer_groups=rows))
