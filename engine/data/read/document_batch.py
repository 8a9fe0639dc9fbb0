"""What reading hands on: documents, what was left out of them and why, what was noticed, and where to go on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.errors import DataError


def printable(text: str) -> str:
    """A text that any terminal and file takes: names and keys of other people's files may hold halves of characters."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class DroppedItem:
    """Something that was not handed out: `record` is its line, row or element (0: the file), counted from 1.

    `stops`: it is a fault of the input, so `--on-error stop` stops there; the others are by design (blank lines, files
    of a folder that are not text) and only counted.
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
        """The error that stops at this fault."""
        return DataError(
            "read.document-refused", f"{self} (--on-error skip leaves such documents out, and counts and lists them.)"
        )


@dataclass(frozen=True)
class InputNote:
    """Something about a file that the user should know, though nothing of it was left out."""

    file: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return printable(f"{self.file}: {self.kind}: {self.detail}")


@dataclass(frozen=True)
class Cursor:
    """Where reading goes on: file number, unpacked bytes or records of it that are done, records of it, and for what
    can be read only once the digest of those bytes, as nothing else tells whether it is the same input again."""

    file: int = 0
    offset: int = 0
    record: int = 0
    digest: str = ""


START = Cursor()


@dataclass
class DocumentBatch:
    """Texts in input order, (file number, record) of each, drops and notes on the way, where the next batch begins.

    rest: of each text the other columns of its record, empty unless DocumentSource.keep_rest.
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
        """Append what follows."""
        self.texts += block.texts
        self.where += block.where
        self.other_columns += block.other_columns
        self.drops += block.drops
        self.notes += block.notes
        self.cursor = block.cursor
        self.num_chars += block.num_chars
