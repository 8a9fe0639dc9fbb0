"""The other columns of a document: what its record holds beside the text (id, url, date, ...), which `clean` keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RENAMED = "input_"  # before the name of a column that `clean` writes itself


def other_columns(record: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The members of a record but those whose values are the text; of "a.b" the others of `a` stay."""
    rest = dict(record)
    for key in keys:
        _remove_key(rest, key)
    return rest


def _remove_key(record: dict[str, Any], key: str) -> bool:
    """Leave out what values.find finds; objects on the way are copied, and one that has nothing else goes."""
    if key in record:
        del record[key]
        return True
    for at in (at for at, char in enumerate(key) if char == "."):
        inner = record.get(key[:at])
        if isinstance(inner, Mapping) and _remove_key(copy := dict(inner), key[at + 1 :]):
            if copy:
                record[key[:at]] = copy
            else:
                del record[key[:at]]
            return True
    return False


def approximate_bytes(value: Any) -> int:
    """About how many bytes a value takes, whatever its depth: it bounds what is held at once."""
    size, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        size += 8
        if isinstance(one, str | bytes):
            size += len(one)
        elif isinstance(one, Mapping):
            waiting += one.keys()
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
    return size


def merge_columns(own: Mapping[str, Any], rest: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(row, renamed): `own` and behind it the other columns; one that has a name of `own` is renamed to input_NAME.

    `renamed`: old name -> new one. No value is lost: where input_NAME is there too, it is input_input_NAME.
    """
    row, renamed = dict(own), {}
    for name, value in rest.items():
        new = name
        while new in own or (new != name and (new in rest or new in row)):
            new = RENAMED + new
        if new != name:
            renamed[name] = new
        row[new] = value
    return row, renamed
