"""Folding of full-width and half-width characters: Latin letters, digits, kana and hangul in East Asian text."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

Width = Literal["keep", "half", "all"]

_FULL = {chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)} | {"￠": "¢", "￡": "£", "￥": "¥", "￦": "₩"}
_CHINESE = "，：；！？（）～"  # ordinary Chinese and Japanese punctuation, full-width by nature
_TABLES = {
    "half": str.maketrans({full: half for full, half in _FULL.items() if full not in _CHINESE}),
    "all": str.maketrans(_FULL | {"\u3000": " "}),
}
# Half-width kana, their marks and hangul, with the letter before them that a voicing mark may belong to.
_HALF_RUN = re.compile(r"[\u3041-\u30fe]?[\uff61-\uffdc\uffe8-\uffee]+")
_BETWEEN_DIGITS = re.compile(r"(?<=[0-9])(?:：(?=[0-9])|，(?=[0-9]{3}(?![0-9])))")
_ANY = re.compile(r"[\u3000\uff01-\uffee]")


def fold_width(text: str, width: Width) -> str:
    """Convert every character to its ordinary width. Idempotent.

    half: Latin letters, digits and signs become half-width (７．８％ -> 7.8%), kana and hangul full-width. Chinese
    punctuation (，：；！？（）～) stays, except between digits, where it is part of a number or a time. all: that
    punctuation and the full-width space become half-width too. keep: no change.
    """
    if width == "keep" or text.isascii() or not _ANY.search(text):
        return text
    text = _HALF_RUN.sub(lambda run: unicodedata.normalize("NFKC", run.group()), text).translate(_TABLES[width])
    return _BETWEEN_DIGITS.sub(lambda mark: ":" if mark.group() == "：" else ",", text)
