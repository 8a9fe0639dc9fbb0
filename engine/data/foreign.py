"""sentencepiece `.model` and `.tiktoken` files, converted to the one definition that everything else reads.

A conversion is believed after it gave the same ids as the library that the file is for, on a set of awkward strings;
otherwise it is refused. So a converted tokenizer encodes, travels, is exported and is identified like any other.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from engine.errors import DataError

Converted = tuple[str, dict[str, bytes]]  # text of a tokenizer.json, and the files beside it
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # kinds of pieces
_UNIGRAM, _BPE = 1, 2  # kinds of models

# White space runs, digits, contractions, scripts without spaces, combining marks, emoji, odd characters, code, markup.
AWKWARD = (
    " ",
    "\n\n\n  \n\t\t x  y   z    \r\n \u00a0\u3000\u2028 end ",
    "don't DON'T I'll we’ve it'S 'tis",
    "1234567890 3.14159 1,000,000 ٣٤٥ ½ ² x1y22z333",
    "naïve café e\u0301 ﬁ ǅ İstanbul ẞ ſ K Å",
    "今天天气很好。我们去公园吧！コンピュータ 한국어 ภาษาไทย हिन्दी العربية עברית",
    "👩‍👩‍👧‍👦 🇨🇭 ☕️ 🏳️‍🌈 \u200b\u200d\ufffd",
    "def f(x):\n    return x**2  # comment\n\n\nclass A(B): pass\n",
    "https://example.org/a?b=c&d=%20 user@example.org <|endoftext|></s><s>[INST] <unk> <0x41> Ġ Ċ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa --------------------------------====",
)

_SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# A .tiktoken file holds ranks alone; how text is split and the special ids are known by the encoding's name.
_ENCODINGS: dict[str, tuple[str, dict[str, int]]] = {
    "r50k_base": (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        {"<|endoftext|>": 50256},
    ),
    "cl100k_base": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _SUFFIXES + "|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _SUFFIXES + "|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
}
_ENCODINGS["p50k_base"] = _ENCODINGS["r50k_base"]


def from_sentencepiece(path: Path) -> Converted:
    """A BPE or unigram `.model`. Raises DataError if it cannot be converted exactly, equally likely pieces aside."""
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as err:
        raise DataError(f"{path}: {err}: .model files need `pip install 'trident-engine[formats]'`.") from err
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
    try:
        proto.ParseFromString(path.read_bytes())
        original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except FileNotFoundError as err:
        raise DataError(f"{path}: no such file. Check the path of the tokenizer.") from err
    except Exception as err:  # protobuf and sentencepiece have errors of their own
        raise DataError(f"{path}: not a sentencepiece model: {err}. Copy it anew.") from err
    if proto.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        raise DataError(f"{path}: a word or character model, expected BPE or unigram. Choose another tokenizer.")
    tokenizer = tokenizers.Tokenizer(_piece_model(proto))
    tokenizer.normalizer = _piece_normalizer(proto.normalizer_spec)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    control = [piece.piece for piece in proto.pieces if piece.type in (_CONTROL, _UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    own = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in own])
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    likely = pieces if proto.trainer_spec.model_type == _UNIGRAM else None
    _compare(path, tokenizer, original.encode, [*AWKWARD, *control[:50]], likely)
    end = proto.pieces[original.eos_id()].piece if original.eos_id() >= 0 else None
    return tokenizer.to_str(), _companions(end)


def _piece_model(proto: Any) -> models.Model:
    unknown, fallback = proto.trainer_spec.unk_piece, proto.trainer_spec.byte_fallback
    usable = (_NORMAL, _USER_DEFINED)
    if proto.trainer_spec.model_type == _UNIGRAM:
        lowest = min((piece.score for piece in proto.pieces if piece.type in usable), default=0.0)
        # Control and byte pieces never come from text: the characters "<s>" must not become the token.
        vocab = [(piece.piece, piece.score if piece.type in usable else lowest - 50.0) for piece in proto.pieces]
        return models.Unigram(vocab, unk_id=proto.trainer_spec.unk_id, byte_fallback=fallback)
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type in usable}
    pairs = [(whole[:at], whole[at:]) for whole in scores for at in range(1, len(whole))]
    pairs = [(left, right) for left, right in pairs if left in scores and right in scores]
    pairs.sort(key=lambda pair: (-scores[pair[0] + pair[1]], ids[pair[0]], ids[pair[1]]))
    return models.BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=fallback)


def _piece_normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def from_tiktoken(path: Path) -> Converted:
    """A `.tiktoken` file, of an encoding known by name or with NAME.json {"pattern", "special_tokens"} beside it."""
    try:
        import tiktoken
    except ImportError as err:
        raise DataError(f"{path}: {err}: .tiktoken files need `pip install 'trident-engine[formats]'`.") from err
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror or err}. Check the path of the tokenizer.") from err
    except (ValueError, binascii.Error) as err:
        raise DataError(f"{path}: not a .tiktoken file, which has a base64 token and a rank a line: {err}.") from err
    pattern, special = _encoding_facts(path)
    letters = _byte_letters()
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    pairs = [(token[:at], token[at:]) for token in sorted(ranks, key=ranks.__getitem__) for at in range(1, len(token))]
    merges = [(spell[left], spell[right]) for left, right in pairs if left in ranks and right in ranks]
    # The special tokens stand in the model's vocabulary as well: `tokenizers` would close the gap before their ids.
    vocab = {spell[token]: rank for token, rank in ranks.items()} | special
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    try:
        original = tiktoken.Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    except Exception as err:  # it panics on ranks with gaps, a bad pattern, ...
        raise DataError(f"{path}: tiktoken does not take it: {err}. Copy it anew, or check its .json.") from err
    _compare(path, tokenizer, original.encode_ordinary, [*AWKWARD, *special])
    return tokenizer.to_str(), _companions("<|endoftext|>" if "<|endoftext|>" in special else None)


def from_merges(path: Path) -> Converted:
    """GPT-2's vocab.json with merges.txt beside it. Raises DataError for other tokenizers that have these two files."""
    config = path.parent / "tokenizer_config.json"
    try:
        said = json.loads(config.read_bytes()) if config.is_file() else {}
        kind = said.get("tokenizer_class", "GPT2Tokenizer")
        vocab = json.loads(path.read_bytes())
        lines = (path.parent / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [
            (left, right) for left, right in (line.split(" ") for line in lines if line[:9] != "#version:" and line)
        ]
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    except Exception as err:  # the library raises bare Exception
        raise DataError(f"{path}: not a vocabulary with merges.txt: {err}. Copy both anew.") from err
    if kind not in ("GPT2Tokenizer", "GPT2TokenizerFast") or (path.parent / "added_tokens.json").exists():
        raise DataError(f"{path}: how {kind} cuts texts is not known from these files. Give its tokenizer.json.")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(said.get("add_prefix_space", False)))
    tokenizer.decoder = decoders.ByteLevel()
    end = said.get("eos_token", "<|endoftext|>")
    end = str(end["content"]) if isinstance(end, dict) else str(end)
    if end in vocab:
        tokenizer.add_special_tokens([AddedToken(end, normalized=False, special=True)])
    return tokenizer.to_str(), _companions(end if end in vocab else None)


def _encoding_facts(path: Path) -> tuple[str, dict[str, int]]:
    beside = path.with_suffix(".json")
    if beside.exists():
        try:
            facts = json.loads(beside.read_bytes())
            return str(facts["pattern"]), {str(k): int(v) for k, v in facts["special_tokens"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
            text = f'expected {{"pattern": "...", "special_tokens": {{"...": id}}}} ({type(err).__name__}: {err})'
            raise DataError(f"{beside}: {text}.") from err
    if path.stem not in _ENCODINGS:
        raise DataError(
            f"{path}: this file holds ranks alone, and {path.stem} is none of {', '.join(_ENCODINGS)}, whose rules are "
            f'known. Write them to {beside}: {{"pattern": "...", "special_tokens": {{"<|endoftext|>": id}}}}.'
        )
    return _ENCODINGS[path.stem]


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def _companions(end: str | None) -> dict[str, bytes]:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    special = {"eos_token": end} if end is not None else {}
    return {
        "tokenizer_config.json": json.dumps({**config, **special}).encode(),
        "special_tokens_map.json": json.dumps(special).encode(),
    }


def equally_likely(mine: Sequence[int], right: Sequence[int], pieces: Sequence[tuple[str, float]]) -> bool:
    """Whether two cuts of a text into (piece, log-probability) tell the same text and are a tie in float32.

    "0" + "00" and "00" + "0" are one: sentencepiece adds scores up in float32 and `tokenizers` in float64, so either
    may come out of either.
    """
    (a, score), (b, other) = (
        ("".join(pieces[i][0] for i in ids), math.fsum(pieces[i][1] for i in ids)) for ids in (mine, right)
    )
    return a == b and math.isclose(score, other, rel_tol=1e-6)


def _compare(
    path: Path,
    tokenizer: tokenizers.Tokenizer,
    original: Callable[[str], Sequence[int]],
    texts: Sequence[str],
    likely: Sequence[tuple[str, float]] | None = None,
) -> None:
    tokenizer.encode_special_tokens = True
    for text in texts:
        mine, right = tokenizer.encode(text, add_special_tokens=False).ids, list(original(text))
        if mine != right and not (likely and equally_likely(mine, right, likely)):
            at = next((i for i, (a, b) in enumerate(zip(mine, right)) if a != b), min(len(mine), len(right)))
            raise DataError(
                f"{path}: cannot be converted exactly: of {text[:60]!r} token {at} and those behind it are "
                f"{mine[at : at + 4]} instead of {right[at : at + 4]}. "
                f"Give the tokenizer.json that its makers publish."
            )
