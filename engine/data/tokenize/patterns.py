"""How texts are cut into words before their tokens are looked for: the patterns of well-known tokenizers, by name.

A token never reaches over the end of a word. Digits can be kept in runs, one by one, or in groups of three.
"""

from __future__ import annotations

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_NUMBER = "NUMBER"  # where the rule for digits stands
DIGITS = {"individual": r"\p{N}", "triples": r"\p{N}{1,3}"}

# name -> patterns, each applied to what the one before it left as a word; and the rule for digits of its makers
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
    "deepseek": (  # of V3: Chinese and Japanese never share a word with other scripts
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
    """Regular expressions of `pattern`: a name of PATTERNS, with the `digits` of DIGITS if asked, or an expression.

    They are for `tokenizers` (Oniguruma's syntax), one after the other: what an expression matches is a word by itself.
    """
    if pattern not in _NAMED:
        return (pattern,)
    named, own = _NAMED[pattern]
    return tuple(one.replace(_NUMBER, DIGITS[digits] if digits else own) for one in named)
