"""Counts of `prepare`: running totals, which every shard stores, and the final report.

The report gives reference values for the first losses of a run: training starts at ln(vocab_size), and a model that
ignores context reaches the cross entropy of the valid tokens under the train unigram distribution.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.data.read.account import ReadSummary
from engine.data.read.document_batch import START, Cursor


@dataclass
class SplitTotals:
    """Running counts of one split. documents: non-empty ones."""

    documents: int = 0
    empty_documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    unknown_bytes: int = 0
    longest_document_tokens: int = 0
    longest_document: str = ""


@dataclass
class Totals:
    """All counts, and the position where reading resumes; stored in every shard."""

    cursor: Cursor = START
    consumed: int = 0
    documents: int = 0  # readable ones, including empty ones; also the number of the next document
    account: ReadSummary = field(default_factory=ReadSummary)
    splits: dict[str, SplitTotals] = field(default_factory=dict)
    fallback: str = ""  # why gigatoken or a converted tokenizer is no longer used, "" if it is
    by_original: bool = False  # the conversion differed: sentencepiece itself encodes
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
    """One written corpus. documents: non-empty ones. unigram_entropy: in nats per token."""

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
    """Result of `prepare`, also written to PREFIX-report.json.

    dropped: number of skipped files and lines by reason; PREFIX-skipped.jsonl (`skipped`) lists each but blank lines.
    noticed: number of files by note, such as JSON lines under another name. examples: the first few of each kind.
    """

    train: SplitReport
    valid: SplitReport | None
    test: SplitReport | None
    valid_unigram_cross_entropy: float | None  # nats per valid token under the train unigrams, add-one smoothed
    test_unigram_cross_entropy: float | None
    tokenizer: str
    tokenizer_digest: str
    vocab_size: int
    bos: int | None  # first token of each document, None: no BOS
    eod: int | None  # last token of each document, None: no EOD
    documents_in: int
    bytes_in: int
    dropped: dict[str, int]
    noticed: dict[str, int]
    examples: dict[str, list[str]]
    skipped: str
    encoder: str
    encoder_note: str
    elapsed_s: float
