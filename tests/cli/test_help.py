"""`engine COMMAND --help`: every option has a text, many options are grouped, and the two examples parse."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
from typing import Any

import pytest

from engine.cli.common import Help, option_texts, parse, split_settings
from engine.cli.diff import DiffOptions
from engine.cli.doctor import DoctorOptions
from engine.cli.evaluate import EvaluateOptions
from engine.cli.export import ExportOptions
from engine.cli.generate import GenerateOptions
from engine.cli.import_ import ImportOptions
from engine.cli.inspect import InspectOptions
from engine.cli.main import _VERBS, _file, main
from engine.cli.merge_datasets import MergeOptions
from engine.cli.plot import PlotOptions
from engine.cli.prove import ProveOptions
from engine.cli.schedule import ScheduleOptions
from engine.cli.train import parse_train
from engine.cli.verify import VerifyOptions
from engine.config.load import load
from engine.config.schema import fields
from engine.data.clean.options import CleanOptions
from engine.data.prepare.options import PrepareOptions
from engine.data.tokenize.options import TokenizerOptions

OPTIONS: dict[str, type] = {
    "clean": CleanOptions,
    "prepare": PrepareOptions,
    "merge-datasets": MergeOptions,
    "tokenizer": TokenizerOptions,
    "inspect": InspectOptions,
    "prove": ProveOptions,
    "diff": DiffOptions,
    "evaluate": EvaluateOptions,
    "generate": GenerateOptions,
    "import": ImportOptions,
    "export": ExportOptions,
    "verify": VerifyOptions,
    "plot": PlotOptions,
    "schedule": ScheduleOptions,
    "doctor": DoctorOptions,
}
MANY = 10  # options; more must be grouped


def help_of(verb: str) -> Help:
    found = importlib.import_module(f"engine.cli.{_file(verb)}").HELP
    assert isinstance(found, Help)
    return found


def shown_help(verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def arguments(command: str) -> tuple[list[str], int]:
    """The words after `engine` of an example, and the number of ranks it starts."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        assert words[1] == "--nproc-per-node" and words[3:5] == ["-m", "engine"]
        return words[5:], int(words[2])
    assert words[0] == "engine"
    return words[1:], 1


def test_every_command_is_here() -> None:
    assert {*OPTIONS, "train"} == {*_VERBS}


@pytest.mark.parametrize("verb", OPTIONS)
def test_options_have_texts_groups_and_examples(verb: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out, help_, texts = shown_help(verb, capsys, monkeypatch), help_of(verb), option_texts(OPTIONS[verb])
    names = [field.name for field in dataclasses.fields(OPTIONS[verb])]
    assert all(texts.get(name) for name in names if name != "name")  # --name of schedule lists what there is
    for name in names:
        option = {"run": "from"}.get(name, name).replace("_", "-")
        positional = "Positional" in str(OPTIONS[verb].__annotations__[name])
        listed = re.findall(
            rf"^[^\w(-]{{0,4}}(?:--output STR, )?--{option}\b(?!-)", out.partition("examples:")[0], re.M
        )
        assert len(listed) + positional == 1, name
    grouped = [name for group in help_.groups.values() for name in group]
    assert len(grouped) == len({*grouped}) and {*grouped} <= {*names}
    if len(names) > MANY:
        assert len(help_.groups) >= 3
        assert all(out.count(f" {group} options ") == 1 for group in help_.groups)
        assert len(names) - len(grouped) <= 2  # positional ones
    assert max(map(len, out.splitlines())) <= 80 or verb == "clean"  # pii kinds
    assert out.count("\n  # ") >= 2 and out.index("examples:") > out.rindex("(default: ")


@pytest.mark.parametrize("verb", OPTIONS)
def test_the_examples_of_a_command_parse(verb: str) -> None:
    assert len(help_of(verb).examples) == 2
    for _, command in help_of(verb).examples:
        words, _ = arguments(command)
        start = 2 if verb == "tokenizer" else 1
        assert words[:start] == ["tokenizer", "train"][:start] if verb == "tokenizer" else words[0] == verb
        settings, rest = split_settings(words[start:])
        load([], settings, world=None)
        options: Any = parse(OPTIONS[verb], rest, verb, help_of(verb))
        assert not list(options.errors() if hasattr(options, "errors") else ()), command


def test_train_shows_every_section_and_its_examples_resolve(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    out = shown_help("train", capsys, monkeypatch)
    for section, name, field in fields():
        assert out.count(f"--{section}.{name} ".replace("_", "-")) >= 1 and field.description, name
    sections = {section for section, _, _ in fields()}
    assert all(out.count(f" {section.replace('_', '-')} options ") == 1 for section in sections)
    assert max(map(len, out.splitlines())) <= 80 and out.index("examples:") > out.rindex("(default: ")
    assert len(help_of("train").examples) == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text("[train]\nsteps = 200\n")
    for _, command in help_of("train").examples:
        words, world = arguments(command)
        options = parse_train(words[1:], "engine train")
        assert load(options.files, options.overrides, unknown=options.unknown, world=world, reject_idle=True)
