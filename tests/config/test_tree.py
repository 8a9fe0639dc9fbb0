"""Arrays of tables: rows from files and the command line, their paths, sources and errors; what is saved loads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.cli.train import parse_train
from engine.config.schema import Config, tables
from engine.config.tree import ConfigTree, given_rows, split_row_path, value_at

TOML = """
[train]
steps = 50
[[phase]]
from_step = 10
global_batch_size = 16
[[phase]]
from_step = 20
"""
Errors = list[tuple[str, str, Any, str]]


def read(tmp_path: Path, *files: str, words: tuple[str, ...] = ()) -> tuple[ConfigTree, Config, Errors]:
    """(tree, config, errors as (code, path, value, fix)) of files, then words of a command line."""
    tree = ConfigTree()
    for number, text in enumerate(files):
        (tmp_path / f"{number}.toml").write_text(text)
        tree.read_file(tmp_path / f"{number}.toml")
    for path, text in parse_train(words, "engine train").overrides.items():
        tree.put(path, text, "command line")
    config, _ = tree.parse()
    return tree, config, [(e.code, e.path, e.value, e.fix) for e in tree.errors]


def rows(config: Config) -> list[tuple[int | None, int | None]]:
    return [(phase.from_step, phase.global_batch_size) for phase in config.phase]


def test_rows_of_a_file_are_changed_and_extended_on_the_command_line(tmp_path: Path) -> None:
    words = ("--phase.2.global-batch-size", "32", "--phase.10.from_step=90", "--phase.3.from_step", "30")
    words += tuple(f"--phase.{number}.from_step={10 * number}" for number in range(4, 10))
    tree, config, errors = read(tmp_path, TOML, words=words)
    assert not errors
    assert rows(config)[:4] == [(10, 16), (20, 32), (30, None), (40, None)] and rows(config)[9] == (90, None)
    file = f"file {tmp_path / '0.toml'}"
    given = {path: tree.sources[path] for path in list(given_rows(tree))[:5]}
    assert given == {
        "phase.1.from_step": file,
        "phase.1.global_batch_size": file,
        "phase.2.from_step": file,
        "phase.2.global_batch_size": "command line",
        "phase.3.from_step": "command line",
    }
    assert value_at(config, "phase.2.global_batch_size") == 32 and value_at(config, "train.steps") == 50


def test_rows_of_a_later_file_replace_those_of_an_earlier_one(tmp_path: Path) -> None:
    tree, config, errors = read(tmp_path, TOML, "[[phase]]\nfrom_step = 5\n")
    assert not errors and rows(config) == [(5, None)] and list(given_rows(tree)) == ["phase.1.from_step"]
    assert read(tmp_path, TOML, "phase = []\n")[1].phase == ()


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("[phase]\nfrom_step = 3\n", (), ("config.not-tables", "phase", {"from_step": 3}, "[[phase]]")),
        ("phase = 3\n", (), ("config.not-tables", "phase", 3, "[[phase]]")),
        ("phase = [3]\n", (), ("config.not-tables", "phase", [3], "[[phase]]")),
        ("[[phases]]\nfrom_step = 3\n", (), ("config.unknown-setting", "phases", [{"from_step": 3}], "[[phase]]?")),
        ("[[phase]]\nform_step = 3\n", (), ("config.unknown-setting", "phase.1.form_step", 3, "phase.1.from_step?")),
        ("[[phase]]\ntau = 3\n", (), ("config.unknown-setting", "phase.1.tau", 3, "from_step, global_batch_size")),
        ("[[phase]]\nfrom_step = 0\n", (), ("config.value-not-valid", "phase.1.from_step", 0, "Give int")),
        ("[[phase]]\nfrom_step = true\n", (), ("config.value-not-valid", "phase.1.from_step", True, "Give int")),
        ("", ("--phase.1.from_step", "x"), ("config.value-not-valid", "phase.1.from_step", "x", "Give int")),
        ("", ("--phase.2.from_step", "5"), ("config.row-out-of-order", "phase.2.from_step", "5", "phase.1.")),
        ("", ("--phase.0.from_step", "5"), ("config.row-out-of-order", "phase.0.from_step", "5", "phase.1.")),
        ("", ("--phase.N.from_step", "5"), ("config.unknown-setting", "phase.N.from_step", "5", "phase.1.from_step?")),
    ],
)
def test_errors_name_the_row(tmp_path: Path, text: str, words: tuple[str, ...], expected: tuple[Any, ...]) -> None:
    _, _, errors = read(tmp_path, text, words=words)
    assert len(errors) == 1 and errors[0][:3] == expected[:3]
    assert expected[3] in errors[0][3]


def test_paths_of_rows() -> None:
    assert split_row_path("phase.12.from_step") == ("phase", 12, "from_step")
    assert all(split_row_path(path) is None for path in ("phase.x.from_step", "phase.1", "train.steps", "phase"))
    assert all(row.model_fields for row in tables().values())
