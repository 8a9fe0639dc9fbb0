"""Files of ranks, .tiktoken and tekken.json: byte-level BPE, which merges what has the lowest rank together."""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

import orjson
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from engine.data.awkward import AWKWARD, Encode, compare
from engine.data.patterns import words
from engine.errors import DataError, shown

# A .tiktoken file holds ranks alone; how text is split and the special ids are known by the encoding's name.
_ENCODINGS: dict[str, tuple[str, dict[str, int]]] = {
    "r50k_base": (words("gpt2")[0], {"<|endoftext|>": 50256}),
    "cl100k_base": (
        words("cl100k")[0],
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": (words("o200k")[0], {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}
_ENCODINGS["p50k_base"] = _ENCODINGS["r50k_base"]
# whisper's: its further special tokens are not for texts, and follow this one.
_ENCODINGS["gpt2"] = _ENCODINGS["r50k_base"]
_ENCODINGS["multilingual"] = (_ENCODINGS["r50k_base"][0], {"<|endoftext|>": 50257})
# Special tokens of a tekken.json that lists none, in the order of their ids.
_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


def from_tiktoken(path: Path) -> tuple[str, str | None]:
    """The definition and the end token of a `.tiktoken` file.

    Its encoding is known by its name, or by NAME.json {"pattern", "special_tokens"} beside it.
    """
    ranks = _read_ranks(path)
    pattern, special = _encoding_facts(path)
    definition = _definition(path, ranks, pattern, special, 0)
    return definition, "<|endoftext|>" if "<|endoftext|>" in special else None


def from_tekken(path: Path) -> tuple[str, str | None]:
    """The definition and the end token of Mistral's tekken.json: special tokens have the first ids, ranks follow."""
    try:
        facts = orjson.loads(path.read_bytes())
        config = facts["config"]
        pattern, first = str(config["pattern"]), int(config["default_num_special_tokens"])
        used = facts["vocab"][: int(config["default_vocab_size"]) - first]
        ranks = {base64.b64decode(entry["token_bytes"], validate=True): int(entry["rank"]) for entry in used}
        listed = facts.get("special_tokens") or [
            {"rank": number, "token_str": text} for number, text in enumerate(_TEKKEN_SPECIAL)
        ]
        named = {int(entry["rank"]): str(entry["token_str"]) for entry in listed}
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror or err}. Check the path of the tokenizer.") from err
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise DataError(f"{path}: not a tekken.json: {type(err).__name__}: {str(err)[:200]}. Copy it anew.") from err
    special = {named.get(number, f"<SPECIAL_{number}>"): number for number in range(first)}
    if len(special) < first or len(ranks) < len(used):
        raise DataError(f"{path}: not a tekken.json: two of its tokens are the same. Copy it anew.")
    return _definition(path, ranks, pattern, special, first), "</s>" if "</s>" in special else None


def _read_ranks(path: Path) -> dict[bytes, int]:
    """A base64 token and a rank a line; whisper's files have one without a token, which no text contains."""
    ranks: dict[bytes, int] = {}
    try:
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            *token, rank = line.split()
            spelled = token[0].rstrip(b"=") if token else b""
            if len(token) > 1:
                raise ValueError(f"line {number} has {len(token) + 1} words")
            piece = base64.b64decode(spelled + b"=" * (-len(spelled) % 4), validate=True)
            if piece in ranks:
                raise ValueError(f"line {number} repeats the token {shown(piece)}")
            ranks[piece] = int(rank)
        if len(set(ranks.values())) < len(ranks) or not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError("a rank stands there twice, or one of the 256 bytes is missing")
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror or err}. Check the path of the tokenizer.") from err
    except (ValueError, binascii.Error) as err:
        raise DataError(f"{path}: not a .tiktoken file, which has a base64 token and a rank a line: {err}.") from err
    return ranks


def _definition(path: Path, ranks: dict[bytes, int], pattern: str, special: dict[str, int], first: int) -> str:
    """Text of a tokenizer.json; the id of a token is its rank + `first`. Raises DataError if tiktoken's ids differ."""
    letters = byte_letters()
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks if token}
    pairs = [(token[:at], token[at:]) for token in sorted(ranks, key=ranks.__getitem__) for at in range(1, len(token))]
    merges = [(spell[left], spell[right]) for left, right in pairs if left in ranks and right in ranks]
    # The special tokens stand in the model's vocabulary as well: `tokenizers` would close the gap before their ids.
    vocab = {text: ranks[token] + first for token, text in spell.items()} | special
    if len(set(vocab.values())) < len(vocab) or len(vocab) < len(spell) + len(special):
        raise DataError(f"{path}: the special tokens have ids or spellings that other tokens have too. Check them.")
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    tokenizer.encode_special_tokens = True
    original = original_of(path, ranks, pattern, first)
    compare(path, lambda text: tokenizer.encode(text, add_special_tokens=False).ids, original, [*AWKWARD, *special])
    return tokenizer.to_str()


def original_of(path: Path, ranks: dict[bytes, int], pattern: str, first: int) -> Encode:
    """What tiktoken itself makes of a text."""
    try:
        import tiktoken
    except ImportError as err:
        raise DataError(f"{path}: {err}: such files need `pip install 'trident-engine[formats]'`.") from err
    try:
        encoding: Any = tiktoken.Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except Exception as err:  # it panics on a bad pattern, ...
        raise DataError(f"{path}: tiktoken does not take it: {err}. Copy it anew, or check its .json.") from err
    return lambda text: [number + first for number in encoding.encode_ordinary(text)]


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


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]
