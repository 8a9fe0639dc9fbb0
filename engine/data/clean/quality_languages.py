"""Parameters of the quality filters for each language: segmenter, stop words, punctuation and limits."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from engine.data.clean.libraries import require_package

# Words in nearly every text of a language; a document has to contain two of them.
_STOP_WORDS = {
    "de": "der die das und in von zu den mit ist nicht auf für ein eine im dem sie auch als an es",
    "es": "de la que el en y a los se del las un por con no una su para es al lo",
    "fr": "de la le et les des en un du une que est pour qui dans par ce sur pas au il plus",
    "it": "di e il la che in un a per è una sono del con non si da le dei i della nel al come",
    "nl": "de van het een en in is dat op te voor met niet zijn die aan er om als bij ook",
    "pt": "de a o que e do da em um para é com não uma os no se na por mais as dos",
    "ru": "и в не на что с по как это для из от к а у но за то о или",
    "zh": "的 了 是 在 和 有 不 为 也 就 与 而 这 他 我 对 以 中 上 个 到 被 将 都 為 與 這 對 個 將",
}
_CLOSERS = "\"'”’»›“」』）】》)"  # may follow the punctuation that ends a sentence
# Phrases of boilerplate lines, which are dropped. The English ones, which are C4's, apply to all languages.
_POLICY = {
    "en": ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies"),
    "de": ("nutzungsbedingungen", "datenschutzerklärung", "verwendet cookies", "verwenden cookies", "nutzt cookies"),
    "es": ("condiciones de uso", "política de privacidad", "política de cookies", "utiliza cookies", "uso de cookies"),
    "fr": ("conditions d'utilisation", "politique de confidentialité", "utilise des cookies", "utilisons des cookies"),
    "it": ("condizioni d'uso", "termini di utilizzo", "informativa sulla privacy", "utilizza cookie", "uso dei cookie"),
    "nl": ("gebruiksvoorwaarden", "privacybeleid", "cookiebeleid", "gebruikt cookies", "gebruik van cookies"),
    "pt": ("termos de uso", "política de privacidade", "política de cookies", "utiliza cookies", "uso de cookies"),
    "ru": ("пользовательское соглашение", "политика конфиденциальности", "использует файлы cookie"),
    "zh": ("隐私政策", "隐私权政策", "隱私政策", "隱私權政策", "使用条款", "使用條款", "服务条款", "服務條款"),
}
_CHINESE_SENTENCE = re.compile(rf"[^。！？!?…\n]*(?:[。！？!?…]+[{re.escape(_CLOSERS)}]*|\n|$)")


@dataclass(frozen=True)
class Language:
    """Filter parameters of one language. Limits not given here are datatrove's defaults, which are for English."""

    splitter: Any  # datatrove's name of the language, or its WordTokenizer
    gopher: dict[str, Any] = field(default_factory=dict)
    repetition: dict[str, Any] = field(default_factory=dict)
    fineweb: dict[str, Any] = field(default_factory=dict)
    ends: tuple[str, ...] = (".", "?", "!", '"', "'")  # of a line that is text
    policy: tuple[str, ...] = _POLICY["en"]
    written_with_spaces: bool = True


def languages(option: str) -> dict[str, Language]:
    """ISO code -> parameters, for all languages with rules."""
    marks = sorted(require_package("datatrove.utils.text", option).TERMINAL_PUNCTUATION)
    require_package("spacy", option)  # datatrove imports it at the first document
    ends, stops = (".", "?", "!", *_CLOSERS), (*marks, "…", *_CLOSERS)
    by_code = {"en": Language("en")}
    for code, words in _STOP_WORDS.items():
        policy = _POLICY["en"] + _POLICY[code]
        by_code[code] = Language(code, {"stop_words": words.split()}, {}, {"stop_chars": stops}, ends, policy)
    chinese = by_code["zh"]
    # Limits of FineWeb2 (its configs/cmn_Hani.yml), tuned on web pages in Mandarin. A Chinese word has 1.7 characters,
    # an English one 5 and a space: so a line is short up to 10 characters instead of 30.
    by_code["zh"] = Language(
        _chinese_splitter(option),
        {
            **chinese.gopher,
            "min_avg_word_length": 1,
            "max_avg_word_length": 5,
            "max_non_alpha_words_ratio": 0.735,
        },
        {
            "dup_line_frac": 0.287,
            "top_n_grams": ((2, 0.256), (3, 0.201), (4, 0.171)),
            "dup_n_grams": ((5, 0.198), (6, 0.182), (7, 0.167), (8, 0.154), (9, 0.14), (10, 0.127)),
        },
        {
            **chinese.fineweb,
            "line_punct_thr": 0.106,
            "short_line_length": 10,
            "new_line_ratio": 0.178,
            "char_duplicates_ratio": 0.1,
        },
        (*ends, "。", "？", "！", "……"),
        chinese.policy,
        written_with_spaces=False,
    )
    return by_code


def _chinese_splitter(option: str) -> Any:
    """datatrove's interface to a segmenter, for jieba's dictionary in Rust."""
    module: Any = require_package("datatrove.utils.word_tokenizers", option)
    jieba = require_package("rjieba", option)

    class Jieba(module.WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return [word for word in jieba.cut(text) if not word.isspace()]

        def sent_tokenize(self, text: str) -> list[str]:
            return [text[begin:end] for begin, end in self.span_tokenize(text)]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [match.span() for match in _CHINESE_SENTENCE.finditer(text) if match.group().strip()]

    return Jieba("zh")
