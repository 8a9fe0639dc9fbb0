"""GPT-2's vocab.json with merges.txt, and BERT's vocab.txt, as a tokenizer.json."""

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
    """The definition and the end token of a byte-level BPE: `path` holds its ids, `merges` its pairs, best first."""
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
            f"{path}: not a vocabulary that {merges} belongs to: {str(err)[:200]}. Copy both anew.",
        ) from err
    missing = [letter for letter in byte_letters() if letter not in vocab]
    if missing:
        raise DataError(
            "tokenize.not-byte-level",
            f"{path}: not GPT-2's kind of vocabulary: {len(missing)} of the 256 letters that stand for bytes are not "
            f"in it, such as {format_value(missing[0])}. Give its tokenizer.json.",
        )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    tokenizer.decoder = decoders.ByteLevel()
    end = _token(config.get("eos_token")) or "<|endoftext|>"
    if end not in vocab:
        return tokenizer.to_str(), None
    tokenizer.add_special_tokens([AddedToken(end, normalized=False, special=True)])
    return tokenizer.to_str(), end


def from_wordpiece(path: Path, config: dict[str, Any], lower_case: bool | None) -> tuple[str, str | None]:
    """The definition and the end token ([SEP]) of BERT's vocabulary, a piece a line.

    `lower_case` None: as tokenizer_config.json says ("do_lower_case"), or else unless a piece has a capital letter.
    """
    try:
        pieces = path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise DataError("tokenize.unreadable", f"{path}: cannot be read: {err}. Copy it anew.") from err
    pieces = [piece.rstrip("\r") for piece in pieces]
    vocab = {piece: number for number, piece in enumerate(pieces)}  # of two equal lines the last one counts, as in BERT
    if "[UNK]" not in vocab:
        raise DataError(
            "tokenize.not-wordpiece",
            f"{path}: not BERT's vocab.txt, a piece a line and [UNK] among them. Give its tokenizer.json.",
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


def _token(said: Any) -> str | None:
    """A token in a tokenizer_config.json: a string or {"content": string}."""
    said = said.get("content") if isinstance(said, dict) else said
    return said if isinstance(said, str) else None
