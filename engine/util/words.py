"""The type of a command-line option with several values."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    StrTuple = tuple[str, ...]
else:

    class StrTuple(tuple):
        """A tuple of strings. With `tuple[str, ...]` itself, tyro would import typeguard and unittest: 20 ms."""


NO_STRINGS, TEXT_FIELD = StrTuple(), StrTuple(("text",))
