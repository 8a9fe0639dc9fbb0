"""Parse `data.train`: one corpus, or a blend of several with weights, token budgets or epochs. Opens no data file.

corpus/web-train                                 one corpus
0.7 corpus/web-train 0.3 corpus/code-train       weights and prefixes in turn
mix.toml                                         the same as a file, with names, budgets and changes:

    [[source]]
    prefix = "corpus/web-train"
    weight = 0.7                # or tokens = 2_000_000_000, or epochs = 1.5: one kind for all sources
    name = "web"                # in metrics; default: the last part of the prefix
    fim = false                 # no fill-in-the-middle for this source, even if data.fim_rate is above 0

    [[change]]                  # only with weights: in force after this optimizer step
    step = 1000
    weights = { web = 0.2 }     # other sources keep their weight; 0: exclude it
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, FieldError

KINDS = ("weight", "tokens", "epochs")
PATH = "data.train"
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?|\.[0-9]+([eE][+-]?[0-9]+)?")
_LARGEST = Fraction(10) ** 18


@dataclass(frozen=True)
class Change:
    """Amounts in force after `step` optimizer steps: amounts[k] >= 0 of source k."""

    step: int
    amounts: tuple[Fraction, ...]


@dataclass(frozen=True)
class Mixture:
    """Names and prefixes of the sources, and their amounts over the steps; the first change is at step 0.

    kind: unit of the amounts, one of KINDS. fim: whether fill-in-the-middle applies to each source; None: not given.
    """

    names: tuple[str, ...]
    prefixes: tuple[str, ...]
    kind: str
    changes: tuple[Change, ...]
    fim: tuple[bool | None, ...]


def read_mixture(text: str) -> Mixture:
    """Parse the text of `data.train`. Raises ConfigError with all errors found."""
    words = text.split()
    if text.endswith(".toml"):
        return _read_file(text)
    if len(words) == 1 or Path(f"{text}.idx").exists():  # a prefix may contain spaces
        return Mixture((_name(text),), (text,), "weight", (Change(0, (Fraction(1),)),), (None,))
    weights = [(word, _amount(word)) for word in words[::2]]
    errors = [
        FieldError(
            "config.mixture-weight-not-valid",
            PATH,
            word,
            "is not a weight above 0",
            "Write WEIGHT PREFIX WEIGHT PREFIX ...",
        )
        for word, n in weights
        if not n
    ]
    if len(words) % 2:
        errors.append(
            FieldError(
                "config.mixture-not-pairs",
                PATH,
                text,
                "is not a list of weights and prefixes in turn",
                "Write WEIGHT PREFIX WEIGHT PREFIX ...",
            )
        )
    if not errors:
        errors = list(_repeated(words[1::2], "is given twice", "Add up its weights."))
    if errors:
        raise ConfigError(errors)
    names = _names(words[1::2])
    changes = (Change(0, tuple(n for _, n in weights if n)),)
    return Mixture(names, tuple(words[1::2]), "weight", changes, (None,) * len(names))


def _name(prefix: str) -> str:
    return Path(prefix).name


def _names(prefixes: list[str]) -> tuple[str, ...]:
    """The last parts of the prefixes, or the whole prefixes if two last parts are equal."""
    short = tuple(map(_name, prefixes))
    return short if len(set(short)) == len(short) else tuple(prefixes)


def _amount(value: object) -> Fraction | None:
    """An exact number from text or TOML; None for anything else and for numbers above 1e18."""
    text = repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not _NUMBER.fullmatch(text) or len(text) > 40:
        return None
    exponent = text.lower().partition("e")[2]
    if exponent and abs(int(exponent)) > 30:  # Fraction would compute the power of ten
        return None
    number = Fraction(text)
    return number if number <= _LARGEST else None


def _repeated(values: list[str], problem: str, fix: str) -> Iterator[FieldError]:
    for value in dict.fromkeys(value for value in values if values.count(value) > 1):
        yield FieldError("config.mixture-repeated", PATH, value, problem, fix)


def _read_tables(path: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[FieldError]]:
    """(sources, changes, errors of other keys) of a blend file. Raises ConfigError if it cannot be read."""
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            [
                FieldError(
                    "config.file-not-readable", PATH, path, f"cannot be read ({error})", "Give the path of a TOML file."
                )
            ]
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            [FieldError("config.file-not-toml", PATH, path, f"is not valid TOML: {error}", "Fix that line.")]
        ) from None
    errors = [
        FieldError(
            "config.mixture-unknown-key",
            PATH,
            path,
            f"has {key!r}, which is not known",
            "Known: [[source]] and [[change]].",
        )
        for key in tree
        if key not in ("source", "change")
    ]
    sources, changes = tree.get("source", []), tree.get("change", [])
    if not all(isinstance(part, list) and all(isinstance(x, dict) for x in part) for part in (sources, changes)):
        errors.append(
            FieldError(
                "config.mixture-not-tables",
                PATH,
                path,
                "has [source] or [change] in single brackets",
                "Write [[source]] and [[change]].",
            )
        )
        raise ConfigError(errors)
    return sources, changes, errors


def _read_file(path: str) -> Mixture:
    sources, changes, errors = _read_tables(path)
    if not sources:
        errors.append(
            FieldError(
                "config.mixture-empty", PATH, path, "names no source", 'Write [[source]], prefix = "...", weight = 1.'
            )
        )
    errors += [error for number, source in enumerate(sources, 1) for error in _source_errors(path, number, source)]
    amounts = [[key for key in KINDS if key in source] for source in sources]
    kinds = list(dict.fromkeys(given[0] for given in amounts if len(given) == 1))  # other counts have a separate error
    errors += _kind_errors(path, kinds, changes)
    if kinds and "weight" not in kinds:
        changes = []
    prefixes = [str(source.get("prefix", "")) for source in sources]
    short = _names(prefixes)
    names = [str(source.get("name", short[k])) for k, source in enumerate(sources)]
    given = [prefix for prefix in prefixes if prefix]
    errors += [
        *_repeated(given, "is given twice", "Give it once."),
        *_repeated(
            [name for name in names if name] if len(set(given)) == len(given) else [],
            "is the name of two sources",
            'Give each source a separate name = "...".',
        ),
        *(error for number, change in enumerate(changes, 1) for error in _change_errors(path, number, change, names)),
    ]
    if errors:
        raise ConfigError(errors)
    kind = kinds[0]
    first = {name: _amount(source[kind]) or Fraction(0) for name, source in zip(names, sources)}
    fim = tuple(source.get("fim") for source in sources)
    return Mixture(tuple(names), tuple(prefixes), kind, _changes(path, first, changes), fim)


def _kind_errors(path: str, kinds: list[str], changes: list[dict[str, Any]]) -> Iterator[FieldError]:
    if len(kinds) > 1:
        fix = "Use one kind for all sources."
        yield FieldError("config.mixture-kinds-mixed", PATH, path, f"mixes {' and '.join(kinds)}", fix)
    if changes and kinds and "weight" not in kinds:
        problem = f"combines changes with {' and '.join(kinds)}"
        yield FieldError("config.mixture-kinds-mixed", PATH, path, problem, "Use weights with changes.")


def _source_errors(path: str, number: int, source: dict[str, Any]) -> Iterator[FieldError]:
    where = f"{path}: source {number}"
    for key in source:
        if key not in ("prefix", "name", "fim", *KINDS):
            yield FieldError(
                "config.mixture-unknown-key",
                PATH,
                where,
                f"has {key!r}, which is not known",
                f"Known: prefix, name, {', '.join(KINDS)}, fim.",
            )
    if not isinstance(source.get("fim", True), bool):
        yield FieldError(
            "config.mixture-value-not-valid",
            PATH,
            where,
            f"has fim = {source['fim']!r}",
            "Write fim = true or fim = false.",
        )
    for key in ("prefix", "name"):
        if not (isinstance(source.get(key, "-"), str) and source.get(key, "-")) or (key == "prefix" not in source):
            yield FieldError(
                "config.mixture-value-not-valid",
                PATH,
                where,
                f"has no {key}, or one that is not a string",
                f'Write {key} = "...".',
            )
    given = [key for key in KINDS if key in source]
    if len(given) != 1:
        yield FieldError(
            "config.mixture-amounts-not-one",
            PATH,
            where,
            f"has {' and '.join(given) or 'no amount'}",
            "Give one of weight, tokens, epochs.",
        )
    for key in given:
        amount = _amount(source[key])
        if amount is None or (amount == 0 and key != "weight"):
            yield FieldError(
                "config.mixture-value-not-valid",
                PATH,
                where,
                f"has {key} = {source[key]!r}, not a number above 0",
                "Use a number such as 0.5.",
            )


def _change_errors(path: str, number: int, change: dict[str, Any], names: list[str]) -> Iterator[FieldError]:
    where = f"{path}: change {number}"
    for key in change:
        if key not in ("step", "weights"):
            yield FieldError(
                "config.mixture-unknown-key", PATH, where, f"has {key!r}, which is not known", "Known: step, weights."
            )
    step, weights = change.get("step"), change.get("weights")
    if not isinstance(step, int) or isinstance(step, bool) or step < 1:
        yield FieldError(
            "config.mixture-value-not-valid",
            PATH,
            where,
            f"has step = {step!r}, not a number of at least 1",
            "Give the number of optimizer steps before the change.",
        )
    if not isinstance(weights, dict):
        yield FieldError(
            "config.mixture-value-not-valid",
            PATH,
            where,
            f"has weights = {weights!r}",
            "Write weights = { NAME = NUMBER, ... }.",
        )
        return
    for name, value in weights.items():
        if name not in names:
            yield FieldError(
                "config.mixture-unknown-source",
                PATH,
                where,
                f"names {name!r}, which is not a source",
                f"Sources: {', '.join(names[:20])}.",
            )
        elif _amount(value) is None:
            yield FieldError(
                "config.mixture-value-not-valid",
                PATH,
                where,
                f"has {name} = {value!r}, not a number of at least 0",
                "Use a number such as 0.5.",
            )


def _changes(path: str, first: dict[str, Fraction], changes: list[dict[str, Any]]) -> tuple[Change, ...]:
    """The amounts from step 0 and after each change."""
    steps, amounts, result = [0, *(change["step"] for change in changes)], dict(first), []
    if any(a >= b for a, b in itertools.pairwise(steps)):
        raise ConfigError(
            [
                FieldError(
                    "config.mixture-steps-not-rising",
                    PATH,
                    path,
                    f"has changes at steps {steps[1:]}",
                    "Order them by rising steps.",
                )
            ]
        )
    for step, change in zip(steps, [{"weights": {}}, *changes]):
        amounts |= {name: _amount(value) or Fraction(0) for name, value in change["weights"].items()}
        if not any(amounts.values()):
            raise ConfigError(
                [
                    FieldError(
                        "config.mixture-empty",
                        PATH,
                        path,
                        f"has no source with a weight above 0 after step {step}",
                        "Give one a weight above 0.",
                    )
                ]
            )
        result.append(Change(step, tuple(amounts.values())))
    return tuple(result)
