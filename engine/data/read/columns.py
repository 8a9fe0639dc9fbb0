"""Columns of a record other than its text (id, url, date, ...), which `engine clean` keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RENAMED = "input_"  # prefix of an input column whose name `clean` uses for a column of its output


def other_columns(record: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The record without the members `keys`, which are the text. For a key "a.b" the other members of `a` are kept."""
    rest = dict(record)
    for key in keys:
        _remove_key(rest, key)
    return rest


def _remove_key(record: dict[str, Any], key: str) -> bool:
    """Remove the member that values.find finds. Nested objects are copied; one that becomes empty is removed too."""
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
    """Approximate size of a value of any depth in bytes, to bound the memory of a batch."""
    size, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        size += 8
        if isinstance(item, str | bytes):
            size += len(item)
        elif isinstance(item, Mapping):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
    return size


def merge_columns(output: Mapping[str, Any], rest: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(row, renamed): `output` followed by the columns `rest`. A column with a name in `output` becomes input_NAME.

    `renamed`: old name -> new name. No value is lost: if input_NAME exists too, the new name is input_input_NAME.
    """
    row, renamed = dict(output), {}
    for name, value in rest.items():
        new = name
        while new in output or (new != name and (new in rest or new in row)):
            new = RENAMED + new
        if new != name:
            renamed[name] = new
        row[new] = value
    return row, renamed
