"""What several verbs share: words as options, progress that can be interrupted, and results as text or JSON."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

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


def parse(options: type[Options], args: list[str], verb: str) -> Options:
    """The options of a verb from its arguments; ends the process for --help and for what is no option."""
    return tyro.cli(options, args=args, prog=f"engine {verb}", registry=_WORDS)


def stops_on_signals(verb: Callable[[list[str], Interrupts], int]) -> Callable[[list[str]], int]:
    """The verb, ended by signals with a line on how to go on."""

    @functools.wraps(verb)
    def run(args: list[str]) -> int:
        with interruptible("nothing is written; give the same command again") as stop:
            return verb(args, stop)

    return run


def single_process(verb: str) -> None:
    """ConfigError where torchrun started several processes of a verb that runs on one."""
    from engine.distributed.env import read_env

    world = read_env().world
    if world > 1:
        fault = FieldError(
            "cli.one-process-only",
            "WORLD_SIZE",
            world,
            f"{verb} runs on one process",
            f"Start `engine {verb} ...` without torchrun.",
        )
        raise ConfigError([fault])


def print_result(text: Sequence[str], fields: Mapping[str, Any] | None = None) -> None:
    """Print lines of text, or, where they are given, the facts as one JSON object; numbers that are none are null."""
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
    """--shard-mib in bytes."""
    if not mib > 0:
        raise ConfigError(
            [FieldError("cli.not-above-zero", "--shard-mib", mib, "is not above 0", "The default is 4096.")]
        )
    return int(mib * 2**20)
