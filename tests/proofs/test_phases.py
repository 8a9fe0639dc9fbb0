"""A run over a batch ramp and changes of the blend: every layout equals one process, and stopping changes no bit.

The runs are those of `engine train`, with their data, plans, metrics and checkpoints, in float64.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.checkpoint.format import read_manifest
from engine.checkpoint.load import Reader
from engine.data.samples.indexed_writer import IndexedWriter
from engine.distributed.context import ParallelContext
from engine.errors import ConfigError
from engine.train.loop import train
from engine.train.state import setup
from engine.util.signals import StopRequest
from tests.support.cases import config, layout_of, resolve
from tests.support.errors import raises
from tests.support.harness import run_ranks

BATCHES = [4, 4, 8, 8, 16, 16, 8, 8]
RAMP: dict[str, Any] = {
    "phase_1_from_step": 3,
    "phase_1_global_batch_size": 8,
    "phase_2_from_step": 5,
    "phase_2_global_batch_size": 16,
    "phase_2_micro_batch_size": 2,
    "phase_2_weights": "0.2 web",
    "phase_3_from_step": 7,
    "phase_3_global_batch_size": 8,
    "phase_3_weights": "0 code 1 web",
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"parallel_data": 2},
    "tensor": {"parallel_tensor": 2},
    "pipeline": {"parallel_pipeline": 2, "parallel_schedule": "zb-v"},
}
TIMES = ("tokens_per_s", "step_s", "gflops_per_rank", "data_s")


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("corpora")
    for number, name in enumerate(("web", "code")):
        rng = np.random.default_rng(number)
        with IndexedWriter(folder / name, vocab_size=61) as writer:
            for length in rng.integers(5, 60, 50):
                writer.add(rng.integers(0, 61, length))
            writer.finish({})
    return f"0.7 {folder}/web 0.3 {folder}/code"


def go(folder: Path, blend: str, steps: int, **overrides: Any) -> list[dict[str, float]]:
    """Train until `steps`; returns the metrics of all steps without times and traffic."""
    degrees = [overrides.get(f"parallel_{axis}", 1) for axis in ("tensor", "pipeline", "data")]
    options = {"lr_schedule_horizon_steps": 20, "train_steps": steps, "monitor_timeline_step": 0} | RAMP | overrides
    resolved = resolve(int(np.prod(degrees)), data_train=blend, run_dir=folder, **options)

    def job(ctx: ParallelContext) -> int:
        return train(resolved, ctx, StopRequest())

    assert set(run_ranks(resolved.derived.layout, job)) == {0}
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMES and not k.startswith("bytes_")} for line in lines]


def weights(folder: Path, steps: int) -> dict[str, np.ndarray]:
    with Reader(folder / f"checkpoints/step_{steps:08d}") as reader:
        return {name: reader.read_whole("model", name).numpy() for name in reader.shapes("model")}


@pytest.fixture(scope="module")
def one(blend: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    """The run on one process: (run folder, metrics)."""
    folder = tmp_path_factory.mktemp("one")
    return folder, go(folder, blend, 8)


def test_the_metrics_follow_the_phases(one: tuple[Path, list[dict[str, float]]]) -> None:
    metrics = one[1]
    assert [line["global_batch_size"] for line in metrics] == BATCHES
    assert [line["tokens"] for line in metrics] == [16 * sum(BATCHES[: step + 1]) for step in range(8)]
    assert all(("loss_code" in line) == (line["step"] < 7) for line in metrics)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_one_process(
    layout: str, one: tuple[Path, list[dict[str, float]]], blend: str, tmp_path: Path
) -> None:
    many = go(tmp_path, blend, 8, **LAYOUTS[layout])
    for found, expected in zip(many, one[1], strict=True):
        assert found == pytest.approx(expected, rel=1e-11)
    found, expected = weights(tmp_path, 8), weights(one[0], 8)
    for name, values in expected.items():
        assert np.abs(found[name] - values).max() <= 1e-10 * np.abs(values).max(), name


@pytest.mark.parametrize("stop", [2, 3, 6], ids=["before a boundary", "inside a phase", "before new weights"])
def test_stopping_and_resuming_changes_no_bit(
    stop: int, one: tuple[Path, list[dict[str, float]]], blend: str, tmp_path: Path
) -> None:
    go(tmp_path, blend, stop)
    assert go(tmp_path, blend, 8) == one[1]
    found, expected = weights(tmp_path, 8), weights(one[0], 8)
    assert all(np.array_equal(found[name], values) for name, values in expected.items())


def test_a_run_resumes_inside_a_ramp_in_another_layout(
    one: tuple[Path, list[dict[str, float]]], blend: str, tmp_path: Path
) -> None:
    go(tmp_path, blend, 3, **LAYOUTS["data"])
    go(tmp_path, blend, 5, **LAYOUTS["pipeline"])
    for found, expected in zip(go(tmp_path, blend, 8), one[1], strict=True):
        assert found == pytest.approx(expected, rel=1e-11)


def test_later_phases_may_change_and_past_ones_may_not(
    one: tuple[Path, list[dict[str, float]]], blend: str, tmp_path: Path
) -> None:
    go(tmp_path, blend, 3)
    changed = "phase from step 3: checkpoint {'global_batch_size': 8}, now {'global_batch_size': 12}"
    with pytest.raises(AssertionError, match=f'(?s){re.escape(changed)}.*--checkpoint.allow "phase"'):
        go(tmp_path, blend, 4, phase_1_global_batch_size=12)
    with pytest.raises(AssertionError, match=r"phase from step 2: checkpoint None, now"):
        go(tmp_path, blend, 4, phase_1_from_step=2)
    later = go(tmp_path, blend, 6, phase_2_from_step=6, phase_2_global_batch_size=12)
    assert [line["global_batch_size"] for line in later] == [4, 4, 8, 8, 8, 12]
    assert later[:4] == one[1][:4]
    allowed = go(
        tmp_path,
        blend,
        8,
        phase_1_from_step=2,
        phase_2_from_step=7,
        phase_3_from_step=8,
        checkpoint_allow="phase data.mixture",
    )
    assert [line["global_batch_size"] for line in allowed] == [4, 4, 8, 8, 8, 12, 16, 8]
    assert allowed[-1]["tokens"] == 16 * sum(line["global_batch_size"] for line in allowed)


def test_the_micro_batch_size_of_a_past_phase_may_change(
    one: tuple[Path, list[dict[str, float]]], blend: str, tmp_path: Path
) -> None:
    """It only rounds differently: a resume needs no --checkpoint.allow, and past and later steps stay."""
    go(tmp_path, blend, 3)
    found = go(tmp_path, blend, 6, phase_1_micro_batch_size=4)
    assert found[:3] == one[1][:3]
    for line, expected in zip(found, one[1]):
        assert line == pytest.approx(expected, rel=1e-11)


def test_dropout_draws_the_same_around_skipped_steps_and_samples(blend: str, tmp_path: Path) -> None:
    """Masks are those of step and sample: skipping shifts none, in two layouts and after a resume."""
    dropout: dict[str, Any] = {"train_dropout": 0.2, "train_attention_dropout": 0.2}
    options = dropout | {"train_skip_steps": "4", "data_skip_samples": "3 9-10"}
    whole = go(tmp_path / "whole", blend, 6, **options)
    many = go(tmp_path / "pipeline", blend, 6, **options, **LAYOUTS["pipeline"])
    for found, expected in zip(many, whole, strict=True):
        assert found == pytest.approx(expected, rel=1e-11)
    go(tmp_path / "parts", blend, 3, **options)
    assert go(tmp_path / "parts", blend, 6, **options) == whole
    plain = go(tmp_path / "plain", blend, 6, **dropout | {"data_skip_samples": "3 9-10"})
    assert plain[:3] == whole[:3] and plain[4]["loss"] != whole[4]["loss"] and "loss" not in whole[3]
    unmasked = go(tmp_path / "unmasked", blend, 1, data_skip_samples="3 9-10")
    assert unmasked[0]["loss"] != whole[0]["loss"]


LONGER: dict[str, Any] = {"phase_1_seq_len": 24, "phase_3_seq_len": 8}
LONGER |= {"phase_2_rope_theta": 50.0, "phase_3_rope_scaling": "linear", "phase_3_rope_factor": 2.0}


def test_sequence_lengths_change_in_every_layout_and_on_resume(blend: str, tmp_path: Path) -> None:
    """Lengths of 16, 24 and 8 tokens, other RoPE settings, a growing batch and changing weights."""
    whole = go(tmp_path / "whole", blend, 8, **LONGER)
    lengths = [16, 16, 24, 24, 24, 24, 8, 8]
    assert [line["tokens"] for line in whole] == list(np.cumsum(np.multiply(BATCHES, lengths)))
    for layout, options in LAYOUTS.items():
        for found, expected in zip(go(tmp_path / layout, blend, 8, **LONGER, **options), whole, strict=True):
            assert found == pytest.approx(expected, rel=1e-11)
    for stop in (2, 5, 6):
        go(tmp_path / f"stop{stop}", blend, stop, **LONGER)
        assert go(tmp_path / f"stop{stop}", blend, 8, **LONGER) == whole


def test_a_validation_after_a_skipped_step_is_in_its_phase(blend: str, tmp_path: Path) -> None:
    """The score equals that of a start after the step, which validates before it trains."""
    valid = {"data_valid": blend.split()[1], "eval_every": 3, "eval_batches": 1}
    skipped: dict[str, Any] = {"phase_1_rope_theta": 50.0, "train_skip_steps": "3"}
    found = [go(tmp_path / "now", blend, 3, **skipped, **valid)]
    go(tmp_path / "later", blend, 3, **skipped)
    found.append(go(tmp_path / "later", blend, 3, **skipped, **valid))
    found.append(go(tmp_path / "other", blend, 3, train_skip_steps="3", **valid))
    now, later, other = ([line["val_loss"] for line in lines if "val_loss" in line] for lines in found)
    assert now == later and len(now) == 1 and abs(now[0] - other[0]) > 1e-6


def test_a_phase_with_rope_needs_parts_that_take_it() -> None:
    cfg = config(phase_1_from_step=2, phase_1_rope_theta=50.0)

    def job(ctx: ParallelContext) -> None:
        state = setup(cfg, ctx)
        stage = state.stages[0]
        stage.part = SimpleNamespace(sums=())  # type: ignore[assignment]
        state.enter(state.phases.at(1))
        with raises(ConfigError, "train.part-without-rope", "phase.1 = ", "stage 0 takes no RoPE settings"):
            state.enter(state.phases.at(2))

    run_ranks(layout_of(cfg), job)


def test_a_skipped_step_consumes_the_batch_of_its_phase(
    one: tuple[Path, list[dict[str, float]]], blend: str, tmp_path: Path
) -> None:
    """The steps before it are the same, the tokens too, and the samples after it are those of the run without it."""
    found = go(tmp_path, blend, 8, train_skip_steps="5")
    assert found[:4] == one[1][:4] and [line["tokens"] for line in found] == [line["tokens"] for line in one[1]]
    assert "loss" not in found[4] and found[5]["loss"] != one[1][5]["loss"]
    assert found[5]["loss"] == pytest.approx(one[1][5]["loss"], rel=0.02)


@pytest.mark.parametrize("old", [False, True], ids=["now", "metadata of an older engine"])
def test_an_allowed_length_in_the_past_holds_from_the_checkpoint_on(blend: str, tmp_path: Path, old: bool) -> None:
    """4 steps of 16 tokens; then a phase from step 3 with 24 tokens is allowed, and the run resumes twice."""
    go(tmp_path, blend, 4)
    if old:
        folder = tmp_path / "checkpoints/step_00000004"
        manifest = read_manifest(folder)
        del manifest.data["seq_len from sample 0"]
        (folder / "manifest.json").write_bytes(manifest.encode())
    go(tmp_path, blend, 6, phase_1_seq_len=24, checkpoint_allow="phase")
    found = go(tmp_path, blend, 8, phase_1_seq_len=24)
    assert [line["tokens"] for line in found] == list(np.cumsum(np.multiply(BATCHES, [16] * 4 + [24] * 4)))
    data = read_manifest(tmp_path / "checkpoints/step_00000008").data
    lengths = {name: value for name, value in data.items() if name.startswith("seq_len")}
    assert lengths == {"seq_len from sample 0": 16, "seq_len from sample 24": 24}
