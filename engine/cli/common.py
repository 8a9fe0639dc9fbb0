"""Shared by several commands: option parsing, `--help` with groups and examples, and results as text or JSON."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import math
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import tyro

from engine.errors import ConfigError, FieldError
from engine.util.signals import Interrupts, interruptible
from engine.util.words import StrTuple

Options = TypeVar("Options")
_WORDS = tyro.constructors.ConstructorRegistry()


@_WORDS.primitive_rule
def _words(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    if info.type is not StrTuple:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[STR [STR ...]]",
        instance_from_str=StrTuple,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=list,
    )


@dataclasses.dataclass(frozen=True)
class Help:
    """The parts of a command's `--help` that its options do not contain.

    examples: (what it does, command line), printed last. groups: title -> names of the options shown together, in
    order; an option without a group is under "options".
    """

    examples: tuple[tuple[str, str], ...]
    groups: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def parse(options: type[Options], args: list[str], command: str, help_: Help) -> Options:
    """Build the options of a command from its arguments. Exits the process after --help and for an unknown option."""
    prog = f"engine {command}"
    if {"-h", "--help"} & {*args}:
        summary, *notes = inspect.cleandoc(options.__doc__ or "").split("\n\n")
        with suppress(SystemExit):
            tyro.cli(_help_type(options, help_), args=["--help"], prog=prog, description=summary)
        print_end_of_help(notes, help_)
        sys.exit(0)
    return tyro.cli(options, args=args, prog=prog, registry=_WORDS)


def print_end_of_help(notes: Sequence[str], help_: Help) -> None:
    """Print what follows the options in a `--help`: paragraphs of notes and the examples."""
    for note in notes:
        print(f"\n{textwrap.fill(note, 80)}")
    print("\nexamples:")
    for text, command in help_.examples:
        print(f"\n{textwrap.indent(textwrap.fill(text, 76), '  # ')}\n{_folded(command)}")


def _folded(command: str) -> str:
    """The command line on lines of at most 80 columns where its options allow it, each continued by a backslash."""
    lines = [""]
    for number, part in enumerate(command.split(" --")):
        part = f"--{part}" if number else part
        if lines[-1] and len(lines[-1]) + len(part) > 74:
            lines.append(part)
        else:
            lines[-1] = f"{lines[-1]} {part}".strip()
    return textwrap.indent(" \\\n  ".join(lines), "  ")


def split_settings(args: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The settings --section.name VALUE among the words of a command, by dotted path, and the other words.

    Raises ConfigError for a setting without a value.
    """
    settings: dict[str, str] = {}
    rest: list[str] = []
    words = iter(args)
    for word in words:
        option, equals, value = word.partition("=")
        if not option.startswith("--") or "." not in option:
            rest.append(word)
            continue
        text = value if equals else next(words, None)
        if text is None:
            fix = f"Write {option} VALUE."
            raise ConfigError([FieldError("cli.setting-without-value", option, None, "has no value", fix)])
        settings[option[2:].replace("-", "_")] = text
    return settings, rest


def option_texts(options: type) -> dict[str, str]:
    """The help text of each option: the string below its field, in the class or else in a base class."""
    texts: dict[str, str] = {}
    for cls in reversed(options.__mro__[:-1]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(field.target, ast.Name):
                texts[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return texts


def _help_type(options: type, help_: Help) -> type:
    """A dataclass with the same options, nested by group: tyro prints a box for each nested dataclass."""
    texts, hints = option_texts(options), typing.get_type_hints(options, include_extras=True)
    group_of = {name: group for group, names in help_.groups.items() for name in names}
    members: dict[str, list[Any]] = {}
    for field in dataclasses.fields(options):
        default: list[Any] = []
        if field.default is not dataclasses.MISSING:
            default = [dataclasses.field(default=field.default if isinstance(field.default, bool) else "")]
        entry = (field.name, _help_field(field, hints[field.name], texts.get(field.name, "")), *default)
        members.setdefault(group_of.get(field.name, ""), []).append(entry)
    make = functools.partial(dataclasses.make_dataclass, kw_only=True)  # options with a default may come first
    groups = {title: make(title, members[title]) for title in help_.groups}
    nested = [(f"group_{title}", Annotated[kind, tyro.conf.arg(name=title)]) for title, kind in groups.items()]
    return make("options", [*members.get("", ()), *nested])


def _help_field(field: dataclasses.Field[Any], annotation: Any, text: str) -> Any:
    """The annotation that shows one option with its help text, kind of value and default."""
    kind, *notes = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    given = next((note for note in notes if hasattr(note, "aliases")), None)  # a tyro.conf.arg of the option
    shown = tyro.conf.arg(
        name=getattr(given, "name", None),
        aliases=getattr(given, "aliases", None),
        help=getattr(given, "help", None) or text,
        metavar=_metavar(kind),
        help_behavior_hint=_default_text(field, kind),
        prefix_name=False,
    )
    kept = [note for note in notes if note is not given and note is not tyro.conf.UseAppendAction]
    return Annotated[(bool if kind is bool else str, *kept, shown)]


def _metavar(kind: Any) -> str | None:
    if get_origin(kind) is tuple:
        return f"{_metavar(get_args(kind)[0])} ..."
    if get_origin(kind) in (Union, UnionType):
        return _metavar(next(part for part in get_args(kind) if part is not type(None)))
    if get_origin(kind) is Literal:
        return "|".join(map(str, filter(None, get_args(kind))))
    if kind is StrTuple:
        return "STR ..."
    return {int: "INT", float: "FLOAT", Path: "PATH", str: "STR", bool: None}[kind]


def _default_text(field: dataclasses.Field[Any], kind: Any) -> str:
    default = field.default
    if default is dataclasses.MISSING:
        return "(required)"
    if kind is bool:
        return f"(default: --{'' if default else 'no-'}{field.name.replace('_', '-')})"
    if default is None or default == ():
        return "(default: not set)"
    if isinstance(default, tuple):
        return f"(default: {' '.join(map(str, default))})"
    return f"(default: {json.dumps(default) if isinstance(default, str) else default})"


def stops_on_signals(verb: Callable[[list[str], Interrupts], int]) -> Callable[[list[str]], int]:
    """Decorator: a signal ends the command at a safe point, with a line that says how to resume."""

    @functools.wraps(verb)
    def run(args: list[str]) -> int:
        with interruptible("nothing is written; give the same command again") as stop:
            return verb(args, stop)

    return run


def single_process(verb: str) -> None:
    """Raise ConfigError if torchrun started several processes of a command that runs on one."""
    from engine.distributed.env import read_env

    world = read_env().world
    if world > 1:
        error = FieldError(
            "cli.one-process-only",
            "WORLD_SIZE",
            world,
            f"{verb} runs on one process",
            f"Start `engine {verb} ...` without torchrun.",
        )
        raise ConfigError([error])


def print_result(text: Sequence[str], fields: Mapping[str, Any] | None = None) -> None:
    """Print the lines of text, or with `fields` one JSON object instead. Values that are not finite become null."""
    for line in text if fields is None else ():
        print(line)
    if fields is not None:
        print(json.dumps(_finite(fields)))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shard_bytes(mib: float) -> int:
    """Convert --shard-mib to bytes. Raises ConfigError unless it is above 0."""
    if not mib > 0:
        raise ConfigError(
            [FieldError("cli.not-above-zero", "--shard-mib", mib, "is not above 0", "The default is 4096.")]
        )
    return int(mib * 2**20)
