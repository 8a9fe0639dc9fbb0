"""Texts on which tokenizers are compared before one is believed to be the other, and the comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.errors import DataError

Pieces = Sequence[tuple[str, float]]  # spelling and log-probability of every id
Encode = Callable[[str], Sequence[int]]

# White space runs, digits, contractions, scripts without spaces, combining marks, emoji, odd characters, code, markup.
AWKWARD = (
    " ",
    "\n\n\n  \n\t\t x  y   z    \r\n \u00a0\u3000\u2028 end ",
    "don't DON'T I'll we’ve it'S 'tis",
    "1234567890 3.14159 1,000,000 ٣٤٥ ½ ² x1y22z333",
    "naïve café e\u0301 ﬁ ǅ İstanbul ẞ ſ K Å",
    "今天天气很好。我们去公园吧！コンピュータ 한국어 ภาษาไทย हिन्दी العربية עברית",
    "👩‍👩‍👧‍👦 🇨🇭 ☕️ 🏳️‍🌈 \u200b\u200d\ufffd",
    "def f(x):\n    return x**2  # comment\n\n\nclass A(B): pass\n",
    "https://example.org/a?b=c&d=%20 user@example.org <|endoftext|></s><s>[INST] <unk> <0x41> Ġ Ċ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa --------------------------------====",
)


def compare(path: Path, mine: Encode, original: Encode, texts: Sequence[str], likely: Pieces | None = None) -> None:
    """Raises DataError with the first ids that differ. `likely`: pieces of a unigram model, whose ties may differ."""
    for text in texts:
        ids, right = list(mine(text)), list(original(text))
        if ids != right and not (likely and equally_likely(ids, right, likely)):
            at = next((i for i, (a, b) in enumerate(zip(ids, right)) if a != b), min(len(ids), len(right)))
            raise DataError(
                f"{path}: cannot be converted exactly: of {text[:60]!r} token {at} and those behind it are "
                f"{ids[at : at + 4]} instead of {right[at : at + 4]}. "
                f"Give the tokenizer.json that its makers publish."
            )


def equally_likely(mine: Sequence[int], right: Sequence[int], pieces: Pieces) -> bool:
    """Whether two cuts of a text into (piece, log-probability) tell the same text and are a tie in float32.

    "0" + "00" and "00" + "0" are one: sentencepiece adds scores up in float32 and `tokenizers` in float64, so either
    may come out of either.
    """
    (a, score), (b, other) = (
        ("".join(pieces[i][0] for i in ids), math.fsum(pieces[i][1] for i in ids)) for ids in (mine, right)
    )
    return a == b and math.isclose(score, other, rel_tol=1e-6)
