"""Extracts the text of a document from the value of a key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import truncate

_MOST_NAMES = 8


def find(record: Any, key: str) -> Any:
    """The value of `key` in an object: the member of that name, or else, for "a.b", member `b` of the object `a`.

    Raises LookupError if there is none.
    """
    if isinstance(record, Mapping):
        if key in record:
            return record[key]
        for dot in (at for at, char in enumerate(key) if char == "."):
            try:
                return find(record.get(key[:dot]), key[dot + 1 :])
            except LookupError:
                continue
    raise LookupError(key)


def list_keys(record: Mapping[str, Any]) -> str:
    """The keys of an object (of nested objects as "a.b") for a message, shortened."""
    names: list[str] = []
    for name in sorted(record):
        inner = record[name]
        names += [f"{name}.{key}" for key in sorted(inner)] if isinstance(inner, Mapping) and inner else [name]
    return shorten_list(names)


def shorten_list(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(truncate(name, 60) for name in names[:_MOST_NAMES]) or "none"
    return shown + (f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else "")


def text_of(value: Any, where: str) -> str:
    """A document's text from a JSON value. Raises TypeError, which names the type found, if it is not text."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(_piece(piece, f"{where}[{i}]") for i, piece in enumerate(value))
    raise TypeError(f"{where} is {type(value).__name__}, expected a string, or a list of strings or messages")


def _piece(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str):
        return f"{value['role']}: {value['content']}"
    found = (
        f"an object with the keys {shorten_list(sorted(value))}" if isinstance(value, dict) else type(value).__name__
    )
    raise TypeError(f'{where} is {found}, expected a string or {{"role": "...", "content": "..."}}')
