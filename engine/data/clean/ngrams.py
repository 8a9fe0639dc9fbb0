"""Hashes of words: n-grams for decontamination, and MinHash bands for near-duplicates.

A word is a run of letters and digits in lower case, or one character of Chinese, Japanese kana or Thai, which are
written without spaces. Full-width and half-width characters are equal. All hashes are pure functions of the text, equal
on every machine.

MinHash: the Jaccard index J of the 5-word shingles of two texts is the probability that a random permutation of all
shingles has the same first shingle in both. `rows` such minima form a band; texts that are equal in at least one of
`bands` bands are near-duplicates. The probability of that is 1 - (1 - J^rows)^bands; for 14 x 8 it is 0.92 at J = 0.8,
0.57 at 0.7, 0.05 at 0.5 and 0.0009 at 0.3.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from engine.data.clean.width import fold_width

U64 = npt.NDArray[np.uint64]

_SINGLE = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_WORD = re.compile(rf"[{_SINGLE}]|[^\W_{_SINGLE}]+")
# 1,000,000 or 12.5 or 1.234,5 or 7: groups of three digits with one separator, then a decimal part.
_GROUPS = "|".join(rf"\d{{1,3}}(?:{mark}\d{{3}})+" for mark in (",", r"\.", "['’]", r"[ \u00a0\u2009\u202f]"))
_NUMBER = rf"(?:{_GROUPS})(?:[.,]\d+)?(?!\d)|\d+(?:[.,]\d+)?"
_WORD_OR_NUMBER = re.compile(rf"[^\W\d_{_SINGLE}]+|[{_SINGLE}]|{_NUMBER}")
_NOT_DIGIT = re.compile(r"\D")
_CHUNK = 4096  # shingles hashed at once: bounds memory to 4096 x bands x rows x 8 bytes
_PERMUTATIONS_SEED = 0x7261_6E6B


def words_of(text: str) -> list[str]:
    """The words of a text, in order."""
    return _WORD.findall(_normalised(text))


def _normalised(text: str) -> str:
    """The text in one form: NFC, half width, lower case."""
    return unicodedata.normalize("NFC", fold_width(text, "all").lower())


def words_and_numbers_of(text: str) -> list[str]:
    """Like `words_of`, but a number with its separators is one word of its digits: 1,000 is 1000."""
    found: list[str] = _WORD_OR_NUMBER.findall(_normalised(text))
    return [_NOT_DIGIT.sub("", word) if word[0].isdecimal() else word for word in found]


def ngram_hashes(words: list[str], n: int) -> U64:
    """Hash of every n-gram, uint64 [max(0, len(words) - n + 1)]."""
    return _rolling_hashes(_word_hashes(words), n)


def ngram_hashes_of_any_number(words: list[str], n: int) -> U64:
    """`ngram_hashes` for words of `words_and_numbers_of`, where all numbers are equal.

    N-grams with more numbers than other words are hashed exactly: otherwise all rows of tables would be equal.
    """
    single = _word_hashes(words)
    exact = _rolling_hashes(single, n)
    is_number = np.fromiter((word[0].isdecimal() for word in words), np.bool_, len(words))
    if not exact.size or not is_number.any():
        return exact
    before = np.concatenate([[0], np.cumsum(is_number)])
    folded = _rolling_hashes(np.where(is_number, np.uint64(0), single), n)
    return np.where(2 * (before[n:] - before[:-n]) > n, exact, folded)


def _word_hashes(words: list[str]) -> U64:
    """Hash of each word, uint64 [len(words)]."""
    known: dict[str, int] = {}
    digest = xxhash.xxh3_64_intdigest
    return np.fromiter(
        (known[word] if word in known else known.setdefault(word, digest(word.encode())) for word in words),
        np.uint64,
        len(words),
    )


def _rolling_hashes(single: U64, n: int) -> U64:
    """Hash of every n consecutive hashes, uint64 [max(0, len(single) - n + 1)]."""
    count = len(single) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for i in range(n):  # a polynomial modulo 2^64
        total = total * np.uint64(0x9E37_79B9_7F4A_7C15) + single[i : i + count]
    return _mix(total)


def _mix(values: U64) -> U64:
    """Every bit of the result depends on every bit of the value (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class MinHash:
    """Parameters of the search for near-duplicates. bands = 0: none."""

    bands: int = 14
    rows: int = 8
    words: int = 5  # of a shingle

    def keys(self, text: str) -> U64:
        """One key per band, uint64 [bands]. A text of fewer words than a shingle is a single shingle."""
        words = words_of(text)
        shingles = np.unique(ngram_hashes(words, min(self.words, max(1, len(words)))))
        if not shingles.size:  # no words: only an identical text is a duplicate
            shingles = np.array([xxhash.xxh3_64_intdigest(text.encode())], np.uint64)
        factors, offsets = self._permutations()
        minima = np.full(factors.shape, np.iinfo(np.uint64).max, np.uint64)
        for begin in range(0, shingles.size, _CHUNK):
            chunk = shingles[begin : begin + _CHUNK, None]
            minima = np.minimum(minima, (chunk * factors + offsets).min(axis=0))
        # The low bits of a multiplication are weak: all bits decide the order, but only the high ones enter the key.
        table = (minima >> np.uint64(20)).reshape(self.bands, self.rows)
        key = np.arange(1, self.bands + 1, dtype=np.uint64)
        for row in range(self.rows):
            key = _mix(key * np.uint64(0x9E37_79B9_7F4A_7C15) + table[:, row])
        return key

    def _permutations(self) -> tuple[U64, U64]:
        """The random permutations, as (odd factors, offsets), uint64 [bands * rows] each."""
        count = self.bands * self.rows
        numbers = _mix(np.arange(1, 2 * count + 1, dtype=np.uint64) * np.uint64(_PERMUTATIONS_SEED))
        return numbers[:count] | np.uint64(1), numbers[count:]

    def detection_probability(self, jaccard: float) -> float:
        """Probability that two texts with this Jaccard index are found."""
        return float(1 - (1 - jaccard**self.rows) ** self.bands)
