"""Settings without effect are errors if they were given, and only then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config.idle import RULES, idle
from engine.config.load import load
from engine.config.presets import PRESETS
from engine.errors import ConfigError

# setting: a value without effect by itself, and what gives it one
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "eval.every": (5, {"data.valid": "v"}),
    "eval.batches": (3, {"data.valid": "v"}),
    "train.loss_scale": (4.0, {"train.precision": "fp16"}),
    "train.loss_scale_window": (7, {"train.precision": "fp16"}),
    "lr_schedule.min_lr_ratio": (0.5, {"lr_schedule.kind": "linear"}),
    "checkpoint.keep": (2, {"checkpoint.every": 5}),
    "checkpoint.keep_every": (10, {"checkpoint.every": 5}),
    "checkpoint.async_save": (False, {"checkpoint.every": 5}),
    "checkpoint.allow": ("train.seq_len", {"checkpoint.resume": "auto"}),
    "checkpoint.init": ("", {}),
    "parallel.overlap_gather": (False, {"parallel.zero": 1}),
    "data.fim_spm_rate": (0.25, {"data.fim_rate": 0.5, "data.tokenizer": "t"}),
    "model.rope_theta": (5e5, {"model.positions": "rope"}),
    "model.qk_norm_span": ("projection", {"model.qk_norm": True}),
    "lr_schedule.warmup_steps": (101, {"train.steps": 101}),
    "monitor.timeline_step": (101, {"train.steps": 101}),
    "train.recompute_layers": (5, {"model.num_layers": 5}),
}
OTHER_SETTINGS = {  # what makes it idle where the defaults do not
    "lr_schedule.min_lr_ratio": {"lr_schedule.kind": "constant"},
    "checkpoint.keep_every": {"checkpoint.keep": 2},
    "checkpoint.allow": {"checkpoint.resume": "never"},
    "parallel.overlap_gather": {"parallel.zero": 0},
    "model.rope_theta": {"model.positions": "learned"},
    "train.recompute_layers": {"train.recompute": "full"},
}


def paths(values: dict[str, Any], files: tuple[Path, ...] = ()) -> list[str]:
    try:
        load(files, {k: str(v) for k, v in values.items()}, reject_idle=True)
    except ConfigError as error:
        return [fault.path for fault in error.errors]
    return []


@pytest.mark.parametrize("path", [path for path in RULES if path != "checkpoint.init"])
def test_a_setting_without_effect_is_refused_where_it_was_given(path: str, tmp_path: Path) -> None:
    value, effective = CASES[path]
    others = OTHER_SETTINGS.get(path, {})
    assert path in paths({path: value} | others)
    assert path not in paths(others), "a default is nobody's mistake"
    assert path not in paths(others | {path: value} | effective)
    section, name = path.split(".")
    text = f'"{value}"' if isinstance(value, str) else str(value).lower()
    file = tmp_path / "run.toml"
    file.write_text(f"[{section}]\n{name} = {text}\n")
    assert path in paths(others, (file,))


def test_every_rule_has_a_case() -> None:
    assert RULES.keys() == CASES.keys()


def test_weights_to_start_from_contradict_a_checkpoint_to_go_on_from() -> None:
    given = {"checkpoint.init": "w", "checkpoint.resume": "latest"}
    config = load([], {}).config
    start = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"init": "w", "resume": "latest"})}
    )
    reported = list(idle(start, dict.fromkeys(given, "command line"), given_by={"command line"}))
    assert [fault.path for fault in reported] == ["checkpoint.init"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_that_was_written_loads_back(preset: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(load([], {"model.preset": preset, "train.steps": "4", "train.seq_len": "64"}).toml())
    assert paths({}, (file,)) == []


def test_a_default_that_was_typed_counts() -> None:
    assert paths({"train.loss_scale": 65536.0}) == ["train.loss_scale"]


def test_the_first_part_of_a_longer_schedule_may_end_in_its_warm_up() -> None:
    assert paths({"train.steps": 50, "lr_schedule.warmup_steps": 100, "lr_schedule.horizon_steps": 1000}) == []
    assert paths({"train.steps": 50, "lr_schedule.warmup_steps": 100}) == ["lr_schedule.warmup_steps"]
