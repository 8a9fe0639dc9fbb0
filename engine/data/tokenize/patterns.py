"""Pre-tokenization patterns of well-known tokenizers by name: they split texts into words before BPE.

A token never crosses a word boundary. Digits can be split as runs, one by one, or in groups of three.
"""

from __future__ import annotations

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_NUMBER = "NUMBER"  # placeholder for the rule for digits
DIGITS = {"individual": r"\p{N}", "triples": r"\p{N}{1,3}"}

# name -> (patterns, each applied to the words of the one before; the original rule for digits)
_NAMED: dict[str, tuple[tuple[str, ...], str]] = {
    "gpt2": ((r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",), r" ?\p{N}+"),
    "cl100k": (
        (
            _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+",
        ),
        DIGITS["triples"],
    ),
    "o200k": (
        (
            rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+"
            rf"{_CONTRACTIONS}?|"
            rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*"
            rf"{_CONTRACTIONS}?|NUMBER"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        DIGITS["triples"],
    ),
    "deepseek": (  # of V3: a word with Chinese or Japanese has no other script
        (
            _NUMBER,
            "[一-龥\u3040-ゟ゠-ヿ]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
            "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
        ),
        DIGITS["triples"],
    ),
}
_NAMED["llama3"] = _NAMED["cl100k"]
_NAMED["qwen"] = (_NAMED["cl100k"][0], DIGITS["individual"])
PATTERNS = tuple(sorted(_NAMED))


def words(pattern: str, digits: str = "") -> tuple[str, ...]:
    """Regular expressions of `pattern`: a name in PATTERNS, with the rule `digits` if given, or an expression.

    In the syntax of `tokenizers` (Oniguruma), to be applied one after another; each match becomes a separate word.
    """
    if pattern not in _NAMED:
        return (pattern,)
    expressions, default = _NAMED[pattern]
    return tuple(one.replace(_NUMBER, DIGITS[digits] if digits else default) for one in expressions)
