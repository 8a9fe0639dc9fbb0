"""Converts sentencepiece .model files (BPE and unigram) to tokenizer.json."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from engine.data.tokenize.equivalence import ConversionMismatch, compare, encode_plain, texts_for
from engine.errors import DataError, truncate

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # kinds of pieces
_UNIGRAM, _BPE = 1, 2  # kinds of models
_MOST_OVERLAPS, _MOST_SYMBOLS = 20_000, 2_000


class Sentencepiece:
    """Encodes with the sentencepiece library and one `.model` file.

    proto: the parsed file; content: its bytes; symbols: pattern of the user-defined symbols, None without; end: the end
    token, None without.
    """

    def __init__(self, path: Path):
        """Raises DataError if the file is damaged or the library is missing."""
        try:
            import sentencepiece
            from sentencepiece import sentencepiece_model_pb2
        except ImportError as err:
            raise DataError(
                "tokenize.sentencepiece-missing",
                f"{path}: {err}: .model files need `pip install 'trident-engine[formats]'`.",
            ) from err
        self.proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
        try:
            self.content = path.read_bytes()
            self.proto.ParseFromString(self.content)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.content)
        except OSError as err:
            raise DataError(
                "tokenize.unreadable",
                f"{path}: cannot be read: {err.strerror or err}. Check the path of the tokenizer.",
            ) from err
        except Exception as err:  # protobuf and sentencepiece raise their own exceptions
            if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", self.content):  # Llama 3's tokenizer.model
                raise DataError(
                    "tokenize.ranks-named-model",
                    f"{path}: has ranks, like a .tiktoken file. Copy it to NAME.tiktoken and write its pattern and "
                    f"special tokens to NAME.json in the same folder, or give its tokenizer.json.",
                ) from err
            raise DataError(
                "tokenize.not-sentencepiece", f"{path}: not a sentencepiece model: {truncate(str(err))}. Copy it again."
            ) from err
        if self.proto.trainer_spec.model_type not in (_UNIGRAM, _BPE):
            raise DataError(
                "tokenize.model-kind-unsupported",
                f"{path}: a word or character model, expected BPE or unigram. Choose another tokenizer.",
            )
        if not self.proto.pieces:
            raise DataError(
                "tokenize.not-sentencepiece", f"{path}: not a sentencepiece model: it has no pieces. Copy it again."
            )
        self.name = f"sentencepiece {version('sentencepiece')}"
        pieces = [(piece.piece, float(piece.score)) for piece in self.proto.pieces]
        self.is_unigram = self.proto.trainer_spec.model_type == _UNIGRAM
        symbols = [re.escape(piece.piece) for piece in self.proto.pieces if piece.type == _USER_DEFINED]
        # They are matched in a text before it is normalised.
        self.symbols = re.compile("|".join(symbols).replace("▁", "[ ▁]")) if symbols else None
        spec = self.proto.normalizer_spec
        moved = spec.remove_extra_whitespaces or spec.add_dummy_prefix
        # Whether `symbols` finds all of them: true if normalisation cannot create one.
        self.shows_symbols = not spec.precompiled_charsmap and not (moved and any("▁" in one for one in symbols))
        end = self._processor.eos_id()
        self.end = pieces[end][0] if end >= 0 else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; releases the GIL."""
        return list(self._processor.encode(list(texts), out_type=int, num_threads=1))

    def unknown_bytes(self, text: str) -> int:
        """Number of UTF-8 bytes of the normalised `text` that become the unknown token."""
        ids, spelled = self._processor.encode(text, out_type=int), self._processor.encode(text, out_type=str)
        return sum(len(s.encode()) for number, s in zip(ids, spelled) if number == self._processor.unk_id())


def to_json(model: Sentencepiece) -> str:
    """Text of the tokenizer.json closest to a `.model`; `difference` checks whether it reproduces the ids."""
    proto = model.proto
    tokenizer = tokenizers.Tokenizer(_piece_model(proto))
    spec = proto.normalizer_spec
    tokenizer.normalizer = _piece_normalizer(spec)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    control = [piece.piece for piece in proto.pieces if piece.type in (_CONTROL, _UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    symbols = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    plain = not (spec.add_dummy_prefix or spec.remove_extra_whitespaces or spec.precompiled_charsmap)
    # Matched in the normalised text, where spaces are "▁", unless normalisation would change the symbol itself.
    tokenizer.add_tokens([AddedToken(text, normalized=plain, special=False) for text in symbols])
    return str(tokenizer.to_str())


def difference(model: Sentencepiece, definition: str) -> tuple[str, bool]:
    """(first difference of the definition's ids from the model's on many texts, "" for none; whether texts without
    user-defined symbols have none).
    """
    if model.is_unigram:  # ties such as 0|00 and 00|0: comparing other texts cannot show which one is chosen
        return f"{model.name} sums the scores of a unigram model in another precision, so ties differ", False
    encode = encode_plain(tokenizers.Tokenizer.from_str(definition))
    spelled = [piece.piece.replace("▁", " ") for piece in model.proto.pieces if piece.type != _BYTE]
    tied, undecidable = _ties(model.proto)
    if undecidable:
        return undecidable, False
    symbols = [piece.piece.replace("▁", " ") for piece in model.proto.pieces if piece.type == _USER_DEFINED]
    with_symbols = [text for one in symbols[:_MOST_SYMBOLS] for text in (one, one.strip(" "), f"x  {one}  {one}y")]
    texts = [*texts_for(spelled), *tied, *with_symbols]
    try:
        compare(encode, model, texts)
    except ConversionMismatch as err:
        first = str(err)
    else:
        return "", True
    if model.symbols is None or not model.shows_symbols:
        return first, False
    try:
        compare(encode, model, [text for text in texts if not model.symbols.search(text)])
    except ConversionMismatch:
        return first, False
    return first, True


def _ties(proto: Any) -> tuple[list[str], str]:
    """(texts that show whether pairs with equal scores are merged in sentencepiece's order, left to right; why no texts
    can show it, "" if they can).
    """
    pairs, scores = _merges(proto)
    found_first = {piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED}  # matched before any merge
    pairs = [pair for pair in pairs if not found_first & {*pair, "".join(pair)}]
    groups: dict[float, list[tuple[int, str, str]]] = {}
    for rank, (left, right) in enumerate(pairs):
        groups.setdefault(scores[left + right], []).append((rank, left, right))
    tied = {score: group for score, group in groups.items() if len({left + right for _, left, right in group}) > 1}
    parts = {score: ({left for _, left, _ in group}, {right for _, _, right in group}) for score, group in tied.items()}
    for left, right in pairs:
        # Two tied merges without a common piece interact if the first makes a piece that merges on before the second.
        for part, other, end in ((left, right, 0), (right, left, 1)):
            score = scores[part]
            if len(part) > 1 and score in tied and score < scores[left + right] and other in parts[score][end]:
                return [], f"the score of {left + right!r} is above that of {part!r}, which another piece shares"
    texts: list[str] = []
    for group in groups.values():
        ending, beginning = dict[str, list[tuple[int, str]]](), dict[str, list[tuple[int, str]]]()
        for rank, left, right in group:
            ending.setdefault(right, []).append((rank, left))
            beginning.setdefault(left, []).append((rank, right))
        for middle in ending.keys() & beginning.keys():
            for rank, right in beginning[middle]:
                # Pairs to the left of this one that the definition nevertheless merges later.
                for _, left in itertools.takewhile(lambda one: one[0] > rank, reversed(ending[middle])):  # noqa: B023
                    texts.append(left + middle + right)
                    if len(texts) > _MOST_OVERLAPS:
                        return [], f"more than {_MOST_OVERLAPS:,} pairs of pieces with one score overlap"
    # Each text twice: after the space that may be prepended, and after a newline, which no piece crosses.
    return [f"{text}\n{text}".replace("▁", " ") for text in sorted(texts)], ""


def _merges(proto: Any) -> tuple[list[tuple[str, str]], dict[str, float]]:
    """(pairs of pieces that merge to a piece, best first; score of every piece)."""
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type in (_NORMAL, _USER_DEFINED)}
    pairs = [(whole[:at], whole[at:]) for whole in scores for at in range(1, len(whole))]
    pairs = [(left, right) for left, right in pairs if left in scores and right in scores]
    ties = Counter(scores.values())

    def place(pair: tuple[str, str]) -> tuple[float, int, int, int]:
        # For equal scores sentencepiece merges the leftmost pair, so a run of spaces grows from its left end.
        score = scores[pair[0] + pair[1]]
        return -score, -len(pair[0]) if ties[score] > 1 else 0, ids[pair[0]], ids[pair[1]]

    return sorted(pairs, key=place), scores


def _piece_model(proto: Any) -> models.Model:
    unknown, fallback = proto.trainer_spec.unk_piece, proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == _UNIGRAM:
        usable = (_NORMAL, _USER_DEFINED)
        lowest = min((piece.score for piece in proto.pieces if piece.type in usable), default=0.0)
        # Control and byte pieces never match text: the characters "<s>" must not become the token.
        vocab = [(piece.piece, piece.score if piece.type in usable else lowest - 50.0) for piece in proto.pieces]
        return models.Unigram(vocab, unk_id=proto.trainer_spec.unk_id, byte_fallback=fallback)
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    return models.BPE(ids, _merges(proto)[0], unk_token=unknown, fuse_unk=True, byte_fallback=fallback)


def _piece_normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        # Only spaces: Strip would remove line ends too.
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"▁+\z"), ""))  # "▁" characters of the text itself, too
    return normalizers.Sequence(steps)
