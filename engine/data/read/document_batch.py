"""A batch of documents as the reader yields it: texts, dropped items, notes, and the cursor to resume from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.errors import DataError


def printable(text: str) -> str:
    """The text with lone surrogates escaped, which file names and keys may contain and UTF-8 outputs reject."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class DroppedItem:
    """A record or file that was skipped. record: its line, row or element, counted from 1; 0: the whole file.

    stops: it is an error in the input, at which `--on-error stop` stops. The others are skipped by design (blank lines,
    files of a folder that are not text) and only counted.
    """

    file: str
    record: int
    reason: str
    detail: str
    stops: bool = True

    def __str__(self) -> str:
        place = f"{self.file}{f':{self.record}' if self.record else ''}"
        return printable(": ".join(part for part in (place, self.reason, self.detail) if part))

    def error(self) -> DataError:
        """The error to raise for it under `--on-error stop`."""
        return DataError(
            "read.document-refused", f"{self} (With --on-error skip such documents are skipped, counted and listed.)"
        )


@dataclass(frozen=True)
class InputNote:
    """A remark about a file for the user, such as how it is read; nothing of the file was dropped."""

    file: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return printable(f"{self.file}: {self.kind}: {self.detail}")


@dataclass(frozen=True)
class Cursor:
    """Position from which reading resumes.

    file: number of the file; offset: its decompressed bytes (JSON lines) or records (other formats) already done;
    record: its records already done; digest: of the input so far, for a pipe, to check that it is the same input again.
    """

    file: int = 0
    offset: int = 0
    record: int = 0
    digest: str = ""


START = Cursor()


@dataclass
class DocumentBatch:
    """Texts in input order with (file number, record) of each, drops and notes, and the cursor of the next batch.

    other_columns: those of the record of each text; empty unless DocumentSource.keep_other_columns.
    """

    texts: list[str] = field(default_factory=list)
    where: list[tuple[int, int]] = field(default_factory=list)
    other_columns: list[dict[str, Any]] = field(default_factory=list)
    drops: list[DroppedItem] = field(default_factory=list)
    notes: list[InputNote] = field(default_factory=list)
    cursor: Cursor = START
    consumed: int = 0  # stored bytes of all inputs up to the end of this batch
    num_chars: int = 0

    def extend(self, block: DocumentBatch) -> None:
        """Append the next block of the same input."""
        self.texts += block.texts
        self.where += block.where
        self.other_columns += block.other_columns
        self.drops += block.drops
        self.notes += block.notes
        self.cursor = block.cursor
        self.num_chars += block.num_chars
