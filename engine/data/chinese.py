"""Simplified and traditional Chinese, converted by OpenCC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from engine.data.libraries import need

Chinese = Literal["keep", "simplified", "traditional"]
_CONFIGS = {"simplified": "t2s", "traditional": "s2t"}


def chinese_converter(to: Chinese) -> Callable[[str], str] | None:
    """Writes Chinese with simplified or traditional characters; None for `keep`.

    It changes kanji too: ask `language_by_script` first.
    """
    if to == "keep":
        return None
    how = "Install the extra: pip install 'trident-engine[chinese]'"
    return need("opencc", f"--chinese {to}", how).OpenCC(_CONFIGS[to]).convert
