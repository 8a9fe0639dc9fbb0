"""Tokenizer around the `tokenizers` library: text <-> token ids, without the pitfalls of a stored tokenizer.json.

Special tokens in texts are text: a document that contains the characters `<|endoftext|>` gets the ids of those
characters, never the special id, so it cannot end a document. Stored truncation and padding are disabled (they would
silently shorten or pad documents), and so are templates that add BOS or EOS: only `prepare` adds these tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import orjson
import tokenizers

from engine.data.tokenize.file_names import COMPANIONS, DEFINITION, MODEL, TEMPLATES, TRAINING
from engine.errors import DataError, truncate
from engine.util.prefetch import run_in_thread

if TYPE_CHECKING:
    from engine.data.tokenize.equivalence import OriginalLibrary
    from engine.data.tokenize.sentencepiece_model import Sentencepiece

END_OF_TEXT = "<|endoftext|>"
# Tried in this order when neither tokenizer_config.json nor special_tokens_map.json names an end token.
_USUAL_BOS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "<｜begin▁of▁sentence｜>")
_USUAL_EOD = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")


class Tokenizer:
    """A tokenizer and its digest. Create one with `load` or `train`.

    Attributes: `vocab_size` (largest id + 1, added tokens included: the rows that a model's embedding needs),
    `digest` (sha256 hex of tokenizer.json in canonical form, so that formatting does not change it, or of a .model's
    bytes), `sentencepiece` (the library, which encodes where no tokenizer.json reproduces the ids of a .model; else
    None), `note` (why it does), `exact_without_symbols` (only texts with user-defined symbols need `sentencepiece`),
    `load_original` (loads the library that a converted file was made for, to compare with), `unknown` (id of the
    unknown token, None if there is none), `special_tokens` (their spellings), `special_ids`, `added_tokens` (spelling
    -> id of the special tokens and of the user-defined tokens that are matched in texts first).
    """

    def __init__(
        self,
        definition: str,
        companions: dict[str, bytes],
        parse_special: bool = False,
        *,
        sentencepiece: Sentencepiece | None = None,
        exact_without_symbols: bool = False,
        note: str = "",
        load_original: Callable[[], OriginalLibrary] | None = None,
    ):
        """`definition`: text of a tokenizer.json; `companions`: name -> content of the files next to it.

        `parse_special`: the spelling of a special token in a text becomes that token, not its characters.
        Raises ValueError if `tokenizers` rejects the definition, or a companion is not JSON.
        """
        self._definition = definition
        self._companions = companions
        self._eod_token = _configured_token(companions, "eos_token")[1]
        loading = run_in_thread(lambda: tokenizers.Tokenizer.from_str(definition))
        parsed = self._parsed = orjson.loads(definition)  # megabytes: parsed once
        canonical = json.dumps(parsed, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        self.digest = hashlib.sha256(canonical.encode() if sentencepiece is None else sentencepiece.content).hexdigest()
        self.sentencepiece, self.exact_without_symbols, self.note, self.load_original = (
            sentencepiece,
            exact_without_symbols,
            note,
            load_original,
        )
        try:
            self._tokenizer = loading.result()
        except Exception as err:  # the library raises bare Exception
            raise ValueError(str(err)) from err
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._parse_special = parse_special
        self._tokenizer.encode_special_tokens = not parse_special  # True: encodes their spelling as text
        model = parsed["model"]
        unknown = model.get("unk_token")
        self.unknown = model.get("unk_id") if unknown is None else self._tokenizer.token_to_id(unknown)
        added = self._tokenizer.get_added_tokens_decoder()
        ids = model["vocab"].values() if isinstance(model["vocab"], dict) else range(len(model["vocab"]))
        self.vocab_size = max(max(ids, default=-1), max(added, default=-1)) + 1
        self.added_tokens = {token.content: number for number, token in added.items()}
        self.special_tokens = tuple(token.content for token in added.values() if token.special)
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        longest_first = sorted(map(re.escape, self.special_tokens), key=len, reverse=True)
        # The special tokens that `parse_special` matches in texts, as one group.
        self.special_pattern = re.compile(f"({'|'.join(longest_first)})") if parse_special and longest_first else None

    @classmethod
    def load(
        cls,
        path: str | Path,
        parse_special: bool = False,
        *,
        merges: Path | None = None,
        lower_case: bool | None = None,
    ) -> Tokenizer:
        """Load a tokenizer.json, any other file that convert.py supports, or a folder with one of them.

        `merges`: merges of a vocab.json, if not under the usual name; `lower_case`: whether BERT's vocab.txt lowercases
        texts, None: as the files say. Raises DataError if the tokenizer is missing or not readable.
        """
        path = Path(path)
        if merges is not None or lower_case is not None or not _is_definition(path):
            from engine.data.tokenize.convert import find, load_converted

            if (found := find(path, merges, lower_case)) is not None:
                return load_converted(found, parse_special)
        file = path / DEFINITION if path.is_dir() else path
        try:
            definition = file.read_bytes().decode("utf-8")
            paths = {name: file.parent / name for name in (TRAINING, *COMPANIONS)}
            paths |= {f"{TEMPLATES}/{p.name}": p for p in sorted((file.parent / TEMPLATES).glob("*.jinja"))}
            companions = {name: other.read_bytes() for name, other in paths.items() if other.is_file()}
            return cls(definition, companions, parse_special)
        except FileNotFoundError as err:
            raise DataError(
                "tokenize.not-found",
                f"{file}: no such file. Give {_formats()}. Names on a hub are not downloaded: download it first, or "
                f"train one with `engine tokenizer train`.",
            ) from err
        except (OSError, ValueError) as err:
            raise DataError(
                "tokenize.not-usable", f"{file}: not a usable tokenizer.json: {truncate(str(err))}. Give {_formats()}."
            ) from err

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, **options: Any) -> Tokenizer:
        """Train a tokenizer on texts, in this process; `options`: fields of engine.data.tokenize.recipe.Recipe.

        `bpe` and `unigram` have a token for each byte, so any text can be encoded. `wordpiece` is like BERT's: it drops
        white space and has [UNK]. The vocabulary is smaller than `vocab_size` if the texts have too few candidates.
        """
        from engine.data.tokenize.algorithms import train
        from engine.data.tokenize.recipe import Recipe

        return cls(*train(texts, Recipe(vocab_size, **options)))

    def with_original_ids(self, difference: str) -> Tokenizer:
        """The same tokenizer, but encoding with the .model it was converted from. Raises DataError if there is none."""
        from engine.data.tokenize.convert import companion_files
        from engine.data.tokenize.sentencepiece_model import Sentencepiece

        sentencepiece = self.load_original() if self.load_original is not None else None
        if not isinstance(sentencepiece, Sentencepiece):
            raise DataError(
                "tokenize.not-convertible",
                f"{difference}. The engine cannot correct this: give the tokenizer.json that its authors publish.",
            )
        return Tokenizer(
            self._definition,
            companion_files(json.loads(self._companions["special_tokens_map.json"]), sentencepiece, difference),
            self._parse_special,
            sentencepiece=sentencepiece,
            note=difference,
        )

    @property
    def eod(self) -> int:
        """Id of the end-of-document token. Raises DataError if the tokenizer has none."""
        for token in (self._eod_token,) if self._eod_token is not None else _USUAL_EOD:
            number = self._tokenizer.token_to_id(token)
            if number is not None:
                return int(number)
        looked_for = self._eod_token or ", ".join(_USUAL_EOD)
        raise DataError(
            "tokenize.no-end-token",
            f"the tokenizer has no end-of-document token (looked for {looked_for}). "
            f'Name one in its tokenizer_config.json, "eos_token": "...", or prepare with append_eod=False.',
        )

    @property
    def bos(self) -> int:
        """Id of the begin-of-document token. Raises DataError if the tokenizer has none, or declares to have none."""
        is_configured, token = _configured_token(self._companions, "bos_token")
        for spelling in ((token,) if token else ()) if is_configured else _USUAL_BOS:
            number = self._tokenizer.token_to_id(spelling)
            if number is not None:
                return int(number)
        reason = f"looked for {', '.join(_USUAL_BOS)}"
        if is_configured:
            reason = f"tokenizer_config.json has {token!r} as bos_token"
        raise DataError(
            "tokenize.no-begin-token",
            f"the tokenizer has no begin-of-document token ({reason}). Prepare without --prepend-bos, or name a "
            f'token that it has in its tokenizer_config.json, "bos_token": "...".',
        )

    @property
    def template(self) -> tuple[list[int], list[int]]:
        """(ids before, ids after) that its stored template would add to a text; the engine never adds them."""
        if self.sentencepiece is not None:
            return [], []
        whole, plain = self._tokenizer.encode("a").ids, self.encode("a")
        before = next((k for k in range(len(whole)) if whole[k : k + len(plain)] == plain), len(whole))
        return whole[:before], whole[before + len(plain) :]

    def unknown_bytes(self, text: str) -> int:
        """Number of UTF-8 bytes of `text` that become the unknown token."""
        if self.sentencepiece is not None:
            return self.sentencepiece.unknown_bytes(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        spans = {span for number, span in zip(encoding.ids, encoding.offsets) if number == self.unknown}
        return sum(len(text[begin:end].encode()) for begin, end in spans)

    def text_only_definition(self) -> str:
        """tokenizer.json for a library that always parses special tokens: without them, unless `parse_special`."""
        definition = {**self._parsed, "truncation": None, "padding": None}
        if not self._parse_special:
            added = definition.get("added_tokens") or []
            definition["added_tokens"] = [token for token in added if not token.get("special")]
        return orjson.dumps(definition).decode()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any added special tokens."""
        if self.sentencepiece is not None:
            return self._sentencepiece_ids([text])[0]
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Ids of each text, int32 [length]; uses all cores (sentencepiece: only this thread)."""
        if self.sentencepiece is not None:
            return [np.array(ids, dtype=np.int32) for ids in self._sentencepiece_ids(texts)]
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _sentencepiece_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids from sentencepiece, which does not parse special tokens: texts are split at them if `parse_special`."""
        assert self.sentencepiece is not None
        if self.special_pattern is None:
            return self.sentencepiece.encode_batch(texts)
        found = [self.special_pattern.split(text) for text in texts]
        between = iter(self.sentencepiece.encode_batch([part for parts in found for part in parts[::2]]))
        return [
            [
                number
                for at, part in enumerate(parts)
                for number in ([self.added_tokens[part]] if at % 2 else next(between))
            ]
            for parts in found
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, including the spelling of special tokens."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def decode_batch(self, pieces: Sequence[Sequence[int]]) -> list[str]:
        """`decode` for several sequences, on all cores."""
        return list(self._tokenizer.decode_batch(list(pieces), skip_special_tokens=False))

    def token_id(self, token: str) -> int | None:
        """Id of the token with this spelling in the vocabulary, None if there is none."""
        number = self._tokenizer.token_to_id(token)
        return None if number is None else int(number)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and its companion files in the layout of transformers; a loaded one unchanged."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.save_definition(folder)
            for name, content in self._companions.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)
        except OSError as err:
            raise DataError(
                "tokenize.not-writable", f"{folder}: cannot write the tokenizer: {err.strerror or err}. Choose another."
            ) from err

    def save_definition(self, folder: Path) -> None:
        """Write only tokenizer.json, or the .model if sentencepiece encodes; other files of the folder stay."""
        if self.sentencepiece is not None:
            (folder / MODEL).write_bytes(self.sentencepiece.content)
            return
        (folder / DEFINITION).write_text(self._definition, encoding="utf-8")


def _is_definition(path: Path) -> bool:
    return path.name == DEFINITION or (path / DEFINITION).is_file()


def _formats() -> str:
    from engine.data.tokenize.convert import FORMATS

    return FORMATS


def _configured_token(companions: dict[str, bytes], name: str) -> tuple[bool, str | None]:
    """(whether the companion files have a field `name` such as "eos_token", the token in it).

    The value is a string or {"content": string}; null declares that there is none.
    """
    is_configured = False
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        config = json.loads(companions.get(file, b"{}"))
        is_configured |= isinstance(config, dict) and name in config
        token: Any = config.get(name) if isinstance(config, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return True, token
    return is_configured, None
