"""Converts files of ranks (.tiktoken, tekken.json): byte-level BPE that merges the pair of lowest rank first."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import orjson
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from engine.data.tokenize.equivalence import ConversionMismatch, compare, encode_plain, texts_for
from engine.data.tokenize.patterns import words
from engine.errors import DataError, format_value
from engine.util.files import read_json

# A .tiktoken file contains only ranks; the split pattern and special ids follow from the name of the encoding.
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
# Whisper's; its other special tokens never occur in texts, and follow this one.
_ENCODINGS["gpt2"] = _ENCODINGS["r50k_base"]
_ENCODINGS["multilingual"] = (_ENCODINGS["r50k_base"][0], {"<|endoftext|>": 50257})
# Special tokens of a tekken.json without a list of them, in the order of their ids.
_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


class Tiktoken:
    """Encodes with the tiktoken library and a file of ranks; the id of a token is its rank + `first`."""

    def __init__(self, path: Path, tekken: bool):
        """Load a `.tiktoken` file of a known encoding, or with NAME.json {"pattern", "special_tokens"} next to it, or a
        `tekken` file. Raises DataError if it is damaged, or the library is missing.
        """
        self._path, self.first = path, 0
        if tekken:
            self.ranks, self.pattern, self.special = _read_tekken(path)
            self.first, ends = len(self.special), "</s>"
        else:
            self.ranks, ends = _read_ranks(path), "<|endoftext|>"
            self.pattern, self.special = _encoding_rules(path)
        self.end = ends if ends in self.special else None
        try:
            import tiktoken
        except ImportError as err:
            raise DataError(
                "tokenize.tiktoken-missing", f"{path}: {err}: such files need `pip install 'trident-engine[formats]'`."
            ) from err
        try:
            self._encoding = tiktoken.Encoding(
                path.stem, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens={}
            )
        except Exception as err:  # it panics on a bad pattern, for example
            raise DataError(
                "tokenize.tiktoken-refuses",
                f"{path}: tiktoken rejects it: {err}. Copy it again, or check its .json.",
            ) from err
        self.name = f"tiktoken {version('tiktoken')}"

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [[number + self.first for number in self._encoding.encode_ordinary(text)] for text in texts]

    def to_json(self) -> str:
        """Text of an equivalent tokenizer.json. Raises DataError if its ids differ."""
        letters = byte_letters()
        ranks, special = self.ranks, self.special
        spell = {token: "".join(letters[byte] for byte in token) for token in ranks if token}
        ordered = sorted(ranks, key=ranks.__getitem__)
        pairs = [(token[:at], token[at:]) for token in ordered for at in range(1, len(token))]
        merges = [(spell[left], spell[right]) for left, right in pairs if left in ranks and right in ranks]
        # Special tokens are in the model's vocabulary too, or `tokenizers` would close the gap before their ids.
        vocab = {text: ranks[token] + self.first for token, text in spell.items()} | special
        if len(set(vocab.values())) < len(vocab) or len(vocab) < len(spell) + len(special):
            raise DataError(
                "tokenize.special-tokens-clash",
                f"{self._path}: special tokens share ids or spellings with other tokens. Check its .json.",
            )
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
        texts = [token.decode(errors="replace") for token in ordered]
        try:
            compare(encode_plain(tokenizer), self, [*texts_for(texts), *special])
        except ConversionMismatch as err:
            raise DataError(
                "tokenize.not-convertible",
                f"{self._path}: cannot be converted exactly: {err}. Give its tokenizer.json.",
            ) from err
        return str(tokenizer.to_str())


def _read_tekken(path: Path) -> tuple[dict[bytes, int], str, dict[str, int]]:
    """(ranks, pattern, special tokens, which have the first ids) of Mistral's tekken.json."""
    try:
        content = read_json(path, loads=orjson.loads)
        config = content["config"]
        pattern, first = str(config["pattern"]), int(config["default_num_special_tokens"])
        used = content["vocab"][: int(config["default_vocab_size"]) - first]
        ranks = {base64.b64decode(entry["token_bytes"], validate=True): int(entry["rank"]) for entry in used}
        listed = content.get("special_tokens") or [
            {"rank": number, "token_str": text} for number, text in enumerate(_TEKKEN_SPECIAL)
        ]
        named = {int(entry["rank"]): str(entry["token_str"]) for entry in listed}
    except OSError as err:
        raise DataError(
            "tokenize.unreadable", f"{path}: cannot be read: {err.strerror or err}. Check the path of the tokenizer."
        ) from err
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise DataError(
            "tokenize.not-tekken", f"{path}: not a tekken.json: {type(err).__name__}: {str(err)[:200]}. Copy it again."
        ) from err
    special = {named.get(number, f"<SPECIAL_{number}>"): number for number in range(first)}
    if len(special) < first or len(ranks) < len(used):
        raise DataError(
            "tokenize.not-tekken", f"{path}: not a tekken.json: two of its tokens are the same. Copy it again."
        )
    return ranks, pattern, special


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Ranks of a file with a base64 token and a rank per line; Whisper's have one line with an empty token."""
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
                raise ValueError(f"line {number} repeats the token {format_value(piece)}")
            ranks[piece] = int(rank)
        if len(set(ranks.values())) < len(ranks) or not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError("it has a rank twice, or one of the 256 bytes is missing")
    except OSError as err:
        raise DataError(
            "tokenize.unreadable", f"{path}: cannot be read: {err.strerror or err}. Check the path of the tokenizer."
        ) from err
    except (ValueError, binascii.Error) as err:
        raise DataError(
            "tokenize.not-tiktoken",
            f"{path}: not a .tiktoken file, which has a base64 token and a rank per line: {err}.",
        ) from err
    return ranks


def _encoding_rules(path: Path) -> tuple[str, dict[str, int]]:
    rules_path = path.with_suffix(".json")
    if rules_path.exists():
        try:
            rules = read_json(rules_path)
            return str(rules["pattern"]), {str(k): int(v) for k, v in rules["special_tokens"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
            text = f'expected {{"pattern": "...", "special_tokens": {{"...": id}}}} ({type(err).__name__}: {err})'
            raise DataError("tokenize.rules-invalid", f"{rules_path}: {text}.") from err
    if path.stem not in _ENCODINGS:
        raise DataError(
            "tokenize.ranks-without-rules",
            f"{path}: this file has only ranks, and {path.stem} is not one of {', '.join(_ENCODINGS)}, whose rules are "
            f'known. Write them to {rules_path}: {{"pattern": "...", "special_tokens": {{"<|endoftext|>": id}}}}.',
        )
    return _ENCODINGS[path.stem]


def byte_letters() -> list[str]:
    """The character that represents each byte in a byte-level vocabulary."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]
