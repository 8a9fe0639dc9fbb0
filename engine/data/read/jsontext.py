"""JSON parsing and writing that accepts all that Python's `json` accepts, and deeper nesting.

Unusual values in other fields of a record must not lose its text: NaN and Infinity, lone surrogates, numbers of any
size, nesting up to 100,000 deep. orjson rejects these; it is tried first because it is fast.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import orjson

from engine.data.read.bytestream import BadStream, ByteStream
from engine.data.read.formats import BadRecord

MAX_DEPTH = 100_000  # nested arrays and objects; deeper input is an attack on parsers
_BLOCK_BYTES = 1 << 20
_LONG = re.compile(rb"[0-9]{19}")
_SURROGATES = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"[ \t\r\n]*")


def loads(data: bytes) -> Any:
    """Parse one line. Raises UnicodeDecodeError, or json.JSONDecodeError if it is not JSON."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return _decoded(data)


def loads_exact_ints(data: bytes) -> Any:
    """Like `loads`, but integers of any size stay exact; orjson turns those beyond 64 bits into floats."""
    return _decoded(data) if _LONG.search(data) else loads(data)


def _decoded(data: bytes) -> Any:
    text = data.decode("utf-8")
    value, end = _DECODER.raw_decode(text, _skip_space(text, 0))
    if (end := _skip_space(text, end)) < len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def dumps(value: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """Write a value as one line of UTF-8 JSON; accepts all that `loads` returns. `default`: as in json.dumps.

    A lone surrogate is written as its escape, since UTF-8 cannot encode it.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=default)
    except RecursionError:
        text = "".join(_dump_iteratively(value, default))
    try:
        return text.encode()
    except UnicodeEncodeError:
        return _SURROGATES.sub(lambda half: f"\\u{ord(half[0]):04x}", text).encode()


def _dump_iteratively(value: Any, default: Callable[[Any], Any] | None) -> Iterator[str]:
    """The output of json.dumps in pieces, with an explicit stack instead of recursion."""
    waiting: list[Any] = [value]  # values to write, and the text between them as _Literal
    while waiting:
        item = waiting.pop()
        if isinstance(item, _Literal):
            yield item
        elif isinstance(item, Mapping) and item:
            inner: list[Any] = [_Literal("}")]
            for name, member in reversed(list(item.items())):
                inner += [member, _Literal(":"), name, _Literal(",")]
            waiting += [*inner[:-1], _Literal("{")]
        elif isinstance(item, list | tuple) and item:
            inner = [_Literal("]")]
            for element in reversed(item):
                inner += [element, _Literal(",")]
            waiting += [*inner[:-1], _Literal("[")]
        else:
            yield json.dumps(item, ensure_ascii=False, default=default)


class _Literal(str):
    """Text that is written as it is."""


def _parse_int(digits: str) -> int | float:
    """An int; a float (infinity) if it has more digits than Python parses as int."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)


class _Decoder(json.JSONDecoder):
    """json's decoder without the limit of Python's recursion depth."""

    def __init__(self) -> None:
        super().__init__(parse_int=_parse_int)

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        try:
            return super().raw_decode(s, idx)
        except RecursionError:
            return self._decode_iteratively(s, idx)

    def _decode_iteratively(self, text: str, at: int) -> tuple[Any, int]:
        """(value that begins at `at`, its end), like json, with an explicit stack instead of recursion."""
        holders: list[Any] = []  # the open arrays and objects
        names: list[str] = []  # name of the current member of each open object
        while True:
            at = _skip_space(text, at)
            if (mark := text[at : at + 1]) in ("[", "{") and mark:
                if len(holders) == MAX_DEPTH:
                    raise json.JSONDecodeError(f"nested more than {MAX_DEPTH:,} deep", text, at)
                holders.append([] if mark == "[" else {})
                at = _skip_space(text, at + 1)
                if not text.startswith(_END[mark], at):
                    if mark == "{":
                        at = self._name(text, at, names)
                    continue
                value, at = holders.pop(), at + 1
            else:
                value, at = super().raw_decode(text, at)
            while holders:
                holder = holders[-1]
                in_array = isinstance(holder, list)
                if in_array:
                    holder.append(value)
                else:
                    holder[names.pop()] = value
                at = _skip_space(text, at)
                if text.startswith(",", at):
                    at = at + 1 if in_array else self._name(text, _skip_space(text, at + 1), names)
                    break
                if not text.startswith("]" if in_array else "}", at):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
                value, at = holders.pop(), at + 1
            else:
                return value, at

    def _name(self, text: str, at: int, names: list[str]) -> int:
        """Append a member's name to `names`; returns the position of its value."""
        if not text.startswith('"', at):
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
        name, at = super().raw_decode(text, at)
        at = _skip_space(text, at)
        if not text.startswith(":", at):
            raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
        names.append(name)
        return at + 1


_DECODER = _Decoder()
_END = {"[": "]", "{": "}"}


def _skip_space(text: str, at: int) -> int:
    """Position after white space."""
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # matches the empty string too


def first_element(head: bytes) -> Any:
    """First element of the array that `head` begins; None if it is not an array, or the element is incomplete."""
    text = head.decode("utf-8-sig", "replace")
    at = _skip_space(text, 0)
    if not text.startswith("[", at):
        return None
    try:
        return _DECODER.raw_decode(text, _skip_space(text, at + 1))[0]
    except ValueError:
        return None


def json_values(stream: ByteStream, limit: int) -> Iterator[tuple[Any, int]]:
    """(value, stored bytes consumed) for each element of an array, or each of several values separated by white space.

    A value with bytes that are not UTF-8 becomes a BadRecord.
    """
    incremental = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    text, at, ended, array, first = "", 0, False, False, True
    foreign = False  # whether a byte was not UTF-8; surrogateescape decodes it to a lone surrogate
    while True:
        at = _skip_space(text, at)
        if at < len(text) and first:
            first, array = False, text[at] == "["
            at += array
            continue
        if array and text.startswith(",", at):
            at += 1
            continue
        if array and text.startswith("]", at):
            text += _read_text(stream, incremental, _BLOCK_BYTES)[0]
            if rest := text[at + 1 :].strip():
                extra = "zero bytes" if rest.startswith("\0") else repr(rest[:20])
                raise BadStream(f"malformed JSON: {extra} after the end of the array")
            return
        if at < len(text):
            try:
                value, end = _DECODER.raw_decode(text, at)
                behind = 2 if isinstance(value, int | float) else 0  # "e+" may end a block in the middle of a number
                if ended or end + behind < len(text):
                    if foreign and (half := _SURROGATES.search(text, at, end)):
                        value = BadRecord("not UTF-8", f"byte {_byte(half[0])} in it. Convert the file to UTF-8.")
                    at = end
                    yield value, stream.consumed()
                    continue
            except json.JSONDecodeError as err:
                if half := _SURROGATES.match(text, err.pos):
                    raise BadStream(f"not UTF-8: byte {_byte(half[0])}; convert the file") from err
                near = f"{err.msg} at {text[err.pos : err.pos + 20]!r}"
                if ended:
                    raise BadStream(f"malformed JSON: {near}") from err
                if len(text) - at > limit:
                    text = f"malformed JSON, or an element larger than max_document_bytes = {limit:,}: {near}"
                    raise BadStream(text) from err
        elif ended:
            if array:
                raise BadStream("malformed JSON: the array has no end; the file is truncated")
            return
        # Doubles the text, so that a large element is parsed a few times, not once per block.
        more, ended = _read_text(stream, incremental, max(_BLOCK_BYTES, len(text) - at))
        text, at = text[at:] + more, 0
        foreign = foreign or not _is_unicode(more)


def _read_text(stream: ByteStream, decoder: codecs.IncrementalDecoder, size: int) -> tuple[str, bool]:
    """(more text, whether the stream has ended)."""
    data = stream.read(size)
    return decoder.decode(data, not data), not data


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _byte(half: str) -> str:
    return f"{ord(half) - 0xDC00:#04x}"
