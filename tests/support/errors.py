"""Matches errors by their stable code, not by their wording (which is in tests/wording.txt)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from engine.errors import ConfigError, EngineError

Kind = TypeVar("Kind", bound=EngineError)


@contextmanager
def raises(kind: type[Kind], code: str, *values: object) -> Iterator[pytest.ExceptionInfo[Kind]]:
    """Assert that the block raises a `kind` with this code, and that its message contains the values.

    Values are files, lines and numbers, not words. In a ConfigError, one of the errors must have the code.
    """
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    codes = [one.code for one in error.errors] if isinstance(error, ConfigError) else [error.code]
    assert code in codes, f"{codes}: {error}"
    missing = [str(value) for value in values if str(value) not in str(error)]
    assert not missing, f"{missing} not in: {error}"
