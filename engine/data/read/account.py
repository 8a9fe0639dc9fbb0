"""Counts of skipped items and notes while reading documents, by kind, with the first examples of each."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.data.read.document_batch import DocumentBatch
from engine.data.read.document_source import DocumentSource
from engine.errors import DataError, truncate

_EXAMPLES = 3  # kept of each kind


@dataclass
class ReadSummary:
    """Number of dropped items and of notes by kind, and the first few of each kind as text."""

    dropped: dict[str, int] = field(default_factory=dict)
    noticed: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, batch: DocumentBatch) -> list[str]:
        """Count the drops and notes of a batch; returns the notes that are the first of their kind, to be printed."""
        for drop in batch.drops:
            self._count(self.dropped, drop.reason, str(drop))
        return [str(note) for note in batch.notes if self._count(self.noticed, note.kind, str(note)) == 1]

    def _count(self, counts: dict[str, int], kind: str, text: str) -> int:
        counts[kind] = counts.get(kind, 0) + 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < _EXAMPLES:
            examples.append(truncate(text))
        return counts[kind]

    def lines(self) -> list[str]:
        """One line for each kind: its count and first example."""
        kinds = [*(("dropped", *item) for item in self.dropped.items())]
        kinds += [*(("noticed", *item) for item in self.noticed.items())]
        return [f"{verb}: {count:,} {kind}{self._first(kind)}" for verb, kind, count in kinds]

    def _first(self, kind: str) -> str:
        first = next(iter(self.examples.get(kind, [])), "")
        return f", the first: {first}" if first else ""

    def describe(self, source: DocumentSource) -> str:
        """Message for inputs without text: how many files were read, not read or excluded, and why."""
        unread = sum(file.drop is not None for file in source.files)
        empty = sum(not file.num_bytes and not file.once for file in source.files if file.drop is None)
        text = f"no text in {truncate(', '.join(source.given)) or 'no inputs'}: "
        text += _count(len(source.files) - unread, "file", "read") + (f" ({empty:,} of 0 bytes)" if empty else "")
        text += f", {_count(unread, 'file', 'not read')}" if unread else ""
        if source.excluded:
            text += f", {_count(source.excluded, 'name', 'excluded by --include and --exclude')}"
        return "\n".join([f"{text}.", *(f"  {line}" for line in self.lines())])

    def error(self, source: DocumentSource, more: str = "") -> DataError:
        """`describe` as an error; `more` is appended to the message."""
        return DataError("read.no-text", self.describe(source) + more)


def no_text_error(source: DocumentSource, skip_errors: bool) -> DataError:
    """Read all inputs to build the error for inputs without text: every document is skipped or empty."""
    account = ReadSummary()
    for batch in source.batches():
        for drop in batch.drops:
            if drop.stops and not skip_errors:
                return drop.error()
        account.add(batch)
    return account.error(source)


def _count(count: int, noun: str, done: str) -> str:
    return f"{count:,} {noun} was {done}" if count == 1 else f"{count:,} {noun}s were {done}"
