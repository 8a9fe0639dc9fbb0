"""What was left out and what was noticed while documents were read, counted by kind, with the first of each."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.data.read.document_batch import DocumentBatch
from engine.data.read.document_source import DocumentSource
from engine.errors import DataError, truncate

_EXAMPLES = 3  # kept of each kind


@dataclass
class ReadSummary:
    """Counts of drops and notes by kind, and the first few of each as text."""

    dropped: dict[str, int] = field(default_factory=dict)
    noticed: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, batch: DocumentBatch) -> list[str]:
        """Count what a batch has; returns the notes that are the first of their kind, to be told at once."""
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
        """A line for each kind, with the first of it."""
        kinds = [*(("dropped", *item) for item in self.dropped.items())]
        kinds += [*(("noticed", *item) for item in self.noticed.items())]
        return [f"{what}: {count:,} {kind}{self._first(kind)}" for what, kind, count in kinds]

    def _first(self, kind: str) -> str:
        first = next(iter(self.examples.get(kind, [])), "")
        return f", the first: {first}" if first else ""

    def describe(self, source: DocumentSource) -> str:
        """Why these inputs have no text: what was seen, and what became of it."""
        unread = sum(file.drop is not None for file in source.files)
        empty = sum(not file.num_bytes and not file.once for file in source.files if file.drop is None)
        text = f"no text in {truncate(', '.join(source.given)) or 'no inputs'}: "
        text += _count(len(source.files) - unread, "file", "read") + (f" ({empty:,} of 0 bytes)" if empty else "")
        text += f", {_count(unread, 'file', 'not read')}" if unread else ""
        if source.excluded:
            text += f", {_count(source.excluded, 'name', 'left out by --include and --exclude')}"
        return "\n".join([f"{text}.", *(f"  {line}" for line in self.lines())])

    def error(self, source: DocumentSource, more: str = "") -> DataError:
        """`describe` as an error; `more` is added to it."""
        return DataError("read.no-text", self.describe(source) + more)


def no_text_error(source: DocumentSource, skip_errors: bool) -> DataError:
    """The error for inputs that have no text, as all of them are left out or empty."""
    account = ReadSummary()
    for batch in source.batches():
        for drop in batch.drops:
            if drop.stops and not skip_errors:
                return drop.error()
        account.add(batch)
    return account.error(source)


def _count(count: int, what: str, done: str) -> str:
    return f"{count:,} {what} was {done}" if count == 1 else f"{count:,} {what}s were {done}"
