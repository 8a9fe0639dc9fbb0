"""Finds tokenizer files of other formats by name and content, and converts them to tokenizer.json.

A conversion is accepted only if it gives the same ids as the library the file was made for, on many edge-case texts.
Afterwards a converted tokenizer encodes and is copied, exported and identified like any other. A sentencepiece model
whose ids no tokenizer.json reproduces is kept, and sentencepiece itself encodes; other differences are errors.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from engine.data.tokenize.conversion_cache import cached, key_of
from engine.data.tokenize.file_names import MODEL
from engine.data.tokenize.tokenizer import Tokenizer
from engine.errors import DataError, format_value, truncate
from engine.util.files import read_json

if TYPE_CHECKING:
    from engine.data.tokenize.equivalence import OriginalLibrary
    from engine.data.tokenize.sentencepiece_model import Sentencepiece

FORMATS = (
    "tokenizer.json, a sentencepiece .model (also .model.v3 and its like), a .tiktoken file, tekken.json, GPT-2's "
    "vocab.json with merges.txt, BERT's vocab.txt, or a folder with one of them"
)
_SENTENCEPIECE, _TIKTOKEN, _TEKKEN, _MERGES, _WORDPIECE = "sentencepiece", "tiktoken", "tekken", "merges", "wordpiece"
# Kinds by file name. Their order does not matter, since a folder with two of them is rejected.
_NAMES = {
    _SENTENCEPIECE: re.compile(r".*\.model(\.v\d+\w*)?"),
    _TIKTOKEN: re.compile(r".*\.tiktoken"),
    _TEKKEN: re.compile(r".*tekken.*\.json"),
    _MERGES: re.compile(r"(.*[-_.])?vocab\.json|encoder\.json"),
    _WORDPIECE: re.compile(r"(.*[-_.])?vocab\.txt"),
}
# Classes of transformers that use the ids of the file; others shift the ids or split texts first.
_SUPPORTED_CLASSES = {
    _SENTENCEPIECE: r"(Code)?Llama\w*|Gemma\w*|T5\w*|Baichuan\w*|InternLM\w*|PreTrained\w*",
    _TIKTOKEN: r"\w+",
    _TEKKEN: r"\w+",
    _MERGES: r"GPT2\w*",
    _WORDPIECE: r"((Distil|Mobile)?Bert|Electra|PreTrained)Tokenizer(Fast)?",
}


# Key in tokenizer_config.json: why sentencepiece itself encodes the .model next to it, so that a copy does so too.
_REASON_KEY = "ids_by_sentencepiece"
# Second key: true if `tokenizers` gives the same ids for texts without user-defined symbols.
_ONLY_SYMBOLS_KEY = "but_for_symbols"


@dataclass(frozen=True)
class Conversion:
    """Result of converting a tokenizer file to tokenizer.json.

    definition: text of the tokenizer.json; end: end-of-document token; difference: the first difference found from the
    original's ids, "" for none; exact_without_symbols: whether ids are equal for texts without user-defined symbols.
    """

    definition: str
    end: str | None
    difference: str = ""
    exact_without_symbols: bool = True


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer file of a `kind`, its merges file, and the content of the tokenizer_config.json next to it."""

    kind: str
    path: Path
    merges: Path | None
    config: dict[str, Any]
    lower_case: bool | None


def find(path: Path, merges: Path | None = None, lower_case: bool | None = None) -> TokenizerFile | None:
    """The tokenizer file at `path`, None for a tokenizer.json. Raises DataError for anything else."""
    if path.is_dir():
        path = path / "tokenizer.json" if (path / "tokenizer.json").is_file() else _only_one(path)
    kind = _kind(path) if path.is_file() else next((k for k, name in _NAMES.items() if name.fullmatch(path.name)), "")
    if not path.is_file() and kind:
        raise DataError("tokenize.not-found", f"{path}: no such file. Check the path of the tokenizer.")
    if merges is not None and kind != _MERGES:
        raise DataError(
            "tokenize.merges-without-vocabulary",
            f"{merges}: merges belong to a vocab.json, but {path} is none. Omit --merges.",
        )
    if lower_case is not None and kind != _WORDPIECE:
        raise DataError(
            "tokenize.lower-case-has-no-effect",
            f"{path}: is not a vocab.txt; the file itself defines the handling of capital letters. Omit --lower-case.",
        )
    if not kind:
        return None
    if kind == _MERGES:
        merges = merges or _merges_path(path)
        if not merges.is_file():
            raise DataError(
                "tokenize.merges-missing",
                f"{path}: a vocabulary without its merges: {merges} is not a file. Give its path with --merges.",
            )
    config = _config(path, kind)
    return TokenizerFile(kind, path, merges, config, lower_case)


def load_converted(file: TokenizerFile, parse_special: bool = False) -> Tokenizer:
    """Convert a tokenizer file. Raises DataError if it is damaged or cannot be converted exactly."""
    conversion = _converted(file)
    sentencepiece = _sentencepiece(file) if conversion.difference else None
    named: dict[str, Any] = {"eos_token": conversion.end} if conversion.end is not None else {}
    named |= {"bos_token": file.config["bos_token"]} if "bos_token" in file.config else {}  # null: there is none
    named |= {"eos_token": file.config["eos_token"]} if file.config.get("eos_token") is not None else {}
    companions = companion_files(named, sentencepiece, conversion.difference, conversion.exact_without_symbols)
    compared = file.kind in (_SENTENCEPIECE, _TIKTOKEN, _TEKKEN) and sentencepiece is None
    tokenizer = Tokenizer(
        conversion.definition,
        companions,
        parse_special,
        sentencepiece=sentencepiece,
        exact_without_symbols=conversion.exact_without_symbols,
        note=conversion.difference,
        load_original=partial(load_original, file) if compared else None,
    )
    if file.kind != _TEKKEN:
        _check_added_tokens(file, tokenizer)
    return tokenizer


def _check_added_tokens(file: TokenizerFile, tokenizer: Tokenizer) -> None:
    """Raise DataError if tokenizer_config.json adds non-special tokens that the tokenizer file does not have."""
    listed = file.config.get("added_tokens_decoder")
    for number, token in listed.items() if isinstance(listed, dict) else ():
        entry = token if isinstance(token, dict) else {}
        text = entry.get("content")
        if isinstance(text, str) and not entry.get("special") and str(tokenizer.token_id(text)) != str(number):
            raise DataError(
                "tokenize.added-token-missing",
                f"{file.path}: has no token {format_value(text)} of id {truncate(str(number), 20)}, which "
                f"tokenizer_config.json next to it adds. Give tokenizer.json, which says how it is matched in texts.",
            )


def _converted(file: TokenizerFile) -> Conversion:
    """`_convert`, cached for the kinds whose conversion takes seconds."""
    if file.kind not in (_SENTENCEPIECE, _TIKTOKEN, _TEKKEN):
        return _convert(file)
    rules_path = file.path.with_suffix(".json")  # of a .tiktoken

    def key() -> str:
        try:
            rules = rules_path.read_bytes() if file.kind == _TIKTOKEN and rules_path.is_file() else b""
            parts = [file.path.read_bytes(), file.kind.encode(), file.path.stem.encode(), rules]
        except OSError as err:
            raise DataError(
                "tokenize.unreadable", f"{err.filename}: cannot be read: {err.strerror or err}. Check the tokenizer."
            ) from err
        return key_of([*parts, json.dumps(file.config, sort_keys=True).encode()])

    def make() -> dict[str, str]:
        conversion = _convert(file)
        return {
            "definition": conversion.definition,
            "end": conversion.end or "",
            "difference": conversion.difference,
            "exact_without_symbols": "yes" if conversion.exact_without_symbols else "no",
        }

    entry = cached(key, make, ("definition", "end", "difference", "exact_without_symbols"))
    exact_without_symbols = entry["exact_without_symbols"] == "yes"
    return Conversion(entry["definition"], entry["end"] or None, entry["difference"], exact_without_symbols)


def _convert(file: TokenizerFile) -> Conversion:
    """Convert the file. Raises DataError if it is damaged, or if ids of a file of ranks differ."""
    if file.kind == _SENTENCEPIECE:
        from engine.data.tokenize.sentencepiece_model import difference, to_json

        model = _sentencepiece(file)
        definition = to_json(model)
        if _REASON_KEY in file.config:
            return Conversion(
                definition, model.end, str(file.config[_REASON_KEY]), file.config.get(_ONLY_SYMBOLS_KEY) is True
            )
        return Conversion(definition, model.end, *difference(model, definition))
    if file.kind in (_TIKTOKEN, _TEKKEN):
        from engine.data.tokenize.tiktoken_ranks import Tiktoken

        ranks = Tiktoken(file.path, file.kind == _TEKKEN)
        return Conversion(ranks.to_json(), ranks.end)
    from engine.data.tokenize.vocabularies import from_merges, from_wordpiece

    if file.merges is not None:
        definition, end = from_merges(file.path, file.merges, file.config)
    else:
        definition, end = from_wordpiece(file.path, file.config, file.lower_case)
    return Conversion(definition, end)


def load_original(file: TokenizerFile) -> OriginalLibrary:
    """Load the library that the file was made for."""
    if file.kind == _SENTENCEPIECE:
        return _sentencepiece(file)
    from engine.data.tokenize.tiktoken_ranks import Tiktoken

    return Tiktoken(file.path, file.kind == _TEKKEN)


def _sentencepiece(file: TokenizerFile) -> Sentencepiece:
    from engine.data.tokenize.sentencepiece_model import Sentencepiece

    return Sentencepiece(file.path)


def _only_one(folder: Path) -> Path:
    """The only tokenizer file in a folder without tokenizer.json; identical copies under other names are allowed."""
    names = sorted(folder.iterdir())
    by_kind = {kind: [p for p in names if name.fullmatch(p.name) and p.is_file()] for kind, name in _NAMES.items()}
    by_kind[_MERGES] = [path for path in by_kind[_MERGES] if _merges_path(path).is_file()]
    files = [path for paths in by_kind.values() for path in paths]
    if not files:
        raise DataError(
            "tokenize.none-in-folder",
            f"{folder}: no tokenizer in this folder. Give {FORMATS}. Names on a hub are not downloaded: "
            f"download it first, or train one with `engine tokenizer train`.",
        )
    if any(path.read_bytes() != files[0].read_bytes() for path in files[1:]):
        raise DataError(
            "tokenize.several-in-folder",
            f"{folder}: contains several tokenizers and no tokenizer.json: {', '.join(p.name for p in files)}. "
            f"Give the path of one.",
        )
    return files[0]


def _kind(path: Path) -> str:
    """Kind of an existing file, by its name, or by its content for JSON; "" for a tokenizer.json."""
    named = next((kind for kind, name in _NAMES.items() if name.fullmatch(path.name)), "")
    if path.suffix != ".json" or path.name == "tokenizer.json":
        return named
    try:
        content = read_json(path, loads=orjson.loads)
    except (OSError, ValueError):
        return named
    if isinstance(content, dict) and not isinstance(content.get("model"), dict):
        if isinstance(content.get("vocab"), list) and isinstance(content.get("config"), dict):
            return _TEKKEN
        if content and all(isinstance(number, int) for number in content.values()):
            return _MERGES
    return "" if isinstance(content, dict) and "model" in content else named


def _merges_path(vocab: Path) -> Path:
    """Path of the merges of a vocabulary by the usual names."""
    if vocab.name == "encoder.json":
        return vocab.with_name("vocab.bpe")
    head, separator, _ = vocab.name.rpartition("vocab.json")
    return vocab.with_name(f"{head}merges.txt" if separator else "merges.txt")


def _config(path: Path, kind: str) -> dict[str, Any]:
    """tokenizer_config.json next to the file. Raises DataError if its class is not known to use the file's ids."""
    config_path = path.parent / "tokenizer_config.json"
    try:
        config = read_json(config_path) if config_path.is_file() else {}
    except (OSError, ValueError) as err:
        raise DataError("tokenize.unreadable", f"{config_path}: cannot be read: {err}. Copy it again.") from err
    config = config if isinstance(config, dict) else {}
    name = config.get("tokenizer_class") or ""
    if not isinstance(name, str) or (name and not re.fullmatch(_SUPPORTED_CLASSES[kind], name)):
        raise DataError(
            "tokenize.class-unknown",
            f"{path}: how {truncate(str(name), 60)} splits texts is not known from this file. Give its tokenizer.json.",
        )
    added = path.parent / "added_tokens.json"
    if added.is_file() and kind != _TEKKEN:
        raise DataError(
            "tokenize.added-tokens-unknown",
            f"{path}: how the tokens of {added.name} next to it are matched is not known. Give its tokenizer.json.",
        )
    return config


def companion_files(
    special: dict[str, Any],
    sentencepiece: Sentencepiece | None = None,
    difference: str = "",
    exact_without_symbols: bool = False,
) -> dict[str, bytes]:
    """Companion files of a converted tokenizer: {name: content} with its `special` tokens such as "eos_token", and the
    .model if no tokenizer.json reproduces its ids."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if sentencepiece is not None:  # transformers selects the class for a .model by the model's config.json
        config = {_REASON_KEY: difference, _ONLY_SYMBOLS_KEY: exact_without_symbols}
    files = {
        "tokenizer_config.json": json.dumps({**config, **special}).encode(),
        "special_tokens_map.json": json.dumps(special).encode(),
    }
    return files if sentencepiece is None else {**files, MODEL: sentencepiece.content}
