"""A text prepared for the rules: full-width forms folded, and regions with numbers found once for all rules."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

# One character for one, so that offsets in the folded text are offsets in the original.
_FOLD = {0xFF01 + i: chr(0x21 + i) for i in range(94)}  # full-width ASCII
_FOLD |= {zero + i: str(i) for zero in (0x660, 0x6F0, 0x966) for i in range(10)}  # Arabic and Devanagari digits
_FOLD |= dict.fromkeys((0xA0, 0x2002, 0x2003, 0x2007, 0x2008, 0x2009, 0x200A, 0x202F, 0x205F, 0x3000), " ")
_FOLD |= dict.fromkeys((0x2010, 0x2011, 0x2012, 0x2013, 0x2014, 0x2015, 0x2212, 0xFE63), "-")
_FOLD |= {0xFE6B: "@", 0x2024: ".", 0x3002: ".", 0xFF61: "."}
_SPACE = "\u00a0\u2002-\u200a\u202f\u205f\u3000\u2010-\u2015\u2212\ufe63\uff0b-\uff0f\u2024"
_WIDE = "０-９Ａ-Ｚａ-ｚ＠﹫٠-٩۰-۹०-९"
# Full-width runs; a variant of a space, dash or sign between digits; an area code in full-width brackets.
_FOLDED = re.compile(
    rf"[{_WIDE}{_SPACE}（](?:(?<=[{_WIDE}])[！-～{_WIDE}]*|(?<=[0-9A-Z)][{_SPACE}])[{_SPACE}]?(?=[0-9A-Z(+ ])|"
    rf"(?<=（)[+＋0-9０-９]{{2,5}}）)"
)

# At least seven digits, with at most four separators between two.
_NUMBER = re.compile(r"[0-9](?:[ ().+/-]{0,4}[0-9]){6,}+")
_CAPITAL_PAIR = re.compile("[A-Z][A-Z][ -]?[0-9]{2}")
_KEYLIKE = re.compile("[0-9]|hf_|A[KS]IA|AKID|LTAI")  # keys of some services may have no digit
_NO_NUMBER = re.compile(r"[0-9]+\.[0-9]+|(?:19|20)[0-9]{2}([-/.])[0-9]{1,2}\1[0-9]{1,2}(?:[ -]+[0-9]{1,2})?")


def words(text: str) -> frozenset[str]:
    """The set of the space-separated words."""
    return frozenset(text.split())


def keylike(token: str) -> bool:
    """Whether a token may contain a key: it has a digit, or a prefix of a key format without digits."""
    return _KEYLIKE.search(token) is not None


class Scan:
    """A folded text, with cached regions for several rules."""

    def __init__(self, text: str) -> None:
        self.text = text if text.isascii() else _FOLDED.sub(lambda match: match[0].translate(_FOLD), text)
        self._first = self._line = 0  # starts of the last table and line used by `heading`
        self._end_counts: Counter[int] = Counter()  # by end of a value: number of queries

    @cached_property
    def numbers(self) -> Sequence[tuple[int, int]]:
        """Regions with at least seven digits, and the characters around; without dates and decimals."""
        return list(windows(self.text, _NUMBER, 14, 6, lambda number: _NO_NUMBER.fullmatch(number) is None))

    @cached_property
    def capital_pairs(self) -> Sequence[int]:
        """Offsets of two capital letters before two digits, as at the start of an IBAN."""
        return [match.start() for match in _CAPITAL_PAIR.finditer(self.text)]

    def long_words(self) -> Iterator[tuple[int, int]]:
        """Spans of words of at least sixteen characters that may contain a key."""
        at = 0
        for word in self.text.split():  # ten times faster than a pattern
            if len(word) >= 16:
                at = self.text.find(word, at)
                if keylike(word):
                    yield at, at + len(word)
                at += len(word)

    def matches(self, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
        """Matches of a pattern for numbers, in the regions of `numbers`."""
        for window in self.numbers:
            yield from pattern.finditer(self.text, *window)

    def is_repeated(self, end: int) -> bool:
        """Whether a value with this end was queried more than eight times, as in a long run of names before it."""
        self._end_counts[end] += 1
        return self._end_counts[end] > 8

    def before(self, begin: int, n: int) -> str:
        """The n characters before an offset."""
        return self.text[max(0, begin - n) : begin]

    def heading(self, begin: int) -> str:
        """Heading of the table column at an offset; empty outside of tables."""
        line = self.text.rfind("\n", max(0, begin - 2000), begin) + 1
        if not line:
            return ""
        if line < self._line:  # another rule starts again from the top
            self._first = self._line = 0
        block = self.text.rfind("\n\n", self._line, line)
        self._first, self._line = (block + 2 if block >= 0 else self._first), line
        header = self.text[self._first : self.text.find("\n", self._first, self._first + 1000)]
        sign = next((sign for sign in "\t;|," if sign in header), "")
        columns = header.split(sign) if sign else []
        end = self.text.find("\n", begin, begin + 2000)
        commas = self.text.count(sign, line, end if end >= 0 else begin + 2000) if sign else 0
        if self._first >= line or commas != len(columns) - 1 or max(map(len, columns), default=99) > 32:
            return ""
        return columns[self.text.count(sign, line, begin)].strip()

    def after(self, end: int, n: int) -> str:
        """The n characters after an offset."""
        return self.text[end : end + n]


def windows(
    text: str,
    gate: re.Pattern[str],
    before: int = 0,
    after: int = 4,
    wanted: Callable[[str], bool] | None = None,
    within: tuple[int, int] | None = None,
) -> Iterator[tuple[int, int]]:
    """Disjoint regions around matches of the cheap pattern `gate` (if `wanted`), to search with an expensive one."""
    begin = end = -1
    for match in gate.finditer(text, *(within or ())):
        if wanted is not None and not wanted(match[0]):
            continue
        left, right = max(0, match.start() - before), min(len(text), match.end() + after)
        if left <= end:
            end = right
            continue
        if end > 0:
            yield begin, end
        begin, end = left, right
    if end > 0:
        yield begin, end
