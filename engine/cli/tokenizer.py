"""`engine tokenizer train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from engine.cli.common import ends_on_signals
from engine.errors import EXIT_OK, ConfigError, Fault
from engine.util.signals import Interrupts


@dataclass
class TokenizerOptions:
    """Train a tokenizer and write it as a Hugging Face folder."""

    input: tuple[str, ...]
    """files, folders, globs, URLs or -, as for `engine prepare`"""
    vocab_size: int
    """tokens in all, special ones included; fewer if the text does not offer enough"""
    output: Path
    """folder to write"""
    kind: Literal["bpe", "unigram", "wordpiece"] = "bpe"
    """bpe (of bytes) and unigram (of characters, bytes for rare ones; extra formats: sentencepiece) can express any
    text; wordpiece is as BERT's, with [UNK], and alone may differ when it is trained on the same text again"""
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    """special tokens, ids from 0; the first ends documents"""
    user_tokens: tuple[str, ...] = ()
    """your own tokens: found in texts before anything else, unlike special ones; the last ids"""
    split_pattern: str = ""
    """what a word is, which no token reaches over: gpt2, cl100k (llama3), qwen, o200k, deepseek, or a regular
    expression in Oniguruma's syntax. Left out: gpt2 for bpe, sentencepiece's rules (scripts, numbers) for unigram"""
    digits: Literal["", "individual", "triples"] = ""
    """every digit by itself, or at most three together; left out: as the pattern has them. With gpt2 and o200k
    individual digits keep gigatoken from encoding: choose qwen"""
    normalizer: Literal["none", "nfc", "nfkc"] = "none"
    """Unicode form of texts before they are cut; nfkc folds full-width forms. Decoding gives that form"""
    min_frequency: int | None = None
    """bpe, wordpiece: merge no pair that is rarer (2)"""
    character_coverage: float | None = None
    """unigram: share of the text whose characters are tokens; others become bytes (0.9995, at most half the tokens)"""
    limit_alphabet: int | None = None
    """wordpiece: keep so many characters, the most frequent ones (all)"""
    max_token_length: int | None = None
    """longest token: in bytes for bpe (no limit), in characters for unigram (16)"""
    max_bytes: int = 0
    """train on so many bytes of text at most, taken evenly from all the input (of standard input: the first ones);
    0: on everything (memory grows with the number of different words)"""
    include: tuple[str, ...] = ()
    """inside folders, read only names that match one of these globs"""
    exclude: tuple[str, ...] = ()
    """inside folders, leave out names and subfolders that match one of these"""
    json_key: tuple[str, ...] = ("text",)
    """key or column of the text, a.b for b in the object a; several are joined by a newline"""
    format: Literal["", "jsonl", "json", "csv", "parquet", "arrow", "text"] = ""
    """what the inputs are, whatever their names"""
    on_error: Literal["stop", "skip"] = "stop"
    """stop at bad input with file and line, or leave it out and count it"""
    overwrite: bool = False
    """replace the tokenizer that is there"""


@ends_on_signals
def run(args: list[str], stop: Interrupts) -> int:
    """Run the verb; returns the exit code."""

    from engine.cli.prepare_console import prepare_progress, show_trained
    from engine.data.read.options import ReadOptions
    from engine.data.tokenize.recipe import Recipe
    from engine.data.tokenize.train import train_tokenizer

    if args[:1] not in (["train"], ["-h"], ["--help"]):
        raise ConfigError(
            [Fault("", "engine tokenizer", " ".join(args[:1]), "is not train", "engine tokenizer train ...")]
        )
    o = tyro.cli(TokenizerOptions, args=args[args[:1] == ["train"] :], prog="engine tokenizer train")
    recipe = Recipe(**{field.name: getattr(o, field.name) for field in dataclasses.fields(Recipe)})
    if faults := [*tokenizer_faults(o), *recipe.faults()]:
        raise ConfigError(faults)
    with prepare_progress() as progress:
        trained = train_tokenizer(
            ReadOptions(o.input, o.include, o.exclude, o.json_key, o.format, o.on_error),
            o.output,
            recipe,
            max_bytes=o.max_bytes,
            overwrite=o.overwrite,
            progress=progress,
            note=print,
            stop=stop,
        )
    show_trained(trained, recipe, o.output)
    return EXIT_OK


def tokenizer_faults(o: TokenizerOptions) -> Iterator[Fault]:
    """What is wrong with the options of `engine tokenizer train`, besides those of engine.data.tokenize.recipe."""
    if not o.input:
        yield Fault("", "--input", "", "names nothing to read", "Give files, folders, globs, URLs or -.")
    if o.max_bytes < 0:
        yield Fault("", "--max-bytes", o.max_bytes, "is below 0", "Use 0 for everything.")
