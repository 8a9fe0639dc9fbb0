"""Errors by their stable code, instead of by their wording (tests/wording.txt holds that)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from engine.errors import ConfigError, EngineError

Kind = TypeVar("Kind", bound=EngineError)


@contextmanager
def raises(kind: type[Kind], code: str, *values: object) -> Iterator[pytest.ExceptionInfo[Kind]]:
    """The block raises a `kind` with this code, whose text names the values: files, lines, numbers; no words.

    Of a ConfigError one of the faults has the code.
    """
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    codes = [fault.code for fault in error.errors] if isinstance(error, ConfigError) else [error.code]
    assert code in codes, f"{codes}: {error}"
    missing = [str(value) for value in values if str(value) not in str(error)]
    assert not missing, f"{missing} not in: {error}"
