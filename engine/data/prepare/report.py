"""What `prepare` counts: running totals, which a shard keeps, and the report at the end.

The report holds what makes the first losses of a run judgeable: ln(vocab_size) is where it starts, the cross entropy
of the valid tokens under the train unigram distribution is what a model reaches without reading any context.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.data.read.account import ReadSummary
from engine.data.read.document_batch import START, Cursor


@dataclass
class SplitTotals:
    """Running counts of one split. `documents` counts those with text."""

    documents: int = 0
    empty_documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    unknown_bytes: int = 0
    longest_document_tokens: int = 0
    longest_document: str = ""


@dataclass
class Totals:
    """All counts, and where reading goes on: what a shard keeps."""

    cursor: Cursor = START
    consumed: int = 0
    documents: int = 0  # that could be read, empty ones too: the number of the next one
    account: ReadSummary = field(default_factory=ReadSummary)
    splits: dict[str, SplitTotals] = field(default_factory=dict)
    fallback: str = ""  # why gigatoken, or a conversion, was given up
    by_original: bool = False  # it was the conversion: sentencepiece itself encodes
    elapsed_s: float = 0.0

    @classmethod
    def of(cls, state: dict[str, Any]) -> Totals:
        splits = {name: SplitTotals(**counts) for name, counts in state["splits"].items()}
        state_of_parts = {
            "cursor": Cursor(**state["cursor"]),
            "account": ReadSummary(**state["account"]),
            "splits": splits,
        }
        return cls(**{**state, **state_of_parts})


@dataclass(frozen=True)
class SplitReport:
    """One written corpus. `documents` counts those with text, `unigram_entropy` is in nats per token."""

    prefix: str
    documents: int
    empty_documents: int
    text_bytes: int
    tokens: int
    bytes_per_token: float
    longest_document_tokens: int
    longest_document: str
    unknown_bytes: int
    unigram_entropy: float
    dtype: str


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did; also written to PREFIX-report.json. `dropped`: left-out files or lines by reason, each of
    them with its place in PREFIX-skipped.jsonl (`skipped`; blank lines are not listed). `noticed`: files by what was
    noticed of them, such as JSON lines under another name. `examples`: the first few of each kind."""

    train: SplitReport
    valid: SplitReport | None
    test: SplitReport | None
    valid_unigram_cross_entropy: float | None  # nats per valid token under the train unigrams, add-one smoothed
    test_unigram_cross_entropy: float | None
    tokenizer: str
    tokenizer_digest: str
    vocab_size: int
    bos: int | None  # that begins each document, None: none does
    eod: int | None  # that ends each
    documents_in: int
    bytes_in: int
    dropped: dict[str, int]
    noticed: dict[str, int]
    examples: dict[str, list[str]]
    skipped: str
    encoder: str
    encoder_note: str
    elapsed_s: float
