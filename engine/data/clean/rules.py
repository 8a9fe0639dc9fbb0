"""What happens to one document of `engine clean`, and what is counted on the way.

Order: mojibake, width, normalise, language, Chinese script, quality, decontamination, personal data. Cheap rules and
those that look at the text as it was written come first; masks come last, so that no other rule sees them. Duplicates
are found afterwards among what is kept (engine/data/clean/duplicates.py), as that needs all documents.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engine.data.clean import pii
from engine.data.clean.chinese import chinese_converter, other_language
from engine.data.clean.contamination import Evaluations
from engine.data.clean.language import Detector, language_filter
from engine.data.clean.libraries import need
from engine.data.clean.normalise import normalise
from engine.data.clean.options import CleanOptions
from engine.data.clean.quality import Quality
from engine.data.clean.width import fold_width

SAMPLES = 5  # kept of each kind, the first ones in input order
_EXCERPT = 160
_PLAIN = ("documents", "text_bytes", "samples")


@dataclass(frozen=True)
class Place:
    """Where a document is from."""

    file: str
    record: int

    def __str__(self) -> str:
        return f"{self.file}:{self.record}" if self.record else self.file


@dataclass
class Counts:
    """Everything counted; the sum of the parts' counts is the count of the whole, whatever the parts."""

    documents: int = 0  # read
    text_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # documents by reason
    noticed: Counter[str] = field(default_factory=Counter)  # input files by what was noticed of them
    dropped_bytes: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)  # documents by what was done to them
    renamed: Counter[str] = field(default_factory=Counter)  # other columns, "old -> new", by documents that are kept
    pii_findings: Counter[str] = field(default_factory=Counter)
    pii_documents: Counter[str] = field(default_factory=Counter)
    contaminated: Counter[str] = field(default_factory=Counter)  # documents by evaluation file
    judged: Counter[str] = field(default_factory=Counter)  # documents by the language whose quality rules were applied
    not_applied: Counter[str] = field(default_factory=Counter)  # documents that a rule was not made for, and stay
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Counts:
        """From JSON."""
        values: dict[str, Any] = {k: Counter(v) if k not in _PLAIN else v for k, v in facts.items()}
        return cls(**values)

    def add(self, other: Counts) -> None:
        """Add what follows in input order."""
        self.documents += other.documents
        self.text_bytes += other.text_bytes
        for name, counter in vars(self).items():
            if isinstance(counter, Counter):
                counter.update(getattr(other, name))
        for kind, samples in other.samples.items():
            here = self.samples.setdefault(kind, [])
            here += samples[: SAMPLES - len(here)]

    def drop(self, reason: str, place: Place, size: int, text: str, detail: str) -> None:
        """Count a document that goes, with a sample."""
        self.dropped[reason] += 1
        self.dropped_bytes[reason] += size
        self.sample(f"dropped: {reason}", place, detail, text)

    def sample(self, kind: str, place: Place, detail: str = "", text: str = "") -> None:
        """Keep it if it is among the first of its kind. Of the text only an excerpt is shown."""
        here = self.samples.setdefault(kind, [])
        if len(here) < SAMPLES:
            facts = {"detail": detail, "text": excerpt(text)}
            here.append({"file": place.file, "record": place.record, **{k: v for k, v in facts.items() if v}})


def excerpt(text: str) -> str:
    """The beginning of a text, for people; personal data is masked in it whatever the options."""
    return pii.mask(text, pii.find(text))[:_EXCERPT]  # of the whole: a private key may go on far behind the excerpt


def text_size(text: str) -> int:
    """Bytes of UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def evaluations_of(options: CleanOptions) -> Evaluations:
    """What must not be in the training data, read from its files and written as the documents are."""
    o = options
    convert = chinese_converter(o.chinese)
    return Evaluations.read(o.decontaminate, o.decontaminate_key, o.decontaminate_words, o.fold_numbers, convert)


class Cleaner:
    """Applies the rules among the options to one document after the other."""

    def __init__(self, rules: CleanOptions):
        self.rules, self.counts = rules, Counts()
        self.fix = need("ftfy", "--fix-mojibake").fix_encoding if rules.fix_mojibake else None
        self.convert = chinese_converter(rules.chinese)
        auto = bool(rules.quality) and rules.quality_language == "auto"
        detector = Detector("--language" if rules.language else "--quality") if rules.language or auto else None
        self.language = (
            language_filter(detector, rules.language, rules.language_threshold)
            if detector is not None and rules.language
            else None
        )
        self.quality = (
            Quality(rules.quality, rules.quality_language, detector if auto else None) if rules.quality else None
        )
        self.evaluations = evaluations_of(rules) if rules.decontaminate else None

    def clean(self, text: str, place: Place) -> tuple[str, str, str]:
        """The text as it is now, why it goes ("" if it stays), and what shows that."""
        counts, size = self.counts, text_size(text)
        counts.documents += 1
        counts.text_bytes += size
        text, reason, detail = self._rules(text, place)
        if reason:
            counts.drop(reason, place, size, text, detail)
        return text, reason, detail

    def _rules(self, text: str, place: Place) -> tuple[str, str, str]:
        rules, counts = self.rules, self.counts
        text = self._spelling(text, place)
        if not text.strip():
            return text, "empty", ""
        if self.language is not None and (reason := self.language(text)):
            return text, reason, ""
        judge, text = self._judge_of(text), self._in_script(text)  # the script as it was written tells the language
        if judge is not None:
            before = text
            text, reason = judge(text)
            if reason:
                return text, reason, ""
            if text != before:
                counts.changed["lines taken out by a quality filter"] += 1
        if self.evaluations is not None and (hit := self.evaluations.look(text)) is not None:
            counts.contaminated[hit[0]] += 1
            return text, "contaminated", f"{hit[0]}: {hit[1]}"
        return self._personal(text, place) if rules.pii != "off" else (text, "", "")

    def _spelling(self, text: str, place: Place) -> str:
        """The text with its characters as they should be."""
        rules, counts = self.rules, self.counts
        if self.fix is not None and (fixed := self.fix(text)) != text:
            counts.changed["mojibake"] += 1
            counts.sample("changed: mojibake", place, text=fixed)
            text = fixed
        if (folded := fold_width(text, rules.width)) != text:
            counts.changed["width"] += 1
            text = folded
        if rules.normalise:
            text, changes = normalise(text)
            counts.changed.update(changes)
        return text

    def _in_script(self, text: str) -> str:
        """Chinese in the characters that are wanted."""
        if self.convert is None or text.isascii():
            return text
        if (converted := self.convert(text)) != text:
            self.counts.changed[f"{self.rules.chinese} Chinese"] += 1
        elif code := other_language(text):
            self.counts.not_applied[f"--chinese: {code}"] += 1
        return converted

    def _judge_of(self, text: str) -> Callable[[str], tuple[str, str]] | None:
        """The quality rules for the language of a text, if there are any."""
        if self.quality is None:
            return None
        code, known = self.quality.language_of(text)
        if not known:
            self.counts.not_applied[f"--quality: {code}"] += 1
            return None
        self.counts.judged[code] += 1
        return functools.partial(self.quality.look, code=code)

    def _personal(self, text: str, place: Place) -> tuple[str, str, str]:
        rules, counts = self.rules, self.counts
        findings = pii.find(text, rules.pii_kinds)
        if not findings:
            return text, "", ""
        kinds = Counter(finding.kind for finding in findings)
        counts.pii_findings.update(kinds)
        counts.pii_documents.update(kinds.keys())
        for finding in findings:
            counts.sample(f"pii: {finding.kind}", place, pii.hint(text[finding.begin : finding.end]))
        if rules.pii == "drop":
            return text, "personal data", ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
        if rules.pii == "mask":
            counts.changed["personal data masked"] += 1
            text = pii.mask(text, findings)
        return text, "", ""
