"""Simplified and traditional Chinese, converted by OpenCC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from engine.data.clean.language import language_by_script
from engine.data.clean.libraries import require_package

Chinese = Literal["keep", "simplified", "traditional"]
_CONFIGS = {"simplified": "t2s", "traditional": "s2t"}


def chinese_converter(to: Chinese) -> Callable[[str], str] | None:
    """Converter to simplified or traditional characters that leaves Japanese and Korean unchanged; None for `keep`."""
    if to == "keep":
        return None
    install_hint = "Install the extra: pip install 'trident-engine[chinese]'"
    opencc = require_package("opencc", f"--chinese {to}", install_hint).OpenCC(_CONFIGS[to])
    return lambda text: text if text.isascii() or other_language(text) else opencc.convert(text)


def other_language(text: str) -> str:
    """`ja` or `ko` if the text is in that language, whose characters OpenCC would change too; else ""."""
    return code if (code := language_by_script(text)) in ("ja", "ko") else ""
