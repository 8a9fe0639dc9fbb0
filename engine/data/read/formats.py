"""Readers for rows of `.csv`, `.parquet` and `.arrow` files in bounded memory.

Each reader yields (record, stored bytes consumed). A record that cannot be read is replaced by a `BadRecord`; an error
that makes the rest of the file unreadable raises BadStream.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import datetime
import decimal
import io
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.data.read.bytestream import BadStream, ByteStream
from engine.data.read.columns import other_columns
from engine.data.read.values import shorten_list
from engine.errors import DataError

_BLOCK_BYTES = 1 << 20
_ROWS = 256  # rows of a column file read at once
_MOST_BYTES = 64 << 20  # bound for the rows read at once with all their columns
ZERO_BYTES = "zero bytes, as in a binary file, in UTF-16, or where a crash left part of a file unwritten"


@dataclass(frozen=True)
class BadRecord:
    """Placeholder for a record that cannot be read, with the reason."""

    reason: str
    detail: str
    stops: bool = True


Rows = Iterator[tuple[Any, int]]


class _Raw(io.RawIOBase):
    """Adapter: a ByteStream as a raw stream of the standard library."""

    def __init__(self, stream: ByteStream):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def csv_rows(stream: ByteStream, separator: str, columns: Sequence[str], limit: int, all_columns: bool = False) -> Rows:
    """One object per row, with the names of the first row, which must have each of `columns` exactly once.

    all_columns: keep the other columns too; then no two columns may have the same name.
    """
    csv.field_size_limit(limit)
    lines = io.TextIOWrapper(
        io.BufferedReader(_Raw(stream), _BLOCK_BYTES), encoding="utf-8-sig", errors="surrogateescape", newline=""
    )
    rows = csv.reader(lines, delimiter=separator, strict=True)
    names: list[str] = []
    while not names:  # blank lines may precede the header
        try:
            names = next(rows)
        except StopIteration:
            return
        except csv.Error as err:
            raise BadStream(f"the first row (the column names) is malformed CSV: {err}") from err
        if not names:
            yield _BLANK, stream.consumed()
    for name in columns:
        if not _unique_column([other for other in names if other == name], name):
            raise _missing_column(name, names)
    if all_columns:
        _reject_duplicates(names)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as err:
            reason = "too large" if "limit" in str(err) else "malformed CSV"
            yield BadRecord(reason, f"line {rows.line_num}: {err}"), stream.consumed()
            continue
        yield _csv_row(row, names, columns, rows.line_num), stream.consumed()


_BLANK = BadRecord("blank line", "", stops=False)
_NON_UTF8 = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, decoded with surrogateescape


def _csv_row(row: list[str], names: Sequence[str], columns: Sequence[str], line: int) -> dict[str, str] | BadRecord:
    """The object of a row. Bytes that are not UTF-8 drop the row in a text column, and become `\\xe9` in the others."""
    if not row:
        return _BLANK
    if any("\0\0" in field for field in row):
        return BadRecord("zero bytes", f"line {line}: {ZERO_BYTES}")
    if len(row) != len(names):
        detail = f"line {line}: {len(row)} fields, expected {len(names)} as in the first row"
        return BadRecord("malformed CSV", detail)
    found = dict(zip(names, row))
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        for name, field in found.items():
            raw = field.encode("utf-8", "surrogateescape")
            found[name] = raw.decode("utf-8", "backslashreplace")
            if name in columns and (wrong := _NON_UTF8.search(field)):
                detail = f"line {line}: byte {ord(wrong[0]) - 0xDC00:#04x}. Convert the file to UTF-8."
                return BadRecord("not UTF-8", detail)
    return found


def parquet_rows(stream: ByteStream, columns: Sequence[str], start: int, all_columns: bool = False) -> Rows:
    """Rows from number `start`, with only `columns`, which must exist, or with all columns."""
    arrow, parquet = _arrow("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(
            stream.seekable(), pre_buffer=False, buffer_size=_BLOCK_BYTES, page_checksum_verification=True
        )
        paths = _columns(arrow, file.schema_arrow, columns, all_columns)
        wanted = None if all_columns else [".".join(path) for path in paths.values()]
        done = 0
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            rows = metadata.num_rows
            if done + rows > start:
                size = _ROWS
                if all_columns:  # columns such as images and audio are large
                    size = max(1, min(_ROWS, _MOST_BYTES * rows // max(1, metadata.total_byte_size)))
                for batch in file.iter_batches(size, row_groups=[group], columns=wanted, use_threads=False):
                    skip = max(0, min(len(batch), start - done))
                    done += len(batch)
                    share = int(done / max(1, file.metadata.num_rows) * stream.file.num_bytes)
                    yield from ((row, share) for row in _objects(arrow, batch.slice(skip), paths, columns))
            else:
                done += rows
    except (arrow.ArrowException, OSError) as err:
        raise BadStream(f"not readable as parquet: {err}") from err


def arrow_rows(stream: ByteStream, columns: Sequence[str], start: int, all_columns: bool = False) -> Rows:
    """Rows of an Arrow IPC file or stream (`datasets` stores streams) from number `start`; columns as above."""
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
        paths = _columns(arrow, file.schema, columns, all_columns)
        done = 0
        for batch in batches:
            skip = max(0, min(len(batch), start - done))
            done += len(batch)
            for begin in range(skip, len(batch), _ROWS):
                rows = _objects(arrow, batch.slice(begin, _ROWS), paths, columns)
                yield from ((row, stream.consumed()) for row in rows)
    except (arrow.ArrowException, OSError) as err:
        raise BadStream(f"not readable as Arrow: {err}") from err


def _arrow(module: str) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as err:
        raise DataError(
            "read.pyarrow-missing", f"{err}: parquet and Arrow files need `pip install 'trident-engine[formats]'`."
        ) from err
    return pyarrow, {"pyarrow.parquet": pyarrow.parquet, "pyarrow.ipc": pyarrow.ipc}[module]


def _unique_column(found: Sequence[Any], name: str) -> Any:
    """The only column with this name; None if there is none. Raises BadStream if there are several."""
    if len(found) > 1:
        raise BadStream(
            f"{len(found)} columns have the name {name!r}, so the text column is ambiguous. Rename the others"
        )
    return found[0] if found else None


def _missing_column(name: str, names: Sequence[str]) -> BadStream:
    return BadStream(
        f"no column {name!r}. The columns here are: {shorten_list(names)}; choose among them with --json-key"
    )


ColumnPaths = dict[str, list[str]]  # wanted column -> [its name], or for "a.b" [struct name, field name, ...]


def _columns(arrow: Any, schema: Any, wanted: Sequence[str], all_columns: bool) -> ColumnPaths:
    """Paths of the wanted columns. Raises BadStream for one that is missing, or present more than once.

    all_columns: also paths of the other columns.
    """
    paths = {name: _column_path(arrow, schema, name) for name in wanted}
    for name, path in paths.items():
        if not path:
            raise _missing_column(name, [leaf for field in schema for leaf in _leaves(arrow, field)])
    if all_columns:
        _reject_duplicates(schema.names)
        return {name: [name] for name in schema.names if name not in paths} | paths
    return paths


def _reject_duplicates(names: Sequence[str]) -> None:
    for name in names:
        if (count := names.count(name)) > 1:
            raise BadStream(f"{count} columns have the name {name!r}, and only one could be kept. Rename the others")


def _column_path(arrow: Any, fields: Any, name: str) -> list[str]:
    """Path of the column `name`; [] if there is none."""
    if _unique_column([field for field in fields if field.name == name], name):
        return [name]
    for at in (at for at, char in enumerate(name) if char == "."):
        structs = [f for f in fields if f.name == name[:at] and arrow.types.is_struct(f.type)]
        struct = _unique_column(structs, name[:at])
        if struct and (inside := _column_path(arrow, struct.type, name[at + 1 :])):
            return [name[:at], *inside]
    return []


def _leaves(arrow: Any, field: Any) -> list[str]:
    """The names by which a column or its fields can be selected."""
    if arrow.types.is_struct(field.type):
        return [f"{field.name}.{leaf}" for inner in field.type for leaf in _leaves(arrow, inner)]
    return [field.name]


def _objects(arrow: Any, batch: Any, paths: ColumnPaths, texts: Sequence[str]) -> Iterator[Any]:
    """The rows of a record batch with the columns `paths`. A row that does not decode does not affect the others.

    texts: the columns that are the document text. Other columns accept any value; a struct that contains a text column
    is returned without it.
    """
    try:
        columns = [
            _values(arrow, column) if name in texts else _any_values(arrow, column)
            for name, column in ((name, _column(arrow, batch, path)) for name, path in paths.items())
        ]
    except UnicodeDecodeError:
        if len(batch) > 1:
            for number in range(len(batch)):
                yield from _objects(arrow, batch.slice(number, 1), paths, texts)
        else:
            yield BadRecord("not UTF-8", "the text column contains bytes that are not UTF-8")
        return
    inside = [name for name in texts if paths[name][0] != name and paths[name][0] in paths]
    for values in zip(*columns):
        row = dict(zip(paths, values))
        if inside:
            found = {name: row.pop(name) for name in inside}
            row = other_columns(row, inside) | found
        yield row


def _column(arrow: Any, batch: Any, path: list[str]) -> Any:
    column = batch.column(path[0])
    return arrow.compute.struct_field(column, path[1:]) if path[1:] else column


def _values(arrow: Any, column: Any) -> list[Any]:
    """Values of a text column. Raises UnicodeDecodeError."""
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError):  # other fields of messages may have no Python value
        values = _any_values(arrow, column)
    return [value.decode("utf-8") if isinstance(value, bytes) else value for value in values]


def _any_values(arrow: Any, column: Any) -> list[Any]:
    """Values of a column that is not text. A value without a Python equivalent is returned as Arrow's text of it."""
    if not _has_nanoseconds(arrow, column.type):
        with contextlib.suppress(arrow.ArrowException, ValueError, OverflowError):
            return list(column.to_pylist())
    return [_any_value(arrow, scalar) for scalar in column]


def _has_nanoseconds(arrow: Any, kind: Any) -> bool:
    """Whether a type contains nanosecond times: Python's have none, and Arrow uses pandas' only if it is installed."""
    if isinstance(kind, arrow.DictionaryType):
        return _has_nanoseconds(arrow, kind.value_type)
    inner = (kind.field(number).type for number in range(kind.num_fields))
    return getattr(kind, "unit", "") == "ns" or any(_has_nanoseconds(arrow, field) for field in inner)


def _any_value(arrow: Any, scalar: Any) -> Any:
    if not scalar.is_valid:
        return None
    if isinstance(scalar, arrow.MapScalar):
        return [[_any_value(arrow, part) for part in pair.values()] for pair in scalar.values]
    if isinstance(scalar, arrow.StructScalar):
        return {name: _any_value(arrow, value) for name, value in scalar.items()}
    if isinstance(scalar, arrow.ListScalar | arrow.FixedSizeListScalar | arrow.ListViewScalar):
        return [_any_value(arrow, value) for value in scalar.values]
    if isinstance(inner := getattr(scalar, "value", None), arrow.Scalar):  # of a dictionary, a union, an extension
        return _any_value(arrow, inner)
    with contextlib.suppress(arrow.ArrowException, ValueError, OverflowError):
        if getattr(scalar.type, "unit", "") != "ns":
            return scalar.as_py()
    try:
        return scalar.cast(arrow.string()).as_py()
    except UnicodeDecodeError:  # a string column with bytes that are not UTF-8
        return scalar.as_buffer().to_pybytes()
    except (arrow.ArrowException, ValueError):
        if arrow.types.is_timestamp(scalar.type):  # in an unknown time zone
            return _any_value(arrow, scalar.cast(arrow.timestamp(scalar.type.unit, "UTC")))
        return str(scalar)


def json_value(value: Any) -> Any:
    """JSON form of a column value: times as ISO 8601, decimals as text, bytes as text or base64.

    Raises TypeError for others.
    """
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta | uuid.UUID):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__} has no form in JSON")
