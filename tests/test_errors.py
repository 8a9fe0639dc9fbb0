"""Errors: their messages, and that pickling preserves them."""

from __future__ import annotations

import pickle

from engine.errors import CheckpointError, ConfigError, FieldError, SecretError


def test_an_error_crosses_processes_whole() -> None:
    for error in (
        CheckpointError("a.b", "text"),
        SecretError("a.c", ""),
        ConfigError([FieldError("a.b", "p", 1, "r", "f")]),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.code, str(again)) == (type(error), error.code, str(error))
        assert getattr(again, "errors", None) == getattr(error, "errors", None)


def test_a_config_error_lists_every_error() -> None:
    errors = [
        FieldError("a.b", "train.steps", 0, "is too few", "Use 1."),
        FieldError("a.c", "x", "y", "is none", "Leave it out."),
    ]
    assert str(ConfigError(errors)) == (
        "configuration has 2 errors:\n  - train.steps = 0: is too few. Use 1. [a.b]\n"
        "  - x = 'y': is none. Leave it out. [a.c]"
    )


def test_what_is_printed_ends_with_the_code() -> None:
    assert CheckpointError("a.b", "text").report() == "text [a.b]"
    assert ConfigError([FieldError("a.b", "p", 1, "r", "f")]).report().endswith("p = 1: r. f [a.b]")
