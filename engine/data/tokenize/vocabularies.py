"""Converts GPT-2's vocab.json with merges.txt, and BERT's vocab.txt, to tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from engine.data.tokenize.tiktoken_ranks import byte_letters
from engine.errors import DataError, format_value
from engine.util.files import read_json

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def from_merges(path: Path, merges: Path, config: dict[str, Any]) -> tuple[str, str | None]:
    """(tokenizer.json, end token) of a byte-level BPE with the ids in `path` and the pairs in `merges`, best first."""
    try:
        vocab = {str(token): int(number) for token, number in read_json(path).items()}
        lines = merges.read_bytes().decode().split("\n")
        first = int(lines[0].startswith("#version:"))
        pairs = [(left, right) for left, right in (line.split() for line in lines[first:] if line.strip())]
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab, pairs))
    except OSError as err:
        raise DataError(
            "tokenize.unreadable", f"{err.filename}: cannot be read: {err.strerror or err}. Check the path."
        ) from err
    except Exception as err:  # the library raises bare Exception
        raise DataError(
            "tokenize.merges-do-not-fit",
            f"{path}: not the vocabulary that belongs to {merges}: {str(err)[:200]}. Copy both again.",
        ) from err
    missing = [letter for letter in byte_letters() if letter not in vocab]
    if missing:
        raise DataError(
            "tokenize.not-byte-level",
            f"{path}: not GPT-2's kind of vocabulary: {len(missing)} of the 256 characters for bytes are missing, "
            f"such as {format_value(missing[0])}. Give its tokenizer.json.",
        )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    tokenizer.decoder = decoders.ByteLevel()
    end = _token(config.get("eos_token")) or "<|endoftext|>"
    if end not in vocab:
        return tokenizer.to_str(), None
    tokenizer.add_special_tokens([AddedToken(end, normalized=False, special=True)])
    return tokenizer.to_str(), end


def from_wordpiece(path: Path, config: dict[str, Any], lower_case: bool | None) -> tuple[str, str | None]:
    """(tokenizer.json, end token, [SEP] by default) of BERT's vocabulary with one piece per line.

    `lower_case` None: by "do_lower_case" in tokenizer_config.json, or else true unless a piece has a capital letter.
    """
    try:
        pieces = path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise DataError("tokenize.unreadable", f"{path}: cannot be read: {err}. Copy it again.") from err
    pieces = [piece.rstrip("\r") for piece in pieces]
    vocab = {piece: number for number, piece in enumerate(pieces)}  # the last of equal lines counts, as in BERT
    if "[UNK]" not in vocab:
        raise DataError(
            "tokenize.not-wordpiece",
            f"{path}: not BERT's vocab.txt, which has one piece per line, including [UNK]. Give its tokenizer.json.",
        )
    if lower_case is None:
        lower_case = config.get("do_lower_case")
    if lower_case is None:
        lower_case = all(piece == piece.lower() for piece in pieces if not (piece[:1] == "[" and piece[-1:] == "]"))
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"),  # None: with lower case
        lowercase=bool(lower_case),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in _SPECIAL if t in vocab])
    end = _token(config.get("eos_token")) or "[SEP]"
    return tokenizer.to_str(), end if end in vocab else None


def _token(value: Any) -> str | None:
    """A token in a tokenizer_config.json, either a string or {"content": string}."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None
