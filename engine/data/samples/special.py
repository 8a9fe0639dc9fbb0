"""Looks up the special tokens that the config names by spelling; reports all errors at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.config.schema import Config, DataConfig
from engine.data.samples.fim import FillInTheMiddle, Sentinels, SpanCodec
from engine.data.tokenize.tokenizer import Tokenizer
from engine.errors import ConfigError, DataError, FieldError

# prefix, suffix, middle
FAMILIES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("<PRE>", "<SUF>", "<MID>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
)
_MAKE = "engine tokenizer train --special-tokens '<|endoftext|>' " + " ".join(f"'{token}'" for token in FAMILIES[0])


def check(cfg: Config) -> None:
    """Check data.fim_* and data.mask_tokens against the tokenizer. Raises ConfigError."""
    if cfg.data.tokenizer and (cfg.data.fim_rate or cfg.data.mask_tokens):
        try:
            tokenizer = Tokenizer.load(Path(cfg.data.tokenizer))
        except DataError as error:
            problem = f"cannot be used ({error})"
            fix = "It is needed for data.fim_rate and data.mask_tokens."
            raise ConfigError(
                [FieldError("samples.tokenizer-unusable", "data.tokenizer", cfg.data.tokenizer, problem, fix)]
            ) from None
        if errors := [*_mask_errors(cfg.data, tokenizer), *_fim_errors(cfg.data, tokenizer)]:
            raise ConfigError(errors)


def masked_labels(data: DataConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Sorted ids of data.mask_tokens. Raises ConfigError for an unknown token."""
    if errors := list(_mask_errors(data, tokenizer)):
        raise ConfigError(errors)
    found = {tokenizer.token_id(token) for token in data.mask_tokens.split()}
    return tuple(sorted(number for number in found if number is not None))


def fill_in_the_middle(
    data: DataConfig,
    tokenizer: Tokenizer,
    eod: int,
    seed: int,
    active: Sequence[bool] = (True,),
    bos: int | None = None,
) -> FillInTheMiddle:
    """The transform that data.fim_* configure; seed: train.seed; bos: token that begins documents.

    Raises ConfigError if the tokenizer does not fit.
    """
    found = sentinels(data, tokenizer)
    if eod in (found.prefix, found.suffix, found.middle):
        problem, fix = "includes the end-of-document token", "Name three tokens without another use."
        raise ConfigError(
            [FieldError("samples.fim-token-ends-documents", "data.fim_tokens", data.fim_tokens, problem, fix)]
        )
    return FillInTheMiddle(
        tokenizer,
        found,
        eod,
        rate=data.fim_rate,
        spm_rate=data.fim_spm_rate,
        seed=seed,
        active=active,
        bos=bos,
    )


def sentinels(data: DataConfig, tokenizer: Tokenizer) -> Sentinels:
    """The three tokens of data.fim_tokens, or of the first family that the tokenizer has. Raises ConfigError."""
    if errors := list(_fim_errors(data, tokenizer)):
        raise ConfigError(errors)
    prefix, suffix, middle = map(tokenizer.token_id, _spellings(data, tokenizer))
    assert prefix is not None and suffix is not None and middle is not None  # checked by _fim_errors
    return Sentinels(prefix, suffix, middle)


def _spellings(data: DataConfig, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Spellings of the three tokens, () if there are none."""
    if data.fim_tokens:
        return tuple(data.fim_tokens.split())
    families = (family for family in FAMILIES if all(token in tokenizer.added_tokens for token in family))
    return next(families, ())


def _mask_errors(data: DataConfig, tokenizer: Tokenizer) -> Iterator[FieldError]:
    yield from _unknown("data.mask_tokens", data.mask_tokens, data, tokenizer)


def _fim_errors(data: DataConfig, tokenizer: Tokenizer) -> Iterator[FieldError]:
    yield from _unknown("data.fim_tokens", data.fim_tokens, data, tokenizer)
    if not data.fim_rate:
        return
    if not _spellings(data, tokenizer):
        looked = "; ".join(" ".join(family) for family in FAMILIES)
        problem = f"needs three tokens that {data.tokenizer} does not have (looked for {looked})"
        fix = f"Name others in data.fim_tokens, or train a tokenizer that has them: {_MAKE}."
        yield FieldError("samples.fim-tokens-missing", "data.fim_rate", data.fim_rate, problem, fix)
    if not SpanCodec(tokenizer).round_trips:
        problem = f"splits texts, but {data.tokenizer} does not decode texts exactly (case or white space is lost)"
        yield FieldError(
            "samples.fim-tokenizer-loses-text",
            "data.fim_rate",
            data.fim_rate,
            problem,
            "Use a tokenizer of kind bpe or unigram, or set data.fim_rate to 0.",
        )


def _unknown(path: str, text: str, data: DataConfig, tokenizer: Tokenizer) -> Iterator[FieldError]:
    known = list(tokenizer.added_tokens)
    for token in text.split():
        if token not in known and (path == "data.fim_tokens" or tokenizer.token_id(token) is None):
            kind = "no token" if tokenizer.token_id(token) is None else "an ordinary token, not a special one,"
            near = difflib.get_close_matches(token, known, n=3, cutoff=0.0)
            fix = f"Nearest special tokens: {', '.join(near)}." if near else "It has no special tokens at all."
            yield FieldError("samples.special-token-unknown", path, token, f"is {kind} of {data.tokenizer}", fix)
