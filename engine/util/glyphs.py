"""Text of any script in plots: finds installed fonts with its characters, else writes Latin letters or escapes.

matplotlib draws a box for a character that its font lacks. It accepts a list of fonts and tries them character by
character, so the first installed fonts that together have all characters are added after its default. They are looked
for in the font folders of the system, because matplotlib's cache misses fonts installed later. Characters that no font
has are written in Latin letters (anyascii, in the extra `chinese`) or as escapes, with a warning.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# File names of fonts with many characters, so that one or two fonts are enough.
_LIKELY = re.compile(
    r"cjk|sourcehan|wqy|zenhei|microhei|fallback|msyh|simsun|simhei|pingfang|stheiti|hiragino|uming|ukai|ipa[gm]|takao|vl-"
    r"|meiryo|yugoth|nanum|malgun|unifont|arialuni|noto",
    re.IGNORECASE,
)
_REGULAR = re.compile("regular|zenhei|microhei", re.IGNORECASE)
_MOST_FONTS = 200  # opened at most; each takes about 10 ms


@contextmanager
def drawable(texts: Sequence[str]) -> Iterator[Callable[[str], str]]:
    """Inside the block, matplotlib can draw `texts`; yields a function that turns one of them into a label."""
    import matplotlib

    families, missing = _fonts({char for text in texts for char in text if char.isprintable()})
    if missing:
        _warn(texts, missing)
    log = logging.getLogger("matplotlib.font_manager")
    before = log.level
    log.setLevel(logging.ERROR)  # else it warns once per text that such fonts have only one weight
    try:
        with matplotlib.rc_context({"font.family": [*matplotlib.rcParams["font.family"], *families]}):
            yield lambda text: _label(text, missing)
    finally:
        log.setLevel(before)


def _fonts(wanted: set[str]) -> tuple[list[str], frozenset[str]]:
    """(font families to try after matplotlib's default, characters that none of them has)."""
    from matplotlib import font_manager, rcParams
    from matplotlib.ft2font import FT2Font

    own = font_manager.findfont(font_manager.FontProperties(family=rcParams["font.family"]))
    missing = {ord(char) for char in wanted} - FT2Font(own).get_charmap().keys()
    families: list[str] = []
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in _installed() if missing else ():
        font = _opened(path)
        if font is None or not (found := missing & font.get_charmap().keys()):
            continue
        if path not in known:
            font_manager.fontManager.addfont(path)
        families.append(font.family_name)
        missing -= found
        if not missing:
            break
    return families, frozenset(map(chr, missing))


def _installed() -> list[str]:
    """Paths of the system's fonts, those likely to have many characters first."""
    from matplotlib import font_manager

    def order(path: str) -> tuple[bool, bool, int, str]:
        name = path.rpartition("/")[2]
        return not _LIKELY.search(name), not _REGULAR.search(name), len(name), path

    paths = (path for path in font_manager.findSystemFonts() if "emoji" not in path.lower())
    return sorted(paths, key=order)[:_MOST_FONTS]


def _opened(path: str) -> Any:
    """The font; None if it is corrupt or a bitmap font."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (OSError, RuntimeError, ValueError):
        return None
    return font if font.scalable else None


def _label(text: str, missing: frozenset[str]) -> str:
    """`text` for matplotlib: no math mode, not hidden from the legend, no character without a glyph."""
    drawn = "".join(char if char.isprintable() else _escaped(char) for char in text)
    if missing:
        runs = re.compile(f"[{''.join(map(re.escape, sorted(missing)))}]+")
        drawn = runs.sub(lambda run: _latin(run[0]), drawn)
    drawn = drawn.replace("$", r"\$")
    return f" {drawn}" if drawn.startswith("_") else drawn


def _anyascii() -> Callable[[str], str] | None:
    try:
        from anyascii import anyascii
    except ImportError:
        return None
    return anyascii


def _latin(run: str) -> str:
    spell = _anyascii()
    return "".join((spell and spell(char)) or _escaped(char) for char in run)


def _escaped(text: str) -> str:
    return text.encode("unicode_escape").decode()


def _warn(texts: Sequence[str], missing: frozenset[str]) -> None:
    text = next(text for text in texts if missing & set(text))
    shown = "".join(sorted(missing, key=text.find)[:5])
    drawn = _label(text, missing)
    latin = "" if _anyascii() else "; `pip install 'trident-engine[chinese]'` gives Latin letters instead of escapes"
    warnings.warn(
        f"no installed font has {shown}: {text[:60]} is written as {drawn[:120]} in the plot. Install a font, such as "
        f"fonts-noto-cjk or fonts-wqy-zenhei for Chinese{latin}.",
        stacklevel=4,
    )
