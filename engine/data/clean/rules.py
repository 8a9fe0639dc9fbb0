"""The rules that `engine clean` applies to one document, and their counts.

Order: mojibake, width, normalise, language, Chinese script, quality, decontamination, personal data. Cheap rules and
those that need the original text come first; masks come last, so that no other rule sees them. Duplicates are found
afterwards among the kept documents (engine/data/clean/duplicates.py), because that needs all of them.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engine.data.clean import pii
from engine.data.clean.chinese import chinese_converter, other_language
from engine.data.clean.contamination import EvaluationNgrams
from engine.data.clean.language import Detector, language_rule
from engine.data.clean.libraries import require_package
from engine.data.clean.normalise import normalise
from engine.data.clean.options import CleanOptions
from engine.data.clean.quality import QualityFilters
from engine.data.clean.width import fold_width

MAX_SAMPLES = 5  # of each kind, the first ones in input order
_EXCERPT = 160
_NOT_COUNTERS = ("documents", "text_bytes", "samples")


@dataclass(frozen=True)
class Location:
    """Source of a document: file name, and line, row or element, counted from 1 (0: the whole file)."""

    file: str
    record: int

    def __str__(self) -> str:
        return f"{self.file}:{self.record}" if self.record else self.file


@dataclass
class Counts:
    """All counts of a part or of the whole command; the counts of the parts add up to those of the whole."""

    documents: int = 0  # read
    text_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # documents by reason
    noticed: Counter[str] = field(default_factory=Counter)  # input files by kind of note
    dropped_bytes: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)  # documents by kind of change
    renamed: Counter[str] = field(default_factory=Counter)  # kept documents by renamed column, "old -> new"
    pii_findings: Counter[str] = field(default_factory=Counter)
    pii_documents: Counter[str] = field(default_factory=Counter)
    contaminated: Counter[str] = field(default_factory=Counter)  # documents by evaluation file
    judged: Counter[str] = field(default_factory=Counter)  # documents by language of the applied quality rules
    not_applied: Counter[str] = field(default_factory=Counter)  # documents by rule that does not support their language
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Counts:
        """Counts read from a part's counts.json."""
        values: dict[str, Any] = {k: Counter(v) if k not in _NOT_COUNTERS else v for k, v in state.items()}
        return cls(**values)

    def add(self, other: Counts) -> None:
        """Add the counts of the next part, in input order."""
        self.documents += other.documents
        self.text_bytes += other.text_bytes
        for name, counter in vars(self).items():
            if isinstance(counter, Counter):
                counter.update(getattr(other, name))
        for kind, samples in other.samples.items():
            kept = self.samples.setdefault(kind, [])
            kept += samples[: MAX_SAMPLES - len(kept)]

    def drop(self, reason: str, location: Location, size: int, text: str, detail: str) -> None:
        """Count a dropped document and keep a sample. size: bytes of its text."""
        self.dropped[reason] += 1
        self.dropped_bytes[reason] += size
        self.sample(f"dropped: {reason}", location, detail, text)

    def sample(self, kind: str, location: Location, detail: str = "", text: str = "") -> None:
        """Keep a sample if it is among the first of its kind, with an excerpt of the text."""
        kept = self.samples.setdefault(kind, [])
        if len(kept) < MAX_SAMPLES:
            shown = {"detail": detail, "text": excerpt(text)}
            kept.append({"file": location.file, "record": location.record, **{k: v for k, v in shown.items() if v}})


def excerpt(text: str) -> str:
    """The start of a text, for reports; personal data is always masked, regardless of the options."""
    return pii.mask(text, pii.find(text))[:_EXCERPT]  # whole text: a private key may end far after the excerpt


def text_size(text: str) -> int:
    """Size in bytes of UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def load_evaluations(options: CleanOptions) -> EvaluationNgrams:
    """Read the evaluation files, with the same conversion of Chinese characters as the documents."""
    o = options
    convert = chinese_converter(o.chinese)
    return EvaluationNgrams.read(o.decontaminate, o.decontaminate_key, o.decontaminate_words, o.fold_numbers, convert)


class Cleaner:
    """Applies the selected rules to documents, one by one, and counts."""

    def __init__(self, rules: CleanOptions):
        self.rules, self.counts = rules, Counts()
        self.fix = require_package("ftfy", "--fix-mojibake").fix_encoding if rules.fix_mojibake else None
        self.convert = chinese_converter(rules.chinese)
        auto = bool(rules.quality) and rules.quality_language == "auto"
        detector = Detector("--language" if rules.language else "--quality") if rules.language or auto else None
        self.language = (
            language_rule(detector, rules.language, rules.language_threshold)
            if detector is not None and rules.language
            else None
        )
        self.quality = (
            QualityFilters(rules.quality, rules.quality_language, detector if auto else None) if rules.quality else None
        )
        self.evaluations = load_evaluations(rules) if rules.decontaminate else None

    def clean(self, text: str, location: Location) -> tuple[str, str, str]:
        """(Cleaned text, reason to drop it or "", detail of the reason)."""
        counts, size = self.counts, text_size(text)
        counts.documents += 1
        counts.text_bytes += size
        text, reason, detail = self._apply_rules(text, location)
        if reason:
            counts.drop(reason, location, size, text, detail)
        return text, reason, detail

    def _apply_rules(self, text: str, location: Location) -> tuple[str, str, str]:
        rules, counts = self.rules, self.counts
        text = self._fix_characters(text, location)
        if not text.strip():
            return text, "empty", ""
        if self.language is not None and (reason := self.language(text)):
            return text, reason, ""
        judge = self._quality_filter(text)  # before the conversion, as the original script identifies the language
        text = self._convert_chinese(text)
        if judge is not None:
            before = text
            text, reason = judge(text)
            if reason:
                return text, reason, ""
            if text != before:
                counts.changed["lines taken out by a quality filter"] += 1
        if self.evaluations is not None and (hit := self.evaluations.find_overlap(text)) is not None:
            counts.contaminated[hit[0]] += 1
            return text, "contaminated", f"{hit[0]}: {hit[1]}"
        return self._handle_pii(text, location) if rules.pii != "off" else (text, "", "")

    def _fix_characters(self, text: str, location: Location) -> str:
        """Apply the character-level rules: mojibake, width, normalisation."""
        rules, counts = self.rules, self.counts
        if self.fix is not None and (fixed := self.fix(text)) != text:
            counts.changed["mojibake"] += 1
            counts.sample("changed: mojibake", location, text=fixed)
            text = fixed
        if (folded := fold_width(text, rules.width)) != text:
            counts.changed["width"] += 1
            text = folded
        if rules.normalise:
            text, changes = normalise(text)
            counts.changed.update(changes)
        return text

    def _convert_chinese(self, text: str) -> str:
        """Convert Chinese to the requested script."""
        if self.convert is None or text.isascii():
            return text
        if (converted := self.convert(text)) != text:
            self.counts.changed[f"{self.rules.chinese} Chinese"] += 1
        elif code := other_language(text):
            self.counts.not_applied[f"--chinese: {code}"] += 1
        return converted

    def _quality_filter(self, text: str) -> Callable[[str], tuple[str, str]] | None:
        """The quality filters for the language of a text; None if there are none."""
        if self.quality is None:
            return None
        code, has_rules = self.quality.language_of(text)
        if not has_rules:
            self.counts.not_applied[f"--quality: {code}"] += 1
            return None
        self.counts.judged[code] += 1
        return functools.partial(self.quality.apply, code=code)

    def _handle_pii(self, text: str, location: Location) -> tuple[str, str, str]:
        rules, counts = self.rules, self.counts
        findings = pii.find(text, rules.pii_kinds)
        if not findings:
            return text, "", ""
        kinds = Counter(finding.kind for finding in findings)
        counts.pii_findings.update(kinds)
        counts.pii_documents.update(kinds.keys())
        for finding in findings:
            counts.sample(f"pii: {finding.kind}", location, pii.redact(text[finding.begin : finding.end]))
        if rules.pii == "drop":
            return text, "personal data", ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
        if rules.pii == "mask":
            counts.changed["personal data masked"] += 1
            text = pii.mask(text, findings)
        return text, "", ""
