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
    """files, folders, globs, URLs or -, as for `engine prepare`"""
    vocab_size: int
    """tokens in all, special ones included; fewer if the text does not offer enough"""
    output: Path
    """folder to write"""
    kind: Literal["bpe", "unigram", "wordpiece"] = "bpe"
    """bpe (of bytes) and unigram (of characters, bytes for rare ones; extra formats: sentencepiece) can express any
    text; wordpiece is as BERT's, with [UNK], and alone may differ when it is trained on the same text again"""
    special_tokens: StrTuple = END
    """special tokens, ids from 0; the first ends documents"""
    user_tokens: StrTuple = NO_STRINGS
    """your own tokens: found in texts before anything else, unlike special ones; the last ids"""
    split_pattern: str = ""
    """what a word is, which no token reaches over: gpt2, cl100k (llama3), qwen, o200k, deepseek, or a regular
    expression in Oniguruma's syntax. Left out: gpt2 for bpe, sentencepiece's rules (scripts, numbers) for unigram"""
    digits: Literal["", "individual", "triples"] = ""
    """every digit by itself, or at most three together; left out: as the pattern has them. With gpt2 and o200k
    individual digits keep gigatoken from encoding: choose qwen"""
    normalizer: Literal["none", "nfc", "nfkc"] = "none"
    """Unicode form of texts before they are cut; nfkc folds full-width forms. Decoding gives that form"""
    min_frequency: Optional[int] = None  # noqa: UP045  (see engine.util.words)
    """bpe, wordpiece: merge no pair that is rarer (2)"""
    character_coverage: Optional[float] = None  # noqa: UP045  (see engine.util.words)
    """unigram: share of the text whose characters are tokens; others become bytes (0.9995, at most half the tokens)"""
    limit_alphabet: Optional[int] = None  # noqa: UP045  (see engine.util.words)
    """wordpiece: keep so many characters, the most frequent ones (all)"""
    max_token_length: Optional[int] = None  # noqa: UP045  (see engine.util.words)
    """longest token: in bytes for bpe (no limit), in characters for unigram (16)"""
    max_bytes: int = 0
    """train on so many bytes of text at most, taken evenly from all the input (of standard input: the first ones);
    0: on everything (memory grows with the number of different words)"""
    include: StrTuple = NO_STRINGS
    """inside folders, read only names that match one of these globs"""
    exclude: StrTuple = NO_STRINGS
    """inside folders, leave out names and subfolders that match one of these"""
    json_key: StrTuple = TEXT_FIELD
    """key or column of the text, a.b for b in the object a; several are joined by a newline"""
    format: Literal["", "jsonl", "json", "csv", "parquet", "arrow", "text"] = ""
    """what the inputs are, whatever their names"""
    on_error: Literal["stop", "skip"] = "stop"
    """stop at bad input with file and line, or leave it out and count it"""
    overwrite: bool = False
    """replace the tokenizer that is there"""

    @property
    def recipe(self) -> Recipe:
        """What tokenizer to train, whatever the texts."""
        return Recipe(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)})

    def errors(self) -> Iterator[FieldError]:
        """What is wrong with them, all of it at once, before any work is done."""
        if not self.input:
            what = "names nothing to read"
            yield FieldError("tokenize.no-input", "--input", "", what, "Give files, folders, globs, URLs or -.")
        if self.max_bytes < 0:
            yield FieldError(
                "tokenize.out-of-range", "--max-bytes", self.max_bytes, "is below 0", "Use 0 for everything."
            )
        yield from self.recipe.errors()
