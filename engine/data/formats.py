"""Records of `.json`, `.csv`, `.parquet` and `.arrow`, one after the other in bounded memory.

Each reader gives (record, stored bytes consumed); a record that cannot be read is a `BadRecord` in its place, and
what makes the rest of a file unreadable raises BadStream.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.data.inputs import BadStream, ByteStream
from engine.errors import DataError

_BLOCK_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_ROWS = 256  # of a column file at once


@dataclass(frozen=True)
class BadRecord:
    """Stands where a record cannot be read."""

    reason: str
    detail: str


Rows = Iterator[tuple[Any, int]]


def json_values(stream: ByteStream, limit: int) -> Rows:
    """The elements of an array, or values that follow one another with white space between."""
    decoder, incremental = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")("strict")
    text, at, ended, array, first = "", 0, False, False, True
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # matches the empty string too
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
                raise BadStream(f"malformed JSON: {rest[:20]!r} after the end of the array")
            return
        if at < len(text):
            try:
                value, end = decoder.raw_decode(text, at)
                if ended or end < len(text):  # else a number might go on in the next block
                    at = end
                    yield value, stream.consumed()
                    continue
            except json.JSONDecodeError as err:
                near = f"{err.msg} at {text[err.pos : err.pos + 20]!r}"
                if ended:
                    raise BadStream(f"malformed JSON: {near}") from err
                if len(text) - at > limit:
                    text = f"malformed JSON, or an element larger than max_document_bytes = {limit:,}: {near}"
                    raise BadStream(text) from err
            except RecursionError as err:
                raise BadStream("malformed JSON: nested too deeply") from err
        elif ended:
            if array:
                raise BadStream("malformed JSON: the array has no end; the file is torn")
            return
        # As much again as there is: a large element is then parsed a few times, not once a block.
        more, ended = _read_text(stream, incremental, max(_BLOCK_BYTES, len(text) - at))
        text, at = text[at:] + more, 0


def _read_text(stream: ByteStream, decoder: codecs.IncrementalDecoder, size: int) -> tuple[str, bool]:
    """More text, and whether there is none behind it."""
    data = stream.read(size)
    try:
        return decoder.decode(data, not data), not data
    except UnicodeDecodeError as err:
        raise BadStream(f"not UTF-8: byte {err.object[err.start]:#04x}; convert the file") from err


class _Raw(io.RawIOBase):
    """A ByteStream as the standard library reads it."""

    def __init__(self, stream: ByteStream):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def csv_rows(stream: ByteStream, separator: str, limit: int) -> Rows:
    """One object a row, by the names in the first row."""
    csv.field_size_limit(limit)
    lines = io.TextIOWrapper(
        io.BufferedReader(_Raw(stream), _BLOCK_BYTES), encoding="utf-8-sig", errors="surrogateescape", newline=""
    )
    rows = csv.reader(lines, delimiter=separator, strict=True)
    names = next(rows, None)
    if not names:
        return
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as err:
            reason = "too large" if "limit" in str(err) else "malformed CSV"
            yield BadRecord(reason, f"line {rows.line_num}: {err}"), stream.consumed()
            continue
        if not row:
            continue
        if len(row) != len(names):
            detail = f"line {rows.line_num}: {len(row)} fields, expected {len(names)} as in the first row"
            yield BadRecord("malformed CSV", detail), stream.consumed()
            continue
        yield dict(zip(names, row)), stream.consumed()


def parquet_rows(stream: ByteStream, columns: Sequence[str], start: int) -> Rows:
    """Rows from number `start` on, with the given columns only."""
    arrow, parquet = _arrow("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(
            stream.seekable(), pre_buffer=False, buffer_size=_BLOCK_BYTES, page_checksum_verification=True
        )
        wanted = _columns(file.schema_arrow, columns)
        done = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if done + rows > start:
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=wanted, use_threads=False):
                    skip = max(0, min(len(batch), start - done))
                    done += len(batch)
                    share = int(done / max(1, file.metadata.num_rows) * stream.file.num_bytes)
                    yield from ((row, share) for row in _objects(batch.slice(skip)))
            else:
                done += rows
    except (arrow.ArrowException, OSError) as err:
        raise BadStream(f"not readable as parquet: {err}") from err


def arrow_rows(stream: ByteStream, columns: Sequence[str], start: int) -> Rows:
    """Rows of an Arrow IPC file or stream (what `datasets` keeps is a stream) from number `start` on."""
    arrow, ipc = _arrow("pyarrow.ipc")
    try:
        raw = stream.seekable()
        magic = raw.read(6)
        raw.seek(0)
        if magic == b"ARROW1":
            file = ipc.open_file(raw)
            batches: Iterator[Any] = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            file = ipc.open_stream(raw)
            batches = iter(file)
        wanted = _columns(file.schema, columns)
        done = 0
        for batch in batches:
            skip = max(0, min(len(batch), start - done))
            done += len(batch)
            chosen = batch.select(wanted)
            for begin in range(skip, len(batch), _ROWS):
                yield from ((row, stream.consumed()) for row in _objects(chosen.slice(begin, _ROWS)))
    except (arrow.ArrowException, OSError) as err:
        raise BadStream(f"not readable as Arrow: {err}") from err


def _arrow(module: str) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as err:
        raise DataError(f"{err}: parquet and Arrow files need `pip install 'trident-engine[formats]'`.") from err
    return pyarrow, {"pyarrow.parquet": pyarrow.parquet, "pyarrow.ipc": pyarrow.ipc}[module]


def _columns(schema: Any, wanted: Sequence[str]) -> list[str]:
    missing = [name for name in wanted if name not in schema.names]
    if missing:
        there = ", ".join(schema.names[:8])
        raise BadStream(f"no column {missing[0]!r}. The columns here are: {there}; choose among them with --json-key")
    return list(wanted)


def _objects(batch: Any) -> Iterator[Any]:
    """The rows of a record batch; one that does not decode does not hide the others."""
    try:
        columns = [_values(column) for column in batch.columns]
    except UnicodeDecodeError:
        if len(batch) > 1:
            for row in range(len(batch)):
                yield from _objects(batch.slice(row, 1))
        else:
            yield BadRecord("not UTF-8", "the text column holds bytes that are no UTF-8")
        return
    for values in zip(*columns):
        yield dict(zip(batch.schema.names, values))


def _values(column: Any) -> list[Any]:
    return [value.decode("utf-8") if isinstance(value, bytes) else value for value in column.to_pylist()]
