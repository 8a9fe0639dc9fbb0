"""Renamed settings: the old name is an error in user input and is translated in files that the engine wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.cli.main import main
from engine.config.load import load
from engine.config.renames import SETTINGS, to_current_names
from engine.config.schema import Config, fields
from engine.errors import ConfigError
from tests.support.errors import raises

KNOWN = {f"{section}.{name}" for section, name, _ in fields()}
VALUES = {"kind": '"linear"', "min_lr_ratio": "0.25"}  # of the others: 7
OLD_TREE = {"schedule": {"kind": "linear", "warmup_steps": 7}, "train": {"eval_every": 7, "steps": 9}, "eval": {}}
OLD_TOML = "[schedule]\nkind = 'linear'\nwarmup_steps = 7\n[train]\neval_every = 7\nsteps = 9\n"


def test_old_names_are_gone_and_new_ones_are_there() -> None:
    assert not SETTINGS.keys() & KNOWN and set(SETTINGS.values()) <= KNOWN


@pytest.mark.parametrize(("old", "new"), SETTINGS.items())
def test_an_old_name_is_an_error_that_names_the_new_one(
    old: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section, name = old.split(".")
    value, file = VALUES.get(name, "7"), tmp_path / "config.toml"
    file.write_text(f"[{section}]\n{name} = {value}\n")
    with raises(ConfigError, "config.renamed", old, new, "7" if value == "7" else value.strip('"')):
        load([file], {})
    for words in ((f"--{old}", value), (f"--{old.replace('_', '-')}={value}",)):
        with pytest.raises(SystemExit) as left:
            main(["train", *words, "--dry-run"])
        assert left.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  - ")]
        assert line.startswith(f"  - {old} = ") and line.endswith(f" Use {new}. [config.renamed]"), line


def test_what_a_run_saved_is_read_as_it_is_meant(tmp_path: Path) -> None:
    now = to_current_names(OLD_TREE)
    assert now == {
        "lr_schedule": {"kind": "linear", "warmup_steps": 7},
        "train": {"steps": 9},
        "eval": {"every": 7},
    }
    assert to_current_names(now) == now and to_current_names(Config().model_dump()) == Config().model_dump()
    file = tmp_path / "config.toml"
    file.write_text(OLD_TOML)
    with raises(ConfigError, "config.renamed", "train.eval_every", "eval.every"):
        load([file], {})  # a user's file of that name
    (tmp_path / "metrics.jsonl").touch()
    config = load([file], {}).config
    assert (config.lr_schedule.kind, config.lr_schedule.warmup_steps) == ("linear", 7)
    assert (config.eval.every, config.train.steps) == (7, 9)
