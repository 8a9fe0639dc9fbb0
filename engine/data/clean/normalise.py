"""Text normalisation: Unicode NFC, line ends, control characters and spaces.

Characters with a meaning are kept: indentation, tabs, single blank lines, joiners inside words and emoji. Idempotent.
"""

from __future__ import annotations

import re
import unicodedata

# Control characters but tab and newline, byte order mark, zero-width spaces, bidirectional overrides, soft hyphen.
_CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069]"
)
_SPACES = re.compile(r"[\u00a0\u1680\u2000-\u200a\u202f\u205f]")  # not U+3000, which indents Chinese and Japanese text
_LINE_ENDS = re.compile(r"\r\n?|\x85|\u2028|\u2029")
_TRAILING = re.compile(r"[ \t\u3000]+$", re.M)
_MANY_LINES = re.compile(r"\n{3,}")


def normalise(text: str) -> tuple[str, tuple[str, ...]]:
    """(Normalised text, names of the steps that changed it)."""
    if text.isascii() and not _ASCII_WORK.search(text):
        return text, ()
    changes: list[str] = []
    for name, step in _STEPS.items():
        changed = step(text)
        if changed != text:
            changes.append(name)
            text = changed
    return text, tuple(changes)


def _whitespace(text: str) -> str:
    text = _TRAILING.sub("", _SPACES.sub(" ", text))
    return _MANY_LINES.sub("\n\n", text).strip("\n")


_ASCII_WORK = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]|[ \t](?:\n|\Z)|\n\n\n|\A\n|\n\Z")
_STEPS = {
    "line ends": lambda text: _LINE_ENDS.sub("\n", text),
    "control characters": lambda text: _CONTROL.sub("", text),
    "NFC": lambda text: unicodedata.normalize("NFC", text),
    "whitespace": _whitespace,
}
