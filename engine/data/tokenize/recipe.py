"""Recipe of a tokenizer: all training settings, which are checked before any text is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tokenizers import Regex

from engine.data.tokenize.patterns import DIGITS, PATTERNS
from engine.errors import FieldError, truncate

KINDS = ("bpe", "unigram", "wordpiece")
NORMALIZERS = ("none", "nfc", "nfkc")
UNKNOWN = {"unigram": "<unk>", "wordpiece": "[UNK]"}  # unigram never uses it, but its model needs one
MIN_FREQUENCY = 2
CHARACTER_COVERAGE = 0.9995
MAX_PIECE_LENGTH = 16
_DEFAULTS: dict[str, dict[str, Any]] = {
    "bpe": {"split_pattern": "gpt2", "min_frequency": MIN_FREQUENCY},
    "unigram": {
        "split_pattern": "rules of sentencepiece",
        "character_coverage": CHARACTER_COVERAGE,
        "max_token_length": MAX_PIECE_LENGTH,
    },
    "wordpiece": {"min_frequency": MIN_FREQUENCY},
}
_BYTE_SPELLING = "<0x123456789ABCDEF>unk"
# Kinds that an option applies to; for others it is an error, as it would have no effect.
_APPLIES_TO = {
    "split_pattern": ("bpe", "unigram"),
    "digits": ("bpe", "unigram"),
    "min_frequency": ("bpe", "wordpiece"),
    "character_coverage": ("unigram",),
    "limit_alphabet": ("wordpiece",),
    "max_token_length": ("bpe", "unigram"),
}
_WHY_NOT = {
    ("split_pattern", "wordpiece"): "it splits at white space and punctuation, like BERT's",
    ("digits", "wordpiece"): "it splits at white space and punctuation, like BERT's",
    ("character_coverage", "bpe"): "it works on bytes, and its alphabet is all 256 of them",
    ("character_coverage", "wordpiece"): "its alphabet is a number of characters: --limit-alphabet",
    ("limit_alphabet", "bpe"): "it works on bytes, and its alphabet is all 256 of them",
    ("limit_alphabet", "unigram"): "its alphabet is a share of the text: --character-coverage",
    ("min_frequency", "unigram"): "it weighs all pieces by their likelihood",
    ("max_token_length", "wordpiece"): "its trainer has no such limit",
}


@dataclass(frozen=True)
class Recipe:
    """Settings for training a tokenizer. "" and None: the default of `kind`.

    `special_tokens`: ids from 0, the first ends documents. `user_tokens`: matched in texts before anything else.
    `split_pattern`: pre-tokenization into words (patterns.py). `max_token_length`: bytes for bpe, characters for
    unigram.
    """

    vocab_size: int
    kind: str = "bpe"
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    user_tokens: tuple[str, ...] = ()
    split_pattern: str = ""
    digits: str = ""
    normalizer: str = "none"
    min_frequency: int | None = None
    character_coverage: float | None = None
    limit_alphabet: int | None = None
    max_token_length: int | None = None

    def metadata(self) -> dict[str, Any]:
        """The settings that apply to the kind, with its defaults filled in, for training.json."""
        defaults = _DEFAULTS[self.kind]
        given = {k: v for k, v in asdict(self).items() if self.kind in _APPLIES_TO.get(k, KINDS)}
        return {k: defaults[k] if v in ("", None) and k in defaults else v for k, v in given.items()}

    def required_characters(self) -> set[str]:
        """Unigram: characters that are always pieces, so that the text "<0x41>" never becomes that byte token."""
        return {*_BYTE_SPELLING, *"".join(self.special_tokens)}

    def num_reserved_tokens(self) -> int:
        """Number of tokens that exist before training: special and user tokens, unknown token, bytes."""
        unknown, num_bytes = self.kind in UNKNOWN, 256 * (self.kind != "wordpiece")
        return len(self.special_tokens) + len(self.user_tokens) + unknown + num_bytes

    def errors(self) -> Iterator[FieldError]:
        """All errors in the recipe."""
        if self.kind not in KINDS:
            problem = f"is not one of {', '.join(KINDS)}"
            yield FieldError("tokenize.unknown-choice", "--kind", self.kind, problem, "Choose one.")
            return
        yield from self._token_errors()
        for option, kinds in _APPLIES_TO.items():
            if getattr(self, option) not in ("", None) and self.kind not in kinds:
                name = "--" + option.replace("_", "-")
                why = _WHY_NOT[option, self.kind]
                yield FieldError(
                    "tokenize.option-has-no-effect",
                    name,
                    getattr(self, option),
                    f"has no effect for {self.kind}: {why}",
                    "Omit it.",
                )
        yield from self._pattern_errors()
        if self.normalizer not in NORMALIZERS:
            yield FieldError(
                "tokenize.unknown-choice",
                "--normalizer",
                self.normalizer,
                f"is not one of {', '.join(NORMALIZERS)}",
                "Choose one.",
            )
        if self.character_coverage is not None and not 0 < self.character_coverage <= 1:
            yield FieldError(
                "tokenize.out-of-range",
                "--character-coverage",
                self.character_coverage,
                "is not a share in (0, 1]",
                "Use a value such as 0.9995.",
            )
        for option in ("min_frequency", "limit_alphabet", "max_token_length"):
            if getattr(self, option) is not None and getattr(self, option) < 1:
                yield FieldError(
                    "tokenize.out-of-range",
                    "--" + option.replace("_", "-"),
                    getattr(self, option),
                    "is below 1",
                    "Use 1 or more.",
                )
        if self.kind == "bpe" and self.max_token_length == 1:
            yield FieldError(
                "tokenize.out-of-range",
                "--max-token-length",
                1,
                "leaves single bytes, and there is nothing to train",
                "Use 2 or more.",
            )
        if self.kind == "unigram" and (self.max_token_length or 1) > 512:
            yield FieldError(
                "tokenize.out-of-range",
                "--max-token-length",
                self.max_token_length,
                "is above 512",
                "sentencepiece accepts up to 512.",
            )

    def _token_errors(self) -> Iterator[FieldError]:
        special, user = list(self.special_tokens), list(self.user_tokens)
        if not special or len(set(special)) < len(special) or "" in special:
            yield FieldError(
                "tokenize.special-tokens",
                "--special-tokens",
                special,
                "should be at least one, all different, none empty",
                "Name them.",
            )
        if len({*special, *user}) < len(set(special)) + len(user) or "" in user:
            yield FieldError(
                "tokenize.user-tokens",
                "--user-tokens",
                user,
                "should be all different, none special, none empty",
                "Name others.",
            )
        least = self.num_reserved_tokens() + (len(self.required_characters()) if self.kind == "unigram" else 0)
        if self.vocab_size < least:
            parts = ["256 bytes"] * (self.kind != "wordpiece") + [UNKNOWN.get(self.kind, "")] * (self.kind in UNKNOWN)
            parts += ["the characters of their spellings"] * (self.kind == "unigram")
            parts += [f"{len(special)} special tokens"] + [f"{len(user)} user tokens"] * bool(user)
            yield FieldError(
                "tokenize.vocabulary-too-small",
                "--vocab-size",
                self.vocab_size,
                f"{', '.join(parts)} need >= {least}",
                "Make it larger.",
            )

    def _pattern_errors(self) -> Iterator[FieldError]:
        if self.digits and self.digits not in DIGITS:
            yield FieldError(
                "tokenize.unknown-choice", "--digits", self.digits, f"is not one of {', '.join(DIGITS)}", "Choose one."
            )
        if not self.split_pattern or self.split_pattern in PATTERNS:
            return
        if self.digits:
            problem = "has no effect with a custom pattern"
            yield FieldError(
                "tokenize.digits-beside-pattern",
                "--digits",
                self.digits,
                problem,
                r"Write it into the pattern: \p{N} or \p{N}{1,3}.",
            )
        try:
            Regex(self.split_pattern)
        except Exception as err:  # the library raises bare Exception
            names = f"Give one of {', '.join(PATTERNS)}, or an expression in Oniguruma's syntax."
            yield FieldError(
                "tokenize.pattern-invalid",
                "--split-pattern",
                self.split_pattern,
                f"is not a regular expression: {truncate(str(err))}",
                names,
            )
