"""`engine train`. Its options are generated from the config schema.

They are read as text and checked together with the TOML files (engine.config.load), so that one start reports every
error of both.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from engine.cli.common import Help, print_end_of_help
from engine.cli.sheet_options import SheetOptions
from engine.config.presets import PRESETS
from engine.errors import ConfigError, FieldError
from engine.util.signals import StopRequest

_UNSET = "\0"


@dataclass(frozen=True)
class TrainOptions:
    """The command line of a training run, not yet checked. overrides: dotted path -> text."""

    files: tuple[Path, ...]
    overrides: Mapping[str, str]
    unknown: tuple[str, ...]
    dry_run: bool
    sheet: SheetOptions
    world_size: int


def parse_train(args: Sequence[str], prog: str) -> TrainOptions:
    """Read `--config FILE`, `--section.name VALUE`, `--dry-run` and `--world-size N`."""
    parsed: Any
    try:
        parsed, rest = tyro.cli(
            _train_type(args), args=list(args), prog=prog, description=_SUMMARY, return_unknown_args=True
        )
    except SystemExit as end:
        if end.code == 0:  # after --help
            print_end_of_help(_NOTES, HELP)
        raise
    given = dataclasses.asdict(parsed)
    overrides = dict(_flat({name: value for name, value in given.items() if isinstance(value, dict)}))
    unknown = _unknown(rest)
    sheet = SheetOptions(**{field.name: given[field.name] for field in dataclasses.fields(SheetOptions)})
    return TrainOptions(tuple(given["config"]), overrides, unknown, given["dry_run"], sheet, given["world_size"])


def _unknown(rest: Sequence[str]) -> tuple[str, ...]:
    """Unknown options without their values, and words that belong to no option (such as a file without --config)."""
    found: list[str] = []
    value_may_follow = False
    for word in rest:
        option, equals, _ = word.partition("=")
        if word.startswith("--"):
            found.append(option)
        elif not value_may_follow:
            found.append(word)
        value_may_follow = word.startswith("--") and not equals
    return tuple(found)


_SUMMARY = "Train a model, on one process or on many under torchrun."
_NOTES = (
    "Each value comes from the last of these that gives it: default, preset, initial weights (checkpoint.init), config "
    "files in the order given, command line. `--dry-run` prints the resolved config, the layout and its memory, and "
    "starts nothing.",
)
HELP = Help(
    examples=(
        (
            "Train the smallest preset on one process",
            "engine train --model.preset tiny --data.train corpus/web-train --run.dir runs/demo --train.steps 200",
        ),
        (
            "Train a config file on 8 ranks, each matrix split across 2 and the layers across 2, with validation",
            "torchrun --nproc-per-node 8 -m engine train --config run.toml --parallel.tensor 2 --parallel.pipeline 2 "
            "--data.valid corpus/web-valid --eval.every 100",
        ),
        (
            "Show the memory of each rank, and whether it fits into GPUs of 80 GiB; starts nothing",
            "engine train --config run.toml --dry-run --world-size 64 --gpu-memory 80",
        ),
    ),
)


def _train_type(args: Sequence[str]) -> type:
    # pydantic and all checks: a tenth of a second that only training needs
    from engine.config.schema import Config, fields, tables

    sections: dict[str, list[Any]] = {}
    for section, name, field in fields():
        default = json.dumps(field.default) if isinstance(field.default, str | bool) else field.default
        sections.setdefault(section, []).append(_option(name, field, f"(default: {default})"))
    docs = {section: info.annotation.__doc__ or "" for section, info in Config.model_fields.items() if info.annotation}
    for table, row in tables().items():
        section, _, name = table.partition(".")
        docs[table] = row.__doc__ or ""
        options = [_option(name, field, "(default: not given)") for name, field in row.model_fields.items()]
        kind = _options_type(table, options, docs[table])
        rows = [_part(f"row{place}", kind, place) for place in _row_places(table, args)]
        if name:
            sections[section].append(_part(name, _options_type(f"{table} rows", rows, "")))
        else:
            sections[section] = rows
    members: list[Any] = [
        ("config", tyro.conf.UseAppendAction[tuple[Annotated[Path, tyro.conf.arg(metavar="FILE")], ...]], ()),
        ("dry_run", tyro.conf.FlagCreatePairsOff[bool], False),
        ("full", tyro.conf.FlagCreatePairsOff[bool], False),
        ("world_size", int, 0),
        ("gpu_memory", Annotated[float | None, tyro.conf.arg(metavar="GIB")], None),
        ("mfu", float, SheetOptions.mfu),
        ("explain", Annotated[str, tyro.conf.arg(metavar="TERM")], ""),
        ("json", tyro.conf.FlagCreatePairsOff[bool], False),
    ]
    texts = {
        "config": "TOML file with sections as below; may be given several times, later files win",
        "dry_run": "print config, layout and memory for any number of ranks, then exit; starts no processes",
        "full": "with --dry-run: also print the settings that have their defaults",
        "gpu_memory": "with --dry-run: GiB of a device; says whether the run fits, else by how much it does "
        "not and which changes make it fit, with exit code 1",
        "mfu": "with --dry-run: model FLOPs utilisation in percent, for the days of the run",
        "explain": "with --dry-run: print how a term of the memory sheet is computed, such as activations",
        "json": "with --dry-run: print one JSON object, sizes in bytes",
        "world_size": "with --dry-run: number of ranks; 0: the product of the degrees",
    }
    named: list[Any] = [
        (name, Annotated[kind, tyro.conf.arg(help=texts[name])], dataclasses.field(default=default))
        for name, kind, default in members
    ]
    named += [
        _part(section, _options_type(section, sections[section], docs[section])) for section in Config.model_fields
    ]
    return dataclasses.make_dataclass("TrainArguments", named)


def _option(name: str, field: Any, hint: str) -> Any:
    """Field of a dataclass for tyro: one setting, read as text. field: pydantic's FieldInfo."""
    from engine.config.section import type_name

    text = field.description or ""
    if name == "preset":
        text += f": {', '.join(PRESETS)}"
    kind = type_name(field.annotation)
    metavar = kind if "|" in kind else kind.upper()
    note = tyro.conf.arg(help=text.replace("\n", " "), help_behavior_hint=hint, metavar=metavar)
    return name, Annotated[str, note], dataclasses.field(default=_UNSET)


def _options_type(name: str, entries: list[Any], doc: str) -> type:
    made = dataclasses.make_dataclass(f"{name.title().replace('.', ' ').replace(' ', '')}Options", entries)
    made.__doc__ = doc
    return made


def _part(name: str, kind: type, shown: str = "") -> Any:
    """Field of a dataclass for tyro: a group of options. shown: its part of the option's name if not `name`."""
    noted = Annotated[kind, tyro.conf.arg(name=shown)] if shown else kind
    return name, noted, dataclasses.field(default_factory=kind)


def _row_places(table: str, args: Sequence[str]) -> list[str]:
    """Numbers of the rows of a table that the words name, in order; N, for the help text, if they name none."""
    found = {number for word in args for number in re.findall(rf"^--{re.escape(table)}\.(\d+)\.", word)}
    return sorted(found, key=int) or ["N"]


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(dotted path, text) of each given setting. values: as parsed by tyro, nested; row1 is row 1 of a table."""
    for name, value in values.items():
        name = name.removeprefix("row") if name[3:].isdecimal() or name == "rowN" else name
        if isinstance(value, dict):
            yield from ((f"{name}.{path}", text) for path, text in _flat(value))
        elif value != _UNSET:
            yield name, value


def run(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    stop = StopRequest()  # first, because the imports below take seconds
    options = parse_train(args, "engine train")
    if errors := [*_world_errors(options), *options.sheet.errors(dry_run=options.dry_run)]:
        raise ConfigError(errors)
    if options.dry_run:
        stop.release()
        return _dry_run(options)
    from engine.cli.output import survive_lost_output
    from engine.config.load import load
    from engine.data.samples.special import check
    from engine.distributed.env import read_env, write_exit_code
    from engine.distributed.launch import leave
    from engine.distributed.launch import run as run_on_ranks
    from engine.monitor.ending import ExitRecord
    from engine.train.loop import train
    from engine.train.state import check_groups, mesh_of

    survive_lost_output()  # a run of weeks must survive the closing of its terminal
    env = read_env()
    try:
        resolved = load(options.files, options.overrides, unknown=options.unknown, world=env.world, reject_idle=True)
        resolved = resolved.with_absolute_paths()
        mesh = mesh_of(resolved.config, resolved.derived, env)
        check(resolved.config)
        check_groups(resolved.config)
    except ConfigError as error:
        write_exit_code(error.exit_code)
        if env.rank > 0:  # every rank finds the same errors: rank 0 reports them, then torchrun ends the others
            stop.release()  # torchrun's SIGTERM ends the wait; without it each rank would repeat the report
            time.sleep(30)
        raise
    exit_record = ExitRecord(Path(resolved.config.run.dir))
    code = run_on_ranks(lambda ctx: train(resolved, ctx, stop, exit_record), env, mesh, on_error=exit_record.write)
    return leave(code, env)


def _world_errors(options: TrainOptions) -> Iterator[FieldError]:
    fix = "Use 0 for the product of the degrees."
    if options.world_size < 0:
        yield FieldError("cli.bad-world-size", "--world-size", options.world_size, "is not a number of ranks", fix)
    elif options.world_size and not options.dry_run:
        problem = "has no effect without --dry-run: torchrun sets the number of ranks"
        yield FieldError("cli.bad-world-size", "--world-size", options.world_size, problem, fix)


def _dry_run(options: TrainOptions) -> int:
    """The dry run. Needs no torch, unless settings name special tokens of a tokenizer."""
    from engine.config.load import load

    world = options.world_size or None
    resolved = load(options.files, options.overrides, unknown=options.unknown, world=world, reject_idle=True)
    from rich.console import Console

    from engine.cli.dry_run import show
    from engine.model.build import parameter_specs
    from engine.optim.groups import group_errors

    cfg = resolved.config
    if cfg.data.tokenizer and (cfg.data.fim_rate or cfg.data.mask_tokens):
        from engine.data.samples.special import check

        check(cfg)
    errors = list(group_errors(parameter_specs(cfg.model), cfg.optimizer))
    if options.sheet.gpu_memory is not None and cfg.train.device == "cpu":
        fix = "Give one of the two."
        errors.append(FieldError("cli.no-gpu", "--gpu-memory", options.sheet.gpu_memory, "with train.device cpu", fix))
    if errors:
        raise ConfigError(errors)
    return show(resolved, Console(), options.sheet)
