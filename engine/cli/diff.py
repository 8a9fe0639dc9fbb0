"""`engine diff`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from engine.cli.common import Help, parse, print_result, single_process, split_settings
from engine.errors import EXIT_ERROR, EXIT_OK, ConfigError, FieldError
from engine.util.words import NO_STRINGS, StrTuple


@dataclass
class DiffOptions:
    """Find the first tensor in which two layouts or runs differ beyond rounding.

    With a config file: two layouts of it, on a shrunk model, on up to 8 processes of this machine. With two run
    folders: the step after a checkpoint, in the layout of each. Exit code 1: a difference was found.

    Settings of `engine train` for both sides follow as --section.name VALUE.
    """

    paths: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="[CONFIG ...] | RUN_A RUN_B")] = ()
    """config files, of which later ones win; or two run folders"""
    a: StrTuple = NO_STRINGS
    """settings of side a of a config, such as parallel.tensor=2 parallel.pipeline=2"""
    b: StrTuple = NO_STRINGS
    """settings of side b"""
    precision: Literal["fp64", "fp32", "bf16", "fp16"] = "fp64"
    """of a config: dtype to compute in; in fp64 a fault is far above rounding, bf16 keeps train.fp8 too"""
    step: int | None = None
    """of runs: start from their checkpoints of this step; not set: the newest that both have"""
    steps: int = 1
    """number of steps to compare"""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print one JSON object instead of text"""


HELP = Help(
    examples=(
        (
            "Compare two tensor ranks with one process",
            "engine diff run.toml --a parallel.tensor=2 --b parallel.tensor=1",
        ),
        ("Compare the step after the checkpoints of step 100 of two runs", "engine diff runs/a runs/b --step 100"),
    ),
    groups={"layouts": ("a", "b", "precision"), "runs": ("step",)},
)


def run(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    settings, rest = split_settings(args)
    o = parse(DiffOptions, rest, "diff", HELP)
    if errors := list(_errors(o, settings)):
        raise ConfigError(errors)
    single_process("diff")
    from engine.proof.difference import first_difference
    from engine.proof.report import described, fields_of
    from engine.proof.sides import of_config, of_runs

    with tempfile.TemporaryDirectory(prefix="engine_diff_") as folder:
        notes: tuple[str, ...] = ()
        if _runs(o):
            sides, step = of_runs(o.paths[0], o.paths[1], o.step)
            notes = (f"both sides start from the checkpoint of step {step} of {o.paths[1]}",)
        else:
            given = [settings | dict(_setting(text) for text in side) for side in (o.a, o.b)]
            sides, notes = of_config(o.paths, given, o.precision, Path(folder))
        found = first_difference(sides, o.steps, Path(folder), _progress)
    print_result(described(found, sides, notes), fields_of(found, sides, notes) if o.json else None)
    return EXIT_ERROR if found.findings else EXIT_OK


def _progress(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


def _runs(o: DiffOptions) -> bool:
    return len(o.paths) == 2 and all(path.is_dir() for path in o.paths)


def _errors(o: DiffOptions, settings: Mapping[str, str]) -> Iterator[FieldError]:
    """The errors of the options."""
    if o.steps < 1:
        yield FieldError("cli.too-small", "--steps", o.steps, "is below 1", "Compare 1 step or more.")
    for option, side in (("--a", o.a), ("--b", o.b)):
        for text in side:
            if "=" not in text:
                yield FieldError("cli.not-a-setting", option, text, "has no =", "Write parallel.tensor=2, for example.")
    if _runs(o):
        precision = "" if o.precision == "fp64" else o.precision
        given = {"--a": o.a, "--b": o.b, "--precision": precision}
        yield from _without_effect({**given, **{f"--{k}": v for k, v in settings.items()}}, "a config")
        return
    for path in o.paths:
        if path.is_dir():
            fix = "Give two run folders, or config files."
            yield FieldError("cli.not-a-config", "CONFIG", str(path), "is a folder", fix)
    if o.a == o.b:
        fix = "Give each side its settings, such as --a parallel.tensor=2 --b parallel.tensor=1."
        yield FieldError("cli.sides-are-equal", "--a", " ".join(o.a), "is the same as --b", fix)
    yield from _without_effect({"--step": o.step}, "two run folders")


def _without_effect(given: dict[str, Any], needed: str) -> Iterator[FieldError]:
    for option, value in given.items():
        if value:
            yield FieldError("cli.without-effect", option, value, f"has no effect without {needed}", "Leave it out.")


def _setting(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value
