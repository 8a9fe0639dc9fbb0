"""Detects the format of a file from its first bytes if its name is ambiguous: JSON lines, JSON, binary or text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.data.read.bytestream import ByteStream
from engine.data.read.jsontext import first_element, loads
from engine.data.read.values import find, list_keys

_BLOCK_BYTES = 1 << 20
_LINES = 16  # first lines that are examined
_BOM = b"\xef\xbb\xbf"
_BEFORE = _BOM + b" \t\r\n"  # allowed before a value


def detect_format(stream: ByteStream, keys: Sequence[str], limit: int) -> tuple[str, str, str]:
    """(format, kind of note, its detail) of a file without a known suffix; the note is empty if there is none."""
    head = stream.peek(_BLOCK_BYTES)
    if head.lstrip(_BEFORE)[:1] not in (b"{", b"[") and b"\n{" not in head:  # most files
        return "text", "", ""
    quoted = ", ".join(map(repr, keys))
    objects = json_line_objects(stream, limit)
    if any(has_keys(value, keys) for value in objects):
        return "jsonl", "read as JSON lines", f"its first lines are objects with the key {quoted}"
    if objects:
        detail = f"its lines are JSON objects without the key {quoted}. The keys here are: {list_keys(objects[0])}"
        return "text", "read as one text", f"{detail}; choose among them with --json-key"
    if has_keys(first_element(head), keys):
        return "json", "read as JSON", f"its first element is an object with the key {quoted}"
    return "text", "", ""


def json_line_objects(stream: ByteStream, limit: int) -> list[dict[str, Any]]:
    """The JSON objects among the first lines; [] unless most lines are JSON objects."""
    lines = [line for line in _first_lines(stream, limit) if line.strip()]
    if 2 * sum(line.lstrip()[:1] == b"{" for line in lines) <= len(lines):
        return []
    objects = [value for value in map(_value, lines) if isinstance(value, dict)]
    return objects if 2 * len(objects) > len(lines) else []


def _first_lines(stream: ByteStream, limit: int) -> list[bytes]:
    """Complete first lines after leading blank ones. A first line that may be an object is read up to `limit` bytes."""
    size = _BLOCK_BYTES
    head = stream.peek(size).lstrip(_BEFORE)
    if head[:1] == b"{":
        while b"\n" not in head and len(stream.peek(size)) >= size and size <= limit:
            size *= 4
            head = stream.peek(size).lstrip(_BEFORE)
    lines = head.split(b"\n", _LINES)
    ended = len(stream.peek(size)) < size
    return lines[:_LINES] if ended and len(lines) <= _LINES else lines[:-1]


def _value(line: bytes) -> Any:
    try:
        return loads(line)
    except ValueError:
        return None


def has_keys(value: Any, keys: Sequence[str]) -> bool:
    """Whether `value` is an object with all `keys`."""
    try:
        return isinstance(value, dict) and all(find(value, key) is not Ellipsis for key in keys)
    except LookupError:
        return False


def count_binary_zeros(raw: bytes) -> int:
    """Number of zero bytes if `raw` is binary (two in a row, or more than one in a hundred bytes), else 0."""
    zeros = raw.count(0)
    return zeros if zeros and (b"\0\0" in raw or zeros * 100 > len(raw)) else 0
