"""Keyword versions of `prepare`, `clean` and `train_tokenizer` that accept str or Path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.data.clean.options import CleanOptions
from engine.data.clean.run import clean as clean_
from engine.data.prepare.options import PrepareOptions
from engine.data.prepare.report import PrepareReport
from engine.data.prepare.run import prepare as prepare_
from engine.data.tokenize.options import TokenizerOptions
from engine.data.tokenize.recipe import Recipe
from engine.data.tokenize.train import Trained
from engine.data.tokenize.train import train_tokenizer as train_tokenizer_


def prepare(inputs: Sequence[str | Path], output: str, **how: Any) -> PrepareReport:
    """how: options and the other arguments of `prepare`."""
    rest = {name: how.pop(name) for name in ("suffixes", "progress", "note", "stop") if name in how}
    return prepare_(PrepareOptions(tuple(map(str, inputs)), output, **how), **rest)


def clean(inputs: Sequence[str | Path], output: str, **how: Any) -> dict[str, Any] | None:
    """how: options and the other arguments of `clean`."""
    rest = {name: how.pop(name) for name in ("progress", "stop") if name in how}
    return clean_(CleanOptions(tuple(map(str, inputs)), output, **how), **rest)


def train_tokenizer(inputs: Sequence[str | Path], output: Path, recipe: Recipe, **how: Any) -> Trained:
    """how: the options that are not in the recipe, and the other arguments of `train_tokenizer`."""
    rest = {name: how.pop(name) for name in ("progress", "note", "stop") if name in how}
    options = TokenizerOptions(tuple(map(str, inputs)), output=output, **vars(recipe), **how)
    return train_tokenizer_(options, **rest)
