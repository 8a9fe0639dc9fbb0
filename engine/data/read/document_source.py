"""Reads documents from input files, in input order, as batches of texts with skipped items and a resume cursor.

`.jsonl` has one document per line, `.json` an array of documents or concatenated ones, `.csv .tsv .parquet .arrow` one
per row. Any other file is one UTF-8 document, unless its first lines are JSON objects with the key. The text of a
document is the value of a key (values of several keys are joined by a newline). A value may be a list of strings, which
are joined by newlines, or a list of messages {"role", "content"}, each written as "role: content".

Nothing disappears silently: each record or file that is skipped is reported as a `DroppedItem`, and anything else that
the user should know about a file as an `InputNote`. Memory is one batch or the largest document, whichever is larger; a
document longer than `max_document_bytes` is dropped without being held in memory.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
import xxhash

from engine.data.read.bytestream import BadStream, ByteStream
from engine.data.read.columns import approximate_bytes, other_columns
from engine.data.read.document_batch import START, Cursor, DocumentBatch, DroppedItem, InputNote, printable
from engine.data.read.formats import ZERO_BYTES, BadRecord, arrow_rows, csv_rows, parquet_rows
from engine.data.read.inputs import InputFile, list_inputs
from engine.data.read.jsontext import json_values, loads, loads_exact_ints
from engine.data.read.own import OwnFiles
from engine.data.read.recognise import count_binary_zeros, detect_format, json_line_objects
from engine.data.read.values import find, list_keys, text_of

MAX_DOCUMENT_BYTES = 1 << 26  # a longer file or line is a data dump, not a text
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_BATCH_BYTES = 4 << 20
_BATCH_DOCUMENTS = 8192
_BLOCK_BYTES = 1 << 20  # bytes read at once
_BOM = b"\xef\xbb\xbf"
_UNREAD = object()
INPUT_CHANGED = "is not the input that this command started with; give the same input, or --overwrite"


@dataclass(frozen=True)
class DocumentSource:
    """The input files and how to read them."""

    files: Sequence[InputFile]
    keys: Sequence[str] = ("text",)
    format: Literal["", "jsonl", "json", "csv", "parquet", "arrow", "text"] = ""  # "": by the file's name
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    keep_other_columns: bool = False  # also return the other columns of every record
    given: Sequence[str] = ()  # the inputs as given by the user
    excluded: int = 0  # number of names in folders excluded by --include and --exclude

    @classmethod
    def of(
        cls,
        inputs: Sequence[str | Path],
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        own_files: OwnFiles | None = None,
        **fields: Any,
    ) -> DocumentSource:
        """Source of the files that list_inputs finds; `fields`: the remaining fields."""
        listing = list_inputs(inputs, include, exclude, own_files)
        return cls(listing.files, given=tuple(map(str, inputs)), excluded=listing.excluded, **fields)

    @property
    def reads_once(self) -> bool:
        """Whether one of the files is a pipe or standard input, which can be read only once."""
        return any(file.once for file in self.files)

    def batches(self, start: Cursor = START) -> Iterator[DocumentBatch]:
        """All batches from `start`. Batch boundaries may vary; the sequence of documents does not."""
        before = sum(file.num_bytes for file in self.files[: start.file])
        batch = DocumentBatch(cursor=start, consumed=before)
        for number in range(start.file, len(self.files)):
            begin = start if number == start.file else Cursor(number)
            for block in _FileReader(self, number).read(begin):
                batch.extend(block)
                batch.consumed = before + block.consumed
                if batch.num_chars >= _BATCH_BYTES or len(batch.texts) + len(batch.drops) >= _BATCH_DOCUMENTS:
                    yield batch
                    batch = DocumentBatch(cursor=batch.cursor, consumed=batch.consumed)
            # The size of a pipe is known only at its end.
            before = batch.consumed if self.files[number].once else before + self.files[number].num_bytes
            batch.cursor, batch.consumed = Cursor(number + 1), before
        yield batch


class _FileReader:
    """Reads one file as a sequence of small batches; their `consumed` counts only this file."""

    def __init__(self, source: DocumentSource, number: int):
        self.file, self.number = source.files[number], number
        self.keys, self.limit = tuple(source.keys), source.max_document_bytes
        self.requested_format = source.format
        self.keep_other_columns = source.keep_other_columns
        self.record = 0  # the last record read, counted from 1

    def read(self, begin: Cursor) -> Iterator[DocumentBatch]:
        """Batches from `begin` to the end of the file, or to the point where it cannot be read any further."""
        readers: dict[str, Callable[[ByteStream, Cursor], Iterator[DocumentBatch]]] = {
            "jsonl": self._jsonl,
            "json": self._json,
            "csv": self._csv,
            "parquet": self._parquet,
            "arrow": self._arrow,
            "text": self._text,
        }
        self.record = begin.record
        if self.file.drop is not None:
            yield DocumentBatch(drops=[self.file.drop], cursor=Cursor(self.number + 1))
            return
        try:
            with ByteStream(self.file) as stream:
                kind, notes = self._format(stream)
                if begin == Cursor(self.number) and notes:
                    yield DocumentBatch(notes=notes, cursor=begin)
                yield from self._report_changes(stream, readers[kind](stream, begin))
        except BadStream as err:
            yield self._dropped("cannot be read", str(err), self.record + 1 if self.record else 0)

    def _report_changes(self, stream: ByteStream, batches: Iterator[DocumentBatch]) -> Iterator[DocumentBatch]:
        """The batches, with a drop or note if the file has changed meanwhile, before any truncated line it caused."""
        kind, reported = "changed while it was read", False
        try:
            for batch in batches:
                if batch.drops and not reported and (reported := stream.shrank()):
                    batch.drops.insert(0, DroppedItem(self.file.name, 0, kind, stream.describe_change()))
                yield batch
        except BadStream as err:
            raise BadStream(f"{err}; {change}" if (change := stream.describe_change()) else str(err)) from err
        if not reported and (change := stream.describe_change()):
            end = DocumentBatch(cursor=Cursor(self.number + 1), consumed=stream.consumed())
            if stream.shrank():
                end.drops.append(DroppedItem(self.file.name, 0, kind, change))
            else:
                end.notes.append(InputNote(self.file.name, kind, change))
            yield end

    def _format(self, stream: ByteStream) -> tuple[str, list[InputNote]]:
        """(format, notes) of the file: the requested format, else by its name, else by its first lines."""
        again = self.file.same_as
        notes = [InputNote(self.file.name, "read once more", f"the same file as {again}")] if again else []
        if stream.detected_compression:
            detail = f"its content is a {stream.detected_compression} archive, although its name does not say so"
            notes.append(InputNote(self.file.name, "unpacked", detail))
        kind = self.requested_format or FORMATS.get(self.file.suffix, "")
        if kind == "json" and json_line_objects(stream, self.limit):
            kind = "jsonl"
        if not kind:
            kind, noted, detail = detect_format(stream, self.keys, self.limit)
            if self.file.once and not self.file.suffix and kind != "json":
                kind, noted = "jsonl", ""  # default for a pipe, which has no suffix
            notes += [InputNote(self.file.name, noted, detail)] if noted else []
        return kind, notes

    def _dropped(self, reason: str, detail: str, record: int, stops: bool = True) -> DocumentBatch:
        """A batch with only this drop; it ends the file."""
        drop = DroppedItem(self.file.name, record, reason, printable(detail), stops)
        return DocumentBatch(drops=[drop], cursor=Cursor(self.number + 1), consumed=self.file.num_bytes)

    def _drop(self, batch: DocumentBatch, reason: str, detail: str, stops: bool = True) -> None:
        batch.drops.append(DroppedItem(self.file.name, self.record, reason, printable(detail), stops))

    def _add(self, batch: DocumentBatch, text: str, record: Any = None) -> None:
        if len(text) > self.limit:
            self._drop(batch, "too large", self._too_large(len(text)))
            return
        batch.texts.append(text)
        batch.where.append((self.number, self.record))
        batch.num_chars += len(text)
        if self.keep_other_columns:
            batch.other_columns.append(other_columns(record or {}, self.keys))
            batch.num_chars += approximate_bytes(batch.other_columns[-1])

    def _too_large(self, size: int) -> str:
        return f"more than max_document_bytes = {self.limit:,} ({size:,} or more). Raise it, or split the document."

    def _add_record(self, batch: DocumentBatch, value: Any) -> None:
        """Add the text of a JSON object, or a drop with the reason why it has none."""
        if not isinstance(value, dict):
            wanted = f'expected a JSON object like {{"{self.keys[0]}": "..."}}'
            return self._drop(batch, "wrong type", f"{wanted}, found {type(value).__name__}.")
        try:
            text = "\n".join(text_of(find(value, key), repr(key)) for key in self.keys)
            if not text.isascii():
                text.encode()
        except LookupError as err:
            detail = (
                f"no key {err.args[0]!r}. The keys here are: {list_keys(value)}; choose among them with --json-key."
            )
            return self._drop(batch, "missing key", detail)
        except TypeError as err:
            return self._drop(batch, "wrong type", f"{err}. Choose another --json-key.")
        except UnicodeEncodeError as err:
            return self._drop(batch, "not UTF-8", f"character {err.start} is a lone surrogate, which is not text.")
        return self._add(batch, text, value)

    def _text(self, stream: ByteStream, begin: Cursor) -> Iterator[DocumentBatch]:
        """The file as one document. A file of a folder that is not text is counted and never stops the run."""
        explicit = self.file.explicit
        raw = _read_up_to(stream, self.limit + 1)
        if zeros := count_binary_zeros(raw):
            yield self._dropped("zero bytes", f"{zeros:,} {ZERO_BYTES}.", 0, explicit)
            return
        if len(raw) > self.limit:
            detail = f"{self._too_large(len(raw))} Or convert the file to .jsonl."
            yield self._dropped("too large", detail, 0, explicit)
            return
        batch = DocumentBatch(cursor=Cursor(self.number + 1), consumed=stream.consumed())
        try:
            # The byte order mark describes the encoding; it is not part of the text.
            self._add(batch, raw.removeprefix(_BOM).decode("utf-8"))
        except UnicodeDecodeError as err:
            detail = f"Byte {err.start} is {err.object[err.start]:#04x}; convert or unpack it."
            self._drop(batch, "not UTF-8", detail, explicit)
        yield batch

    def _jsonl(self, stream: ByteStream, begin: Cursor) -> Iterator[DocumentBatch]:
        digest = xxhash.xxh3_128() if self.file.once else None
        stream.skip(begin.offset, digest.update if digest else None)
        if digest and begin.digest and digest.hexdigest() != begin.digest:
            raise BadStream(INPUT_CHANGED)
        offset, carry, ended, lost = begin.offset, b"", False, 0  # lost: bytes so far of a line that is too long
        zeros = False  # whether that line begins with or contains zero bytes
        while not ended:
            data = stream.read(_BLOCK_BYTES)
            ended = not data
            batch = DocumentBatch()
            if lost:
                rest, newline, data = data.partition(b"\n")
                lost += len(rest) + len(newline)
                if digest:
                    digest.update(rest + newline)
                if not newline and not ended:
                    continue
                self.record += 1
                if zeros:
                    self._drop(batch, "zero bytes", f"a line of {lost:,} bytes with {ZERO_BYTES}.")
                else:
                    self._drop(batch, "too large", f"a line of {lost:,} bytes, {self._too_large(lost)}")
                offset, lost = offset + lost, 0
            head, newline, tail = data.rpartition(b"\n")
            block = carry + head if newline else carry if ended else b""
            carry = tail if newline else carry + tail
            if block or newline:
                self._lines(batch, block)
                offset += len(block) + len(newline)
                if digest:
                    digest.update(block + newline)
            batch.cursor = Cursor(self.number, offset, self.record, digest.hexdigest() if digest else "")
            batch.consumed = stream.consumed()
            if len(carry) > self.limit + 1:  # the line is dropped, so it need not be kept in memory to its end
                lost, zeros = len(carry), not (carry[0] and carry[-1])
                if digest:
                    digest.update(carry)
                carry = b""
            if batch.texts or batch.drops or newline:
                yield batch

    def _lines(self, batch: DocumentBatch, block: bytes) -> None:
        """Add every line of `block`. The common case is inlined in this loop, which determines the reading speed."""
        read: Callable[[bytes], Any] = loads_exact_ints if self.keep_other_columns else orjson.loads
        key, plain = self.keys[0], len(self.keys) == 1 and not self.keep_other_columns
        texts, where, number, limit = batch.texts, batch.where, self.number, self.limit
        record, chars = self.record, 0
        for record, line in enumerate(block.split(b"\n"), self.record + 1):
            value: Any = _UNREAD
            try:
                value = read(line)
                text = value[key]
                if type(text) is str and len(text) <= limit and plain:
                    texts.append(text)
                    where.append((number, record))
                    chars += len(text)
                    continue
            except (ValueError, TypeError, LookupError):
                pass
            self.record = record
            self._line(batch, line, value)
        self.record = record
        batch.num_chars += chars

    def _line(self, batch: DocumentBatch, line: bytes, value: Any) -> None:
        """Add a line that is not the common case; `value`: its parsed JSON, or _UNREAD if parsing failed."""
        if len(line) <= self.limit and value is not _UNREAD:
            return self._add_record(batch, value)
        line = line.removeprefix(_BOM)  # several files with one may have been concatenated
        if not line.strip():
            return self._drop(batch, "blank line", "", stops=False)
        if not (line[0] and line[-1]):
            return self._drop(batch, "zero bytes", f"a line with {line.count(0):,} {ZERO_BYTES}.")
        if len(line) > self.limit:
            return self._drop(batch, "too large", f"a line of {len(line):,} bytes, {self._too_large(len(line))}")
        try:
            value = loads_exact_ints(line) if self.keep_other_columns else loads(line)
        except UnicodeDecodeError as wrong:
            detail = f"byte {wrong.start} of the line is {line[wrong.start]:#04x}. Convert the file to UTF-8."
            return self._drop(batch, "not UTF-8", detail)
        except json.JSONDecodeError as err:
            detail = (
                f"{err}. Every line has to be one complete JSON object in UTF-8; "
                f"fix or delete this line (an interrupted copy often truncates the last one)."
            )
            return self._drop(batch, "malformed JSON", detail)
        return self._add_record(batch, value)

    def _rows(self, rows: Iterator[tuple[Any, int]], begin: Cursor, size: int = 256) -> Iterator[DocumentBatch]:
        """Batches of `rows`, each (row, bytes consumed); a row is an object, or a BadRecord with the reason.

        A pipe cannot skip rows, so `rows` then starts at its beginning, and the digest of the rows already done is
        compared with the cursor's.
        """
        digest = xxhash.xxh3_128() if self.file.once else None
        batch, consumed, broken = DocumentBatch(), 0, None
        try:
            if digest:
                self._skip_rows(rows, begin, digest)
            for value, consumed in rows:
                self.record += 1
                self._add_row(batch, value, digest)
                if len(batch.texts) + len(batch.drops) >= size or batch.num_chars >= _BLOCK_BYTES:
                    batch.cursor, batch.consumed = self._cursor_after_rows(digest), consumed
                    yield batch
                    batch = DocumentBatch()
        except BadStream as err:  # the rows read before the error are still yielded
            broken = err
        batch.cursor, batch.consumed = self._cursor_after_rows(digest), consumed
        yield batch
        if broken is not None:
            raise broken

    def _add_row(self, batch: DocumentBatch, value: Any, digest: xxhash.xxh3_128 | None) -> None:
        texts, drops = len(batch.texts), len(batch.drops)
        if isinstance(value, BadRecord):
            self._drop(batch, value.reason, value.detail, value.stops)
        else:
            self._add_record(batch, value)
        if digest:
            for text in (*batch.texts[texts:], *map(str, batch.drops[drops:])):
                digest.update(f"{len(text)} {text}".encode())

    def _skip_rows(self, rows: Iterator[tuple[Any, int]], begin: Cursor, digest: xxhash.xxh3_128) -> None:
        self.record = 0
        for value, _ in itertools.islice(rows, begin.offset):
            self.record += 1
            self._add_row(DocumentBatch(), value, digest)
        if begin.digest and digest.hexdigest() != begin.digest:
            raise BadStream(INPUT_CHANGED)

    def _cursor_after_rows(self, digest: xxhash.xxh3_128 | None) -> Cursor:
        return Cursor(self.number, self.record, self.record, digest.hexdigest() if digest else "")

    def _rows_to_skip(self, begin: Cursor) -> int:
        """Number of rows that the reader may skip; 0 for a pipe, whose rows go into the digest."""
        return 0 if self.file.once else begin.offset

    def _json(self, stream: ByteStream, begin: Cursor) -> Iterator[DocumentBatch]:
        yield from self._rows(itertools.islice(json_values(stream, self.limit), self._rows_to_skip(begin), None), begin)

    def _csv(self, stream: ByteStream, begin: Cursor) -> Iterator[DocumentBatch]:
        separator = "\t" if self.file.suffix == ".tsv" else ","
        rows = csv_rows(stream, separator, self.keys, self.limit, self.keep_other_columns)
        yield from self._rows(itertools.islice(rows, self._rows_to_skip(begin), None), begin)

    def _parquet(self, stream: ByteStream, begin: Cursor) -> Iterator[DocumentBatch]:
        yield from self._rows(
            parquet_rows(stream, self.keys, self._rows_to_skip(begin), self.keep_other_columns), begin
        )

    def _arrow(self, stream: ByteStream, begin: Cursor) -> Iterator[DocumentBatch]:
        yield from self._rows(arrow_rows(stream, self.keys, self._rows_to_skip(begin), self.keep_other_columns), begin)


def _read_up_to(stream: ByteStream, size: int) -> bytes:
    pieces: list[bytes] = []
    while size > 0 and (data := stream.read(min(size, _BLOCK_BYTES))):
        pieces.append(data)
        size -= len(data)
    return b"".join(pieces)
