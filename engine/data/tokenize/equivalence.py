"""Compares a converted tokenizer with the library its file was made for, on texts that expose differences."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import tokenizers

from engine.errors import format_value

Ids = Sequence[Sequence[int]]
_BATCH = 256

# White space runs, digits, contractions, scripts without spaces, combining marks, emoji, odd characters, code, markup.
EDGE_CASES = (
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
_WHITE = (
    " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680"
    + "".join(map(chr, range(0x2000, 0x200E)))
    + ("\u2028\u2029\u202f\u205f\u2060\u3000\ufeff▁")
)
_RUN = 100
_MARKS = "\u0301\u0323\u0308\u0327\u0345\u20dd\u3099\u309a\ufe0f"  # combining marks for letters of any script
_MOST_SEQUENCES = 20_000


class OriginalLibrary(Protocol):
    """The library that a tokenizer file was made for. `name`: its name and version."""

    name: str

    def encode_batch(self, texts: Sequence[str]) -> Ids: ...


class ConversionMismatch(Exception):
    """A converted tokenizer gives ids that differ from the original's."""


def texts_for(spellings: Sequence[str]) -> list[str]:
    """Texts that test a vocabulary with these spellings: white space runs, combining sequences, adjacent pieces."""
    lengths = [range(first, first + 10) for first in range(1, _RUN + 1, 10)]
    runs = ["x" + "y".join(c * n for n in some) + "z" for c in _WHITE for some in lengths]
    runs += [f"{c * n}x{c * n}" for c in _WHITE for n in (range(1, _RUN + 1) if c == " " else (1, 2, 3, 4, 16, 17))]
    sequences = list(_sequences({c for spelling in spellings for c in spelling}))
    joined = [" ".join(sequences[at : at + 8]) for at in range(0, len(sequences), 8)]
    spellings = spellings[:: -(-len(spellings) // _MOST_SEQUENCES) or 1]
    count = len(spellings)
    step = next(n for n in range(count * 5 // 8 + 1, count + 2) if math.gcd(n, count) == 1) if count else 1
    scattered = [spellings[i * step % count] for i in range(count)]
    adjacent = ["".join(each[at : at + 32]) for each in (spellings, scattered) for at in range(0, count, 32)]
    return [*EDGE_CASES, *runs, *joined, *adjacent]


def _sequences(letters: set[str]) -> Iterator[str]:
    """Combining sequences in the scripts of `letters`: those of normal forms, and with marks in reversed order."""
    scripts = {_script(letter) for letter in letters if letter.isalpha()} - {"", "CJK"}
    here = [chr(number) for number in range(0xC0, 0x10000) if _script(chr(number)) in scripts]
    marks = [c for c in here if unicodedata.category(c) in ("Mn", "Mc")]
    forms: dict[str, None] = {}
    for letter in (*sorted(letters), *here):
        if "\uac00" <= letter <= "\ud7a3" and ord(letter) % 29 and letter not in letters:
            continue  # 11,000 Hangul syllables, composed the same way
        for form in (unicodedata.normalize("NFD", letter), unicodedata.normalize("NFKD", letter)):
            if len(form) > 1:
                forms[form] = forms[form[0] + form[:0:-1]] = None
    marked: dict[str, None] = {}
    for number, letter in enumerate((*sorted(letters), *(c for c in here if unicodedata.category(c)[0] == "L"))):
        for mark in (_MARKS[number % len(_MARKS)], marks[number % len(marks)] if marks else "\u0301"):
            marked[letter + mark] = marked[letter + mark + _MARKS[(number + 1) % len(_MARKS)]] = None
    yield from forms
    yield from list(marked)[:: -(-len(marked) // _MOST_SEQUENCES) or 1]


def _script(letter: str) -> str:
    """Script of a letter or mark, such as LATIN: the first word of its Unicode name that is not a width or modifier."""
    words = unicodedata.name(letter, "").split()
    return next((word for word in words if word not in ("FULLWIDTH", "HALFWIDTH", "MODIFIER")), "")


def encode_plain(tokenizer: tokenizers.Tokenizer) -> Callable[[Sequence[str]], Ids]:
    """Returns a function that encodes texts and treats the spelling of a special token as text."""
    tokenizer.encode_special_tokens = True
    return lambda texts: [found.ids for found in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def compare(
    encode: Callable[[Sequence[str]], Any],
    original: OriginalLibrary,
    texts: Sequence[str],
) -> None:
    """Raise ConversionMismatch at the first ids that differ from the original's."""
    for at in range(0, len(texts), _BATCH):
        batch = texts[at : at + _BATCH]
        for text, ids, right in zip(batch, encode(batch), original.encode_batch(batch)):
            ids, right = list(ids), list(right)
            if ids == right:
                continue
            place = next((i for i, (a, b) in enumerate(zip(ids, right)) if a != b), min(len(ids), len(right)))
            raise ConversionMismatch(
                f"the ids of {format_value(text)} from token {place} are {ids[place : place + 4]} instead of "
                f"{right[place : place + 4]}, which {original.name} gives"
            )
