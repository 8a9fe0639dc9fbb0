"""Resuming rejects each differing field unless it is allowed, and later checkpoints record what was allowed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.checkpoint.format import read_manifest
from engine.checkpoint.lineage import DATA_FIELDS, ORDER_BEGIN, code_versions, field_of, format_lineage
from engine.checkpoint.load import Reader
from engine.checkpoint.summary import summary, tensor_stats
from engine.data.samples.corpora import data_metadata, fingerprint, open_training
from engine.data.samples.indexed import IndexedDataset
from engine.data.samples.indexed_writer import IndexedWriter
from engine.distributed.context import ParallelContext
from engine.errors import ConfigError, EngineError
from engine.train.resume import resume, save_state
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import config, layout_of, random_batches
from tests.support.errors import raises
from tests.support.harness import run_ranks

OTHER = "checkpoint.of-another-run"
METADATA: dict[str, Any] = {
    "prefix": "x",
    "num_documents": 1,
    "num_tokens": 1,
    "fingerprint": "a",
    "tokenizer_digest": "t",
}


def go(
    root: Path, data: dict[str, Any] = METADATA, source: Path | None = None, *, steps: int = 1, **overrides: Any
) -> Path:
    """Train in one process, resuming from `source` if given, and save. Raises EngineError with the first code."""
    cfg = config(checkpoint_keep=0, **overrides)

    def job(ctx: ParallelContext) -> tuple[str, str]:
        state = setup(cfg, ctx)
        try:
            if source is not None:
                resume(state, source, data)
        except EngineError as error:
            return error.errors[0].code if isinstance(error, ConfigError) else error.code, str(error)
        for _ in range(steps):
            train_step(state, random_batches(cfg, ctx, state.step))
        return "", str(save_state(state, root, data))

    ((code, text),) = run_ranks(layout_of(cfg), job)
    if code:
        raise EngineError(code, text)
    return Path(text)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go(tmp_path_factory.mktemp("first"))


@pytest.mark.parametrize(
    ("overrides", "data", "field"),
    [
        ({"train_seq_len": 8}, {}, "train.seq_len"),
        ({"train_seed": 5}, {}, "train.seed"),
        ({"model_rope_theta": 500.0}, {}, "model.rope_theta"),
        ({"model_norm_eps": 1e-6}, {}, "model.norm_eps"),
        ({}, {"num_tokens": 2}, "data.num_tokens"),
        ({}, {"fingerprint": "b"}, "data.fingerprint"),
        ({}, {"tokenizer_digest": "u"}, "data.tokenizer_digest"),
        ({}, {"mask_eod": 0}, "data.mask_eod"),
        ({}, {"order": 2}, "data.order"),  # the checkpoint has none: version 1
        ({}, {"source 0, web": "1 documents"}, "data.source"),
        ({}, {"mixture from step 0": "web 1"}, "data.mixture"),
    ],
)
def test_each_field_is_rejected_allowed_and_remembered(
    first: Path, tmp_path: Path, overrides: dict[str, Any], data: dict[str, Any], field: str
) -> None:
    with raises(EngineError, OTHER, f"  - {field}", f'--checkpoint.allow "{field}"'):
        go(tmp_path, METADATA | data, first, **overrides)
    with raises(EngineError, OTHER, f"  - {field}"):
        go(tmp_path, METADATA | data, first, checkpoint_allow="model.qk_norm", **overrides)
    second = go(tmp_path, METADATA | data, first, checkpoint_allow=f"{field}, model.qk_norm", **overrides)
    (parent,) = read_manifest(second).lineage
    assert (parent.checkpoint, parent.step) == (str(first), 1)
    assert [field_of(name) for name in parent.allowed] == [field] and parent.versions == code_versions()


def test_a_change_of_the_z_loss_needs_no_permission_and_is_remembered(first: Path, tmp_path: Path) -> None:
    (parent,) = read_manifest(go(tmp_path, METADATA, first, train_z_loss=1e-4)).lineage
    assert parent.changed == {"train.z_loss": ("0.0", "0.0001")} and not parent.allowed


def test_another_order_begins_where_it_was_allowed(first: Path, tmp_path: Path) -> None:
    """The error explains how to resume; later saves and resumes know where epoch 0 of the new order began."""
    with raises(EngineError, OTHER, "data.order: checkpoint 1, now 2", f"({code_versions()['engine']})"):
        go(tmp_path, METADATA | {"order": 2}, first)
    second = go(tmp_path, METADATA | {"order": 2}, first, checkpoint_allow="data.order")
    third = go(tmp_path, METADATA | {"order": 2}, second)
    assert [read_manifest(folder).data.get(ORDER_BEGIN) for folder in (first, second, third)] == [None, 4, 4]
    fourth = go(tmp_path, METADATA | {"order": 3}, third, checkpoint_allow="data.order")
    assert read_manifest(fourth).data[ORDER_BEGIN] == 12
    assert [parent.allowed for parent in read_manifest(fourth).lineage] == [
        {"data.order": ("1", "2")},
        {},
        {"data.order": ("2", "3")},
    ]


def test_a_changed_mixture_of_the_future_is_no_difference(first: Path, tmp_path: Path) -> None:
    go(tmp_path, METADATA | {"mixture from step 1": "web 2"}, first)


def test_where_the_samples_of_a_mixture_fell_is_no_difference_and_older_checkpoints_say_no_steps(
    tmp_path: Path,
) -> None:
    """Older checkpoints record only samples, not steps; here in batches of 4."""
    old = go(tmp_path, METADATA | {"mixture from sample 0": "web 1", "mixture from sample 4": "web 3"}, steps=3)
    now = {"mixture from step 0": "web 1", "mixture from step 1": "web 3", "mixture from sample 8": "web 3"}
    go(tmp_path / "b", METADATA | now, old)
    with raises(EngineError, OTHER, "data.mixture from step 1: checkpoint 'web 3', now 'web 4'"):
        go(tmp_path / "b", METADATA | now | {"mixture from step 1": "web 4"}, old)


def test_an_unknown_field_to_allow_is_a_config_error(first: Path, tmp_path: Path) -> None:
    with raises(EngineError, "checkpoint.allow-unknown-field", "'train.seqlen'", "train.seq_len?"):
        go(tmp_path, METADATA, first, checkpoint_allow="train.seqlen")


def test_lineage_grows_and_is_printed(first: Path, tmp_path: Path) -> None:
    second = go(tmp_path, METADATA, first)
    third = go(tmp_path, METADATA, second, train_seq_len=8, checkpoint_allow="train.seq_len")
    lineage = read_manifest(third).lineage
    assert [parent.step for parent in lineage] == [1, 2]
    text = "\n".join(format_lineage(lineage))
    assert str(first) in text and str(second) in text and "allowed: train.seq_len: 16 -> 8" in text
    assert lineage[0].config == lineage[1].config
    with Reader(third) as reader:
        assert "step 3" in (text := "\n".join(summary(reader))) and "16 -> 8" in text
        stats = list(tensor_stats(reader, norms=True))
        for one in stats:
            whole = reader.read_whole(one.kind, one.name).double().numpy()
            assert np.isclose(one.norm, np.linalg.norm(whole), rtol=1e-12)
        assert {one.kind for one in stats} == {"model", "exp_avg", "exp_avg_sq"}


def test_a_field_that_came_later_had_its_default(first: Path, tmp_path: Path) -> None:
    manifest = read_manifest(first)
    del manifest.config["model"]["qk_norm"], manifest.data["fingerprint"]
    old = tmp_path / "old"
    old.mkdir()
    for file in manifest.files:
        (old / file).write_bytes((first / file).read_bytes())
    (old / "manifest.json").write_bytes(manifest.encode())
    go(tmp_path, METADATA, old)
    with raises(EngineError, OTHER, "model.qk_norm: checkpoint False, now True"):
        go(tmp_path, METADATA, old, model_qk_norm=True)


def test_all_data_metadata_has_a_field(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        with IndexedWriter(tmp_path / name, vocab_size=61) as writer:
            for _ in range(9):
                writer.add(rng.integers(0, 61, 40))
            writer.finish({})
    cfg = config(data_train=f"1 {tmp_path}/a 2 {tmp_path}/b")
    fields = open_training(cfg, None).metadata
    assert {field_of(name) for name in fields} - {"prefix", "seq_len"} <= set(
        DATA_FIELDS
    )  # lengths are compared as train.seq_len and phases


def test_the_fingerprint_distinguishes_corpora_of_the_same_size(tmp_path: Path) -> None:
    tokens = np.random.default_rng(1).integers(0, 61, (50, 700))
    found = set()
    for name in ("a", "again", "token", "lengths"):
        with IndexedWriter(tmp_path / name, vocab_size=61) as writer:
            rows = tokens.copy()
            if name == "token":
                rows[25] = rows[25][::-1]
            for i, row in enumerate(rows):
                shift = {10: -1, 11: 1}.get(i, 0) if name == "lengths" else 0
                writer.add(np.resize(row, 700 + shift))
            writer.finish({})
        found.add(fingerprint(IndexedDataset(tmp_path / name)))
    assert len(found) == 3
    a, b = (data_metadata("x", [IndexedDataset(tmp_path / name)]) for name in ("a", "lengths"))
    assert a["num_tokens"] == b["num_tokens"] and a["fingerprint"] != b["fingerprint"]


LINEAR, CONSTANT = {"lr_schedule_kind": "linear"}, {"lr_schedule_kind": "constant"}
RATES = {"lr_schedule_warmup_steps": 2, "optimizer_lr": 1e-3, "lr_schedule_min_lr_ratio": 0.1, "train_steps": 12}


@pytest.mark.parametrize(
    ("then", "steps", "now", "rates"),
    [  # learning rates of the next step, computed by hand: (of the checkpoint's run, of this run); None: no jump
        ({}, 12, {"train_steps": 24}, (1e-4, 1e-4 + 9e-4 * (0.5 + 0.5 * math.cos(math.pi / 2)))),
        ({}, 12, {"train_steps": 24, "lr_schedule_horizon_steps": 12}, None),
        ({"lr_schedule_horizon_steps": 24}, 12, {"lr_schedule_horizon_steps": 24, "train_steps": 30}, None),
        (LINEAR, 6, {**LINEAR, "train_steps": 22}, (1e-3 - 9e-5 * 5, 7.75e-4)),
        (LINEAR, 6, {**LINEAR, "train_steps": 12}, None),
        (CONSTANT, 6, {**CONSTANT, "train_steps": 99}, None),
        (CONSTANT, 6, {**CONSTANT, "optimizer_lr": 1.009e-3}, None),
        (CONSTANT, 6, {**CONSTANT, "optimizer_lr": 1.011e-3}, (1e-3, 1.011e-3)),
        ({}, 1, {"lr_schedule_warmup_steps": 4}, (1e-3, 5e-4)),
        ({}, 1, {"train_steps": 99}, None),  # both warm up
        (
            {"lr_schedule_kind": "wsd", "lr_schedule_decay_steps": 4},
            12,
            {"lr_schedule_kind": "wsd", "lr_schedule_decay_steps": 4, "train_steps": 40},
            (1e-4, 1e-3),
        ),
        (
            {"lr_schedule_kind": "wsd", "lr_schedule_decay_steps": 4},
            7,
            {"lr_schedule_kind": "wsd", "lr_schedule_decay_steps": 4, "train_steps": 40},
            None,  # before the decay
        ),
        ({}, 6, {"train_global_batch_size": 8}, None),
        ({}, 12, {"train_steps": 11}, None),  # all steps are done
    ],
)
def test_a_learning_rate_that_jumps_is_rejected_with_both_values(
    tmp_path: Path, then: dict[str, Any], steps: int, now: dict[str, Any], rates: tuple[float, float] | None
) -> None:
    source = go(tmp_path / "a", steps=steps, **RATES | then)
    left = 0 if now.get("train_steps", 12) < 12 else 1
    if rates is None:
        go(tmp_path / "b", source=source, steps=left, **RATES | now)
        return
    text = f" of step {steps + 1}): checkpoint {rates[0]:.6g}, now {rates[1]:.6g}\n"
    kept = "horizon-steps 12 " if now.keys() & {"train_steps"} else ""
    with raises(EngineError, OTHER, text, kept, '--checkpoint.allow "lr_schedule"'):
        go(tmp_path / "b", source=source, **RATES | now)
    made = go(tmp_path / "b", source=source, checkpoint_allow="lr_schedule", **RATES | now)
    (parent,) = read_manifest(made).lineage
    assert list(parent.allowed.values()) == [(f"{rates[0]:.6g}", f"{rates[1]:.6g}")]
    (changed,) = now.keys() - then.keys() | ({"train_steps"} & now.keys())
    section = "lr_schedule" if changed.startswith("lr_schedule_") else changed.partition("_")[0]
    assert list(parent.changed) == [f"{section}.{changed.removeprefix(section)[1:]}"]
    go(tmp_path / "c", source=made, **RATES | now)  # afterwards the new schedule is the run's own
