"""The phases of a run against a step-by-step count, and the errors of [[phase]] tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.load import load
from engine.config.phases import Phase, Phases, Position, model_of, phases_of, saved_model
from engine.config.schema import Config
from engine.errors import ConfigError, FieldError
from engine.pipeline.schedules import build

ROWS = st.lists(
    st.fixed_dictionaries(
        {"steps": st.integers(1, 9)},
        optional={
            "global_batch_size": st.integers(1, 6).map(lambda n: 4 * n),
            "micro_batch_size": st.sampled_from([1, 2, 4]),
            "seq_len": st.sampled_from([16, 32, 48]),
            "weights": st.dictionaries(st.sampled_from("abc"), st.integers(0, 5).map(float), min_size=1),
        },
    ),
    max_size=5,
)


def rows_of(drawn: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Phases as in a config, from phases with their distances in steps."""
    step, rows = 0, []
    for row in drawn:
        step += row["steps"]
        rows.append({"from_step": step} | {name: value for name, value in row.items() if name != "steps"})
    return rows


@settings(deadline=None)
@given(drawn=ROWS, start=st.tuples(*[st.integers(0, 20)] * 3), ranks=st.sampled_from([1, 2]))
def test_a_count_step_by_step_agrees(drawn: list[dict[str, Any]], start: tuple[int, int, int], ranks: int) -> None:
    rows = rows_of(drawn)
    cfg = Config.model_validate({"train": {"global_batch_size": 8, "seq_len": 32}, "phase": rows})
    run = phases_of(cfg).resumed(Position(*start))
    step, samples, tokens = start
    assert run.consumed(step) == Position(*start)
    while step < 60:
        step += 1
        holds: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 1, "seq_len": 32, "weights": {}}
        for row in rows:
            if row["from_step"] <= step:
                holds |= {name: value for name, value in row.items() if name in holds and name != "weights"}
                holds["weights"] = holds["weights"] | row.get("weights", {})
        phase = run.at(step)
        assert {name: getattr(phase, name) for name in holds} == holds
        assert phase.microbatches(ranks) == holds["global_batch_size"] // holds["micro_batch_size"] // ranks
        assert run.samples(step) == range(samples, samples + holds["global_batch_size"])
        samples += holds["global_batch_size"]
        tokens += holds["seq_len"] * holds["global_batch_size"]
        assert run.consumed(step) == Position(step, samples, tokens)
        assert run.steps_to_read(samples) == step
        assert run.begins(step) == any(row["from_step"] == step for row in rows)


def test_steps_before_the_origin_are_unknown() -> None:
    run = Phases((Phase(1, 8, 1, 32),), Position(5, 40, 1280))
    with pytest.raises(ValueError, match="before step 5"):
        run.consumed(4)
    for steps in ((2,), (1, 1), (1, 5, 3), ()):
        with pytest.raises(ValueError, match="expected 1"):
            Phases(tuple(Phase(step, 8, 1, 32) for step in steps))


BLEND = {"data.train": "0.5 a 0.5 b"}
CASES: dict[str, tuple[dict[str, Any], int, tuple[str, str], str]] = {
    "no step": ({"phase.1.global_batch_size": 16}, 1, ("phase.1.from_step", "config.setting-missing"), "100"),
    "nothing": ({"phase.1.from_step": 9}, 1, ("phase.1", "config.without-effect"), "from_step"),
    "order": (
        {f"phase.{n}.from_step": 9 for n in (1, 2)} | {f"phase.{n}.micro_batch_size": n for n in (1, 2)},
        1,
        ("phase.2.from_step", "config.phases-not-ascending"),
        "phase 1, which begins at step 9",
    ),
    "batch": (
        {"phase.1.from_step": 9, "phase.1.global_batch_size": 18},
        4,
        ("phase.1.global_batch_size", "config.batch-not-a-multiple"),
        "data 4 x train.micro_batch_size 1. Use 16 or 20.",
    ),
    "micro-batch": (
        {"phase.1.from_step": 9, "phase.1.micro_batch_size": 3},
        2,
        ("phase.1.micro_batch_size", "config.batch-not-a-multiple"),
        "x data 2 = 6 does not divide the global batch of 8. Use phase.1.global_batch_size 6 or 12.",
    ),
    "micro-batch of an earlier phase": (
        {f"phase.{n}.from_step": 9 * n for n in (1, 2)}
        | {"phase.1.micro_batch_size": 4, "phase.2.global_batch_size": 6},
        1,
        ("phase.2.global_batch_size", "config.batch-not-a-multiple"),
        "micro_batch_size 4. Use 4 or 8.",
    ),
    "train, whose sizes hold from step 1": (
        {"train.global_batch_size": 7, "phase.1.from_step": 1, "phase.1.seq_len": 128},
        2,
        ("train.global_batch_size", "config.batch-not-a-multiple"),
        "data 2 x train.micro_batch_size 1. Use 6 or 8.",
    ),
    "once for phases with the same sizes": (
        {f"phase.{n}.from_step": 9 * n for n in (1, 2)}
        | {"phase.1.global_batch_size": 9, "phase.2.global_batch_size": 9},
        2,
        ("phase.1.global_batch_size", "config.batch-not-a-multiple"),
        "data 2 x train.micro_batch_size 1. Use 8 or 10.",
    ),
    "plan file": (
        {"parallel.schedule": "eight.plan", "phase.1.from_step": 9, "phase.1.global_batch_size": 16},
        1,
        ("phase.1.global_batch_size", "config.plan-does-not-fit"),
        "needs 16 micro-batches; the plan file always has 8",
    ),
    "a longer sequence than the model's": (
        {f"phase.{n}.from_step": 9 * n for n in (1, 2)} | {"phase.1.seq_len": 4096, "phase.2.micro_batch_size": 2},
        1,
        ("phase.1.seq_len", "config.seq-len-too-long"),
        "model.max_seq_len = 2048",
    ),
    "a sequence that does not split": (
        {"phase.1.from_step": 9, "phase.1.seq_len": 129, "parallel.tensor": 2},
        2,
        ("phase.1.seq_len", "config.seq-len-not-a-multiple"),
        "Use 128 or 130",
    ),
    "fp8 and a micro-batch": (
        {"phase.1.from_step": 9, "phase.1.seq_len": 24, "train.fp8": "tensorwise", "train.precision": "bf16"},
        1,
        ("phase.1.seq_len", "config.fp8-size-not-a-multiple"),
        "16",
    ),
    "RoPE of learned positions": (
        {"phase.1.from_step": 9, "phase.1.rope_theta": 1e6, "model.positions": "learned"},
        1,
        ("phase.1.rope_theta", "config.without-effect"),
        "learned",
    ),
    "a factor without scaling": (
        {"phase.1.from_step": 9, "phase.1.rope_factor": 8.0},
        1,
        ("phase.1.rope_factor", "config.without-effect"),
        "linear",
    ),
    "another scaling": (
        {"phase.1.from_step": 9, "phase.1.rope_scaling": "yarm"},
        1,
        ("phase.1.rope_scaling", "config.value-not-valid"),
        "Give none|linear|llama3|yarn, or leave it out.",
    ),
    "crossed bounds": (
        {"phase.1.from_step": 9, "phase.1.rope_scaling": "yarn", "phase.1.rope_beta_slow": 40.0},
        1,
        ("phase.1.rope_beta_slow", "config.rope-bounds-crossed"),
        "32",
    ),
    "a factor that a later scaling does not use": (
        {f"phase.{n}.from_step": 9 * n for n in (1, 2)}
        | {"phase.1.rope_scaling": "yarn", "phase.1.rope_factor": 4.0, "phase.2.rope_scaling": "none"},
        1,
        ("phase.2.rope_scaling", "config.without-effect"),
        "does not fit rope_factor 4.0 of phase 1, which has no effect for rope_scaling none. "
        "Give phase.2.rope_factor = 1.",
    ),
    "the length before a longer one": (
        {"phase.1.from_step": 9, "phase.1.rope_scaling": "yarn", "phase.1.rope_factor": 4.0, "phase.1.seq_len": 512},
        1,
        ("phase.1.rope_original_seq_len", "config.setting-missing"),
        "phase.1.rope_original_seq_len: is not given",
    ),
    "lengths of epochs": (
        {"data.train": "epochs.toml", "phase.1.from_step": 9, "phase.1.seq_len": 64},
        1,
        ("phase.1.seq_len", "config.settings-contradict"),
        "have epochs",
    ),
    "weights of one corpus": (
        {"data.train": "a", "phase.1.from_step": 9, "phase.1.weights": "1 a"},
        1,
        ("phase.1.weights", "config.without-effect"),
        "one corpus",
    ),
    "weights without a corpus": (
        {"phase.1.from_step": 9, "phase.1.weights": "1 a"},
        1,
        ("phase.1.weights", "config.setting-missing"),
        "data.train",
    ),
    "weights of epochs": (
        {"data.train": "epochs.toml", "phase.1.from_step": 9, "phase.1.weights": "1 a"},
        1,
        ("phase.1.weights", "config.settings-contradict"),
        "have epochs",
    ),
    "another source": (
        BLEND | {"phase.1.from_step": 9, "phase.1.weights": "1 c"},
        1,
        ("phase.1.weights", "config.mixture-unknown-source"),
        "Sources: a, b.",
    ),
    "no source left": (
        BLEND | {f"phase.{n}.from_step": 9 * n for n in (1, 2)} | {"phase.1.weights": "0 a", "phase.2.weights": "0 b"},
        1,
        ("phase.2.weights", "config.mixture-empty"),
        "weight above 0",
    ),
    "a weight that is too small": (
        BLEND | {"phase.1.from_step": 9, "phase.1.weights": "1e-7 a"},
        1,
        ("phase.1.weights", "samples.blend-weights"),
        "= 'a': has a share of 2.0e-07",
    ),
    "a weight of data.train that is too small": (
        {"data.train": "1 x/a 1e-7 x/b"},
        1,
        ("data.train", "samples.blend-weights"),
        "= 'b': has a share of 1.0e-07",
    ),
    "weights in pairs": (
        BLEND | {"phase.1.from_step": 9, "phase.1.weights": "1 a 2"},
        1,
        ("phase.1.weights", "config.value-not-valid"),
        "in turn",
    ),
    "weights that are none": (
        BLEND | {"phase.1.from_step": 9, "phase.1.weights": "a 1"},
        1,
        ("phase.1.weights", "config.value-not-valid"),
        "in turn",
    ),
    "negative weights": (
        BLEND | {"phase.1.from_step": 9, "phase.1.weights": "-1 a"},
        1,
        ("phase.1.weights", "config.value-not-valid"),
        "greater than or equal to 0",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_error_is_reported_once(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("eight.plan").write_text(str(build("1f1b", 1, 1, 8)))
    sources = "".join(f'[[source]]\nprefix = "{name}"\nepochs = 1\n' for name in "ab")
    Path("epochs.toml").write_text(sources)
    overrides, world, expected, text = CASES[case]
    with pytest.raises(ConfigError) as caught:
        load([], {name: str(value) for name, value in overrides.items()}, world=world)
    (error,) = caught.value.errors
    assert isinstance(error, FieldError) and (error.path, error.code) == expected and text in str(error)


def test_a_plan_file_serves_phases_with_the_same_number_of_micro_batches(tmp_path: Path) -> None:
    file = tmp_path / "eight.plan"
    file.write_text(str(build("1f1b", 1, 1, 8)))
    rows = {"phase.1.from_step": "9", "phase.1.global_batch_size": "16", "phase.1.micro_batch_size": "2"}
    derived = load([], {"parallel.schedule": str(file)} | rows).derived
    assert [derived.plan_of(phase) for phase in derived.phases.phases] == [derived.first_plan] * 2


def test_a_phase_from_step_1_replaces_the_values_of_train() -> None:
    values = {"train.global_batch_size": "7", "parallel.data": "2", "phase.1.from_step": "1"}
    derived = load([], values | {"phase.1.global_batch_size": "16"}, world=2).derived
    assert [phase.global_batch_size for phase in derived.phases.phases] == [16]
    assert derived.first_plan.microbatches == 8


def test_what_is_saved_loads_back(tmp_path: Path) -> None:
    rows = {"phase.1.from_step": "9", "phase.1.global_batch_size": "16", "phase.2.from_step": "20"}
    resolved = load([], BLEND | rows | {"phase.2.weights": "0.1 a 1e-3 b"})
    assert resolved.sources["phase.2.weights"] == "command line" and "phase.1.weights" not in resolved.sources
    (tmp_path / "config.toml").write_text(resolved.toml())
    again = load([tmp_path / "config.toml"], {})
    assert again.config == resolved.config and again.config.phase[1].weights == {"a": 0.1, "b": 0.001}
    assert Config.model_validate(resolved.config.model_dump(mode="json")) == resolved.config


def test_rope_settings_add_up_and_checkpoints_have_those_of_their_step() -> None:
    values = {"phase.1.from_step": "5", "phase.1.rope_theta": "5e5", "phase.2.from_step": "9"}
    cfg = load([], values | {"phase.2.rope_scaling": "yarn", "phase.2.rope_factor": "4.0"}).config
    expected = {4: (1e4, "none", 0), 5: (5e5, "none", 0), 8: (5e5, "none", 0), 9: (5e5, "yarn", 2048)}
    for step, settings_then in ({0: expected[4]} | expected).items():
        model = model_of(cfg.model, phases_of(cfg).at(step))
        assert (model.rope_theta, model.rope_scaling, model.rope_original_seq_len) == settings_then
        assert saved_model(cfg.model_dump(mode="json"), step) == model.model_dump()
    assert saved_model({"model": {"rope_theta": 3.0}}, 7) == {"rope_theta": 3.0}  # of an older engine


def test_a_phase_can_go_back_to_no_scaling_and_is_saved_so(tmp_path: Path) -> None:
    """The length of a scaling's context stays with the model, and is read by nothing."""
    values = {"model.rope_scaling": "yarn", "model.rope_factor": "4.0", "phase.1.from_step": "9"}
    resolved = load([], values | {"phase.1.rope_scaling": "none", "phase.1.rope_factor": "1"})
    (tmp_path / "config.toml").write_text(resolved.toml())
    assert load([tmp_path / "config.toml"], {}).config == resolved.config
