"""Errors by their stable code, instead of by their wording (tests/wording.txt holds that)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from engine.errors import EngineError

Kind = TypeVar("Kind", bound=EngineError)


@contextmanager
def raises(kind: type[Kind], code: str, *values: object) -> Iterator[pytest.ExceptionInfo[Kind]]:
    """The block raises a `kind` with this code, whose text names the values: files, lines, numbers; no words."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.code == code, f"{caught.value.code!r}: {caught.value}"
    missing = [str(value) for value in values if str(value) not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
