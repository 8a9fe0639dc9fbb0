"""The type of an option that takes several words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    StrTuple = tuple[str, ...]
else:

    class StrTuple(tuple):
        """A tuple of strings. For that type itself, tyro would import typeguard and with it unittest: 20 ms."""


NO_STRINGS, TEXT_FIELD = StrTuple(), StrTuple(("text",))
