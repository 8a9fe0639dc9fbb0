"""Heuristic quality filters: Gopher and FineWeb as implemented by datatrove, and C4, with limits for each language.

They count words, so each language needs its own segmenter, stop words, punctuation and limits. A document is judged by
the rules of its language or not at all: English limits drop nearly all Chinese text, and nearly all German text too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from engine.data.clean.language import Detector
from engine.data.clean.libraries import require_package
from engine.data.clean.quality_languages import Language, languages
from engine.data.clean.width import fold_width

_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_BULLETS = str.maketrans(dict.fromkeys("●■◆▲★◎○※·・◇□△☆►▶", "•"))

Verdict = tuple[str, str]  # (text, reason to drop it, or "")


class QualityFilters:
    """The selected filters, for each language that has rules."""

    def __init__(self, names: Sequence[str], language: str, detector: Detector | None):
        """language: an ISO code for all documents, or `auto`, which requires a detector."""
        self.languages = languages("--quality")
        self._names, self._language, self._detector = names, language, detector
        self._filters: dict[str, list[Callable[[str], Verdict]]] = {}

    def language_of(self, text: str) -> tuple[str, bool]:
        """(ISO code, whether there are rules for it)."""
        if self._detector is None:
            return self._language, True
        code, probability = self._detector.guess(text)
        if code not in self.languages and probability < 0.65:  # lists, code, noise: judged by a default language
            code = "zh" if code == "ja" else "en"
        return code, code in self.languages

    def apply(self, text: str, code: str) -> Verdict:
        """Apply the filters of a language; returns (text, reason to drop it or ""). Only `c4` changes the text."""
        if code not in self._filters:
            self._filters[code] = [_BUILDERS[name](self.languages[code]) for name in self._names]
        for name, judge in zip(self._names, self._filters[code]):
            text, reason = judge(text)
            if reason:
                return text, f"quality: {name}: {reason.removeprefix('gopher_')}"
        return text, ""


def _datatrove_filter(name: str, limits: str) -> Callable[[Language], Callable[[str], Verdict]]:
    """Builder of a datatrove filter that does not change the text."""

    def make(language: Language) -> Callable[[str], Verdict]:
        filters, document = (
            require_package("datatrove.pipeline.filters", "--quality"),
            require_package("datatrove.data", "--quality").Document,
        )
        chosen = getattr(filters, name)(language=language.splitter, **getattr(language, limits))

        def judge(text: str) -> Verdict:
            view = text if language.written_with_spaces else _chinese_view(text)
            result = chosen.filter(document(text=view, id=""))
            keep, reason = result if isinstance(result, tuple) else (result, "")
            return text, "" if keep else reason or "dropped"

        return judge

    return make


def _chinese_view(text: str) -> str:
    """The text with the punctuation that datatrove knows: every bullet becomes •, and …… becomes 。 (sentence end)."""
    lines = fold_width(text, "half").replace("……", "。").split("\n")
    return "\n".join(line[:8].translate(_BULLETS) + line[8:] for line in lines)


def _c4(language: Language) -> Callable[[str], Verdict]:
    """C4's rules for lines and pages (Raffel et al. 2020) with datatrove's defaults; equal to datatrove for English."""
    split = require_package("datatrove.utils.text", "--quality")

    def words_of(line: str) -> list[str]:
        if language.written_with_spaces:
            return line.split()
        return [word for word in split.split_into_words(line, language.splitter) if any(map(str.isalnum, word))]

    def judge(text: str) -> Verdict:
        kept, sentences = [], 0
        for line in map(str.strip, text.splitlines()):
            words, line = words_of(line), _CITATION.sub("", line)
            low = line.lower()
            ends = line.endswith(language.ends) and not line.endswith("...")
            if not ends or len(words) < 3 or max(map(len, words)) > 1000:
                continue
            if "lorem ipsum" in low:
                return text, "lorem_ipsum"
            if "javascript" in low:
                continue
            if "{" in line:
                return text, "curly_bracket"
            if any(phrase in low for phrase in language.policy):
                continue
            kept.append(line)
            sentences += len(split.split_into_sentences(line, language.splitter))
        return ("\n".join(kept).strip(), "") if sentences >= 5 else (text, "too_few_sentences")

    return judge


_BUILDERS: dict[str, Callable[[Language], Callable[[str], Verdict]]] = {
    "gopher": _datatrove_filter("GopherQualityFilter", "gopher"),
    "gopher-repetition": _datatrove_filter("GopherRepetitionFilter", "repetition"),
    "fineweb": _datatrove_filter("FineWebQualityFilter", "fineweb"),
    "c4": _c4,
}
