"""JSON, as much of it as Python's `json` takes, and deeper than that goes.

What other writers leave in fields that nobody reads here must not lose a good text: NaN and Infinity, halves of
surrogate pairs, numbers of any size, any depth up to 100,000. orjson refuses these; it is asked first for its speed.
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

MAX_DEPTH = 100_000  # of arrays and objects; what is deeper is made to break readers
_BLOCK_BYTES = 1 << 20
_LONG = re.compile(rb"[0-9]{19}")
_SURROGATES = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"[ \t\r\n]*")


def loads(data: bytes) -> Any:
    """The one value of a line. Raises UnicodeDecodeError, or json.JSONDecodeError for what is no JSON."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return _decoded(data)


def loads_exact_ints(data: bytes) -> Any:
    """As `loads`, and whole numbers of any size stay: of those beyond 64 bits orjson makes a float."""
    return _decoded(data) if _LONG.search(data) else loads(data)


def _decoded(data: bytes) -> Any:
    text = data.decode("utf-8")
    value, end = _DECODER.raw_decode(text, _skip_space(text, 0))
    if (end := _skip_space(text, end)) < len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def dumps(value: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """A value as one line of JSON in UTF-8, all that `loads` takes; `default` as json's.

    Half a surrogate pair is written as its escape: UTF-8 has no bytes for it.
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
    """The pieces of what json.dumps gives, with a stack of its own."""
    waiting: list[Any] = [value]  # values to write, and what stands between them as _Mark
    while waiting:
        one = waiting.pop()
        if isinstance(one, _Literal):
            yield one
        elif isinstance(one, Mapping) and one:
            inner: list[Any] = [_Literal("}")]
            for name, member in reversed(list(one.items())):
                inner += [member, _Literal(":"), name, _Literal(",")]
            waiting += [*inner[:-1], _Literal("{")]
        elif isinstance(one, list | tuple) and one:
            inner = [_Literal("]")]
            for element in reversed(one):
                inner += [element, _Literal(",")]
            waiting += [*inner[:-1], _Literal("[")]
        else:
            yield json.dumps(one, ensure_ascii=False, default=default)


class _Literal(str):
    """What is written as it is."""


def _parse_int(digits: str) -> int | float:
    """Python limits the digits of an int: what is longer is a float, infinity."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)


class _Decoder(json.JSONDecoder):
    """json's, which does not stop at Python's limit of recursion."""

    def __init__(self) -> None:
        super().__init__(parse_int=_parse_int)

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        try:
            return super().raw_decode(s, idx)
        except RecursionError:
            return self._decode_iteratively(s, idx)

    def _decode_iteratively(self, text: str, at: int) -> tuple[Any, int]:
        """The value that begins at `at`, and where it ends: what json does, with a stack of its own."""
        holders: list[Any] = []  # the arrays and objects that are open
        names: list[str] = []  # of the member that each open object reads
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
        """Put a member's name on `names`; returns where its value begins."""
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
    """Behind the white space."""
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # matches the empty string too


def first_element(head: bytes) -> Any:
    """Of an array whose beginning this is; None if there is none, or not all of it."""
    text = head.decode("utf-8-sig", "replace")
    at = _skip_space(text, 0)
    if not text.startswith("[", at):
        return None
    try:
        return _DECODER.raw_decode(text, _skip_space(text, at + 1))[0]
    except ValueError:
        return None


def json_values(stream: ByteStream, limit: int) -> Iterator[tuple[Any, int]]:
    """(value, stored bytes consumed): the elements of an array, or values one after the other with space between.

    A value with bytes that are no UTF-8 is a BadRecord.
    """
    incremental = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    text, at, ended, array, first = "", 0, False, False, True
    foreign = False  # whether there was a byte that is no UTF-8, which is half a surrogate pair here
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
                what = "zero bytes" if rest.startswith("\0") else repr(rest[:20])
                raise BadStream(f"malformed JSON: {what} after the end of the array")
            return
        if at < len(text):
            try:
                value, end = _DECODER.raw_decode(text, at)
                behind = 2 if isinstance(value, int | float) else 0  # "e+" may end a block and the number go on
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
                raise BadStream("malformed JSON: the array has no end; the file is torn")
            return
        # As much again as there is: a large element is then parsed a few times, not once a block.
        more, ended = _read_text(stream, incremental, max(_BLOCK_BYTES, len(text) - at))
        text, at = text[at:] + more, 0
        foreign = foreign or not _is_unicode(more)


def _read_text(stream: ByteStream, decoder: codecs.IncrementalDecoder, size: int) -> tuple[str, bool]:
    """More text, and whether there is none behind it."""
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
