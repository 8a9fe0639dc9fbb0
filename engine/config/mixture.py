"""Parse `data.train`: one corpus, or a blend of several with weights, token budgets or epochs. Opens no data file.

corpus/web-train                                 one corpus
0.7 corpus/web-train 0.3 corpus/code-train       weights and prefixes in turn
mix.toml                                         the same as a file, with names and budgets:

    [[source]]
    prefix = "corpus/web-train"
    weight = 0.7                # or tokens = 2_000_000_000, or epochs = 1.5: one kind for all sources
    name = "web"                # in metrics; default: the last part of the prefix
    fim = false                 # no fill-in-the-middle for this source, even if data.fim_rate is above 0

Phases of the run ([[phase]] weights in its config) change the weights from a step on.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, FieldError

KINDS = ("weight", "tokens", "epochs")
PATH = "data.train"
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?|\.[0-9]+([eE][+-]?[0-9]+)?")
LEAST_SHARE = Fraction(1, 2**21)  # of a source, so that two of its samples fit in a block of a blend
_LARGEST = Fraction(10) ** 18


@dataclass(frozen=True)
class Mixture:
    """Names and prefixes of the sources, and their amounts: amounts[k] >= 0 of source k.

    kind: unit of the amounts, one of KINDS. fim: whether fill-in-the-middle applies to each source; None: not given.
    """

    names: tuple[str, ...]
    prefixes: tuple[str, ...]
    kind: str
    amounts: tuple[Fraction, ...]
    fim: tuple[bool | None, ...]

    def with_weights(self, weights: Mapping[str, float]) -> tuple[Fraction, ...]:
        """The amounts if the named sources have these weights."""
        return tuple(
            Fraction(repr(weights[name])) if name in weights else amount
            for name, amount in zip(self.names, self.amounts)
        )


def too_small(mixture: Mixture, shares: Sequence[Fraction], path: str = PATH) -> Iterator[FieldError]:
    """Errors of sources whose share of the samples is above 0 but below LEAST_SHARE. path: what gives the shares."""
    total = sum(shares, Fraction(0))
    for name, share in zip(mixture.names, shares):
        if 0 < share < total * LEAST_SHARE:
            problem = f"has a share of {float(share / total):.1e}, less than one sample in 2^21"
            fix = "Give it more, or merge it with another source."
            yield FieldError("samples.blend-weights", path, name, problem, fix)


def read_mixture(text: str) -> Mixture:
    """Parse the text of `data.train`. Raises ConfigError with all errors found."""
    words = text.split()
    if text.endswith(".toml"):
        return _read_file(text)
    if len(words) == 1 or Path(f"{text}.idx").exists():  # a prefix may contain spaces
        return Mixture((_name(text),), (text,), "weight", (Fraction(1),), (None,))
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
    amounts = tuple(n for _, n in weights if n)
    return Mixture(names, tuple(words[1::2]), "weight", amounts, (None,) * len(names))


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


def _read_sources(path: str) -> tuple[list[dict[str, Any]], list[FieldError]]:
    """(sources, errors of other keys) of a blend file. Raises ConfigError if it cannot be read."""
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        problem, fix = f"cannot be read ({error})", "Give the path of a TOML file."
        raise ConfigError([FieldError("config.file-not-readable", PATH, path, problem, fix)]) from None
    except tomllib.TOMLDecodeError as error:
        problem = f"is not valid TOML: {error}"
        raise ConfigError([FieldError("config.file-not-toml", PATH, path, problem, "Fix that line.")]) from None
    errors = [
        FieldError("config.mixture-unknown-key", PATH, path, f"has {key!r}, which is not known", "Known: [[source]].")
        for key in tree
        if key not in ("source", "change")
    ]
    errors += list(_moved(path, tree.get("change")))
    sources = tree.get("source", [])
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        problem = "has [source] in single brackets"
        errors.append(FieldError("config.mixture-not-tables", PATH, path, problem, "Write [[source]]."))
        raise ConfigError(errors)
    return sources, errors


def _moved(path: str, changes: object) -> Iterator[FieldError]:
    """The error of [[change]] tables, which earlier versions read, with the phases to write instead."""
    rows = []
    for change in changes if isinstance(changes, list) else []:
        step, weights = (change.get(name) if isinstance(change, dict) else None for name in ("step", "weights"))
        if isinstance(step, int) and isinstance(weights, dict):
            shares = ", ".join(f"{name} = {weight}" for name, weight in weights.items())
            rows.append(f"[[phase]] from_step = {step + 1}, weights = {{ {shares} }}")
    if changes is not None:
        fix = f"Remove it, and write there: {'; '.join(rows) or '[[phase]] from_step, weights'}."
        problem = "has [[change]]: changes of weights are now phases in the config of the run"
        yield FieldError("config.mixture-changes-moved", PATH, path, problem, fix)


def _read_file(path: str) -> Mixture:
    sources, errors = _read_sources(path)
    if not sources:
        errors.append(
            FieldError(
                "config.mixture-empty", PATH, path, "names no source", 'Write [[source]], prefix = "...", weight = 1.'
            )
        )
    errors += [error for number, source in enumerate(sources, 1) for error in _source_errors(path, number, source)]
    amounts = [[key for key in KINDS if key in source] for source in sources]
    kinds = list(dict.fromkeys(given[0] for given in amounts if len(given) == 1))  # other counts have a separate error
    if len(kinds) > 1:
        fix = "Use one kind for all sources."
        errors.append(FieldError("config.mixture-kinds-mixed", PATH, path, f"mixes {' and '.join(kinds)}", fix))
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
    ]
    if errors:
        raise ConfigError(errors)
    kind = kinds[0]
    first = tuple(_amount(source[kind]) or Fraction(0) for source in sources)
    if not any(first):
        problem, fix = "has no source with a weight above 0", "Give one a weight above 0."
        raise ConfigError([FieldError("config.mixture-empty", PATH, path, problem, fix)])
    return Mixture(tuple(names), tuple(prefixes), kind, first, tuple(source.get("fim") for source in sources))


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
