"""The options of `engine tokenizer train`, for the command and for the function."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from engine.data.read.options import ReadOptions
from engine.data.tokenize.recipe import Recipe
from engine.errors import FieldError
from engine.util.words import NO_STRINGS, TEXT_FIELD, StrTuple

END = StrTuple(("<|endoftext|>",))


@dataclass(frozen=True)
class TokenizerOptions(ReadOptions):
    """Train a tokenizer and write it as a Hugging Face folder."""

    input: StrTuple
    vocab_size: int
    """total number of tokens, special ones included; fewer if the text does not offer enough"""
    output: Path
    """folder to write"""
    kind: Literal["bpe", "unigram", "wordpiece"] = "bpe"
    """bpe (of bytes) and unigram (of characters, with bytes for rare ones; extra formats: sentencepiece) can encode any
    text; wordpiece is BERT's, with [UNK], and the only one that may differ when trained on the same text again"""
    special_tokens: StrTuple = END
    """special tokens, ids from 0; the first one ends documents"""
    user_tokens: StrTuple = NO_STRINGS
    """your own tokens: matched in texts before everything else, unlike special ones; they get the last ids"""
    split_pattern: str = ""
    """pattern of words, which no token crosses: gpt2, cl100k (llama3), qwen, o200k, deepseek, or a regular expression
    in Oniguruma syntax; empty: gpt2 for bpe, sentencepiece's rules (scripts, numbers) for unigram"""
    digits: Literal["", "individual", "triples"] = ""
    """individual: every digit is a token; triples: at most three together; not set: as in the pattern. With gpt2 and
    o200k individual digits prevent encoding with gigatoken: use qwen"""
    normalizer: Literal["none", "nfc", "nfkc"] = "none"
    """Unicode normalisation before the text is split; nfkc folds full-width forms. Decoding gives the normalised
    text"""
    min_frequency: Optional[int] = None  # noqa: UP045  (see engine.util.words)
    """bpe, wordpiece: minimum count of a pair to merge; not set: 2"""
    character_coverage: Optional[float] = None  # noqa: UP045  (see engine.util.words)
    """unigram: fraction of the text whose characters become tokens, others become bytes; not set: 0.9995, with at most
    half of the tokens"""
    limit_alphabet: Optional[int] = None  # noqa: UP045  (see engine.util.words)
    """wordpiece: number of characters to keep, the most frequent ones; not set: all"""
    max_token_length: Optional[int] = None  # noqa: UP045  (see engine.util.words)
    """longest token: in bytes for bpe (not set: no limit), in characters for unigram (not set: 16)"""
    max_bytes: int = 0
    """maximum bytes of text to train on, spread evenly over the input (of standard input: the first ones); 0:
    everything, with memory that grows with the number of different words"""
    include: StrTuple = NO_STRINGS
    exclude: StrTuple = NO_STRINGS
    json_key: StrTuple = TEXT_FIELD
    format: Literal["", "jsonl", "json", "csv", "parquet", "arrow", "text"] = ""
    on_error: Literal["stop", "skip"] = "stop"
    overwrite: bool = False
    """replace an existing tokenizer"""

    @property
    def recipe(self) -> Recipe:
        """The recipe of the tokenizer: all options that do not concern the texts."""
        return Recipe(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)})

    def errors(self) -> Iterator[FieldError]:
        """All errors in the options, before any work starts."""
        if not self.input:
            problem = "names no input"
            yield FieldError("tokenize.no-input", "--input", "", problem, "Give files, folders, globs, URLs or -.")
        if self.max_bytes < 0:
            yield FieldError(
                "tokenize.out-of-range", "--max-bytes", self.max_bytes, "is below 0", "Use 0 for everything."
            )
        yield from self.recipe.errors()
