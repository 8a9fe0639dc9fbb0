"""sentencepiece's .model files, BPE and unigram, as a tokenizer.json."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from engine.data.awkward import Difference, compare, encode_plain, texts_for
from engine.errors import DataError, cut

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # kinds of pieces
_UNIGRAM, _BPE = 1, 2  # kinds of models
_MOST_OVERLAPS = 20_000


class Sentencepiece:
    """The library itself, for the text of one `.model`. `pieces`: every spelling with its score."""

    def __init__(self, path: Path):
        """Raises DataError if the file is damaged or the library is missing."""
        try:
            import sentencepiece
            from sentencepiece import sentencepiece_model_pb2
        except ImportError as err:
            raise DataError(f"{path}: {err}: .model files need `pip install 'trident-engine[formats]'`.") from err
        self.proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
        try:
            self.content = path.read_bytes()
            self.proto.ParseFromString(self.content)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.content)
        except OSError as err:
            raise DataError(f"{path}: cannot be read: {err.strerror or err}. Check the path of the tokenizer.") from err
        except Exception as err:  # protobuf and sentencepiece have errors of their own
            raise DataError(f"{path}: not a sentencepiece model: {cut(str(err))}. Copy it anew.") from err
        if self.proto.trainer_spec.model_type not in (_UNIGRAM, _BPE):
            raise DataError(f"{path}: a word or character model, expected BPE or unigram. Choose another tokenizer.")
        self.name = f"sentencepiece {version('sentencepiece')}"
        pieces = [(piece.piece, float(piece.score)) for piece in self.proto.pieces]
        self.is_unigram = self.proto.trainer_spec.model_type == _UNIGRAM
        symbols = [re.escape(piece.piece) for piece in self.proto.pieces if piece.type == _USER_DEFINED]
        # The texts that have one are matched on before anything else happens to them.
        self.symbols = re.compile("|".join(symbols).replace("▁", "[ ▁]")) if symbols else None
        end = self._processor.eos_id()
        self.end = pieces[end][0] if end >= 0 else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; other threads run meanwhile."""
        return list(self._processor.encode(list(texts), out_type=int, num_threads=1))

    def unknown_bytes(self, text: str) -> int:
        """UTF-8 bytes of `text`, normalised, that become the unknown token."""
        ids, spelled = self._processor.encode(text, out_type=int), self._processor.encode(text, out_type=str)
        return sum(len(s.encode()) for number, s in zip(ids, spelled) if number == self._processor.unk_id())


def to_json(model: Sentencepiece) -> str:
    """The text of a tokenizer.json that is at least near a `.model`; `difference` says whether it gives its ids."""
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
    own = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    plain = not (spec.add_dummy_prefix or spec.remove_extra_whitespaces or spec.precompiled_charsmap)
    # Found in the normalised text, where blanks are "▁", unless normalising a symbol itself gives something else.
    tokenizer.add_tokens([AddedToken(text, normalized=plain, special=False) for text in own])
    return str(tokenizer.to_str())


def difference(model: Sentencepiece, definition: str) -> tuple[str, bool]:
    """The first of many texts of which the definition gives other ids, "" if none; and whether there is none among the
    texts without a user-defined symbol.
    """
    if model.is_unigram:  # 0|00 or 00|0: no comparison on other texts tells which comes out
        return f"{model.name} adds the scores of a unigram model up in another precision, so ties differ", False
    mine = encode_plain(tokenizers.Tokenizer.from_str(definition))
    spelled = [piece.piece.replace("▁", " ") for piece in model.proto.pieces if piece.type != _BYTE]
    texts = [*texts_for(spelled), *_overlaps(model.proto)]
    try:
        compare(mine, model, texts)
    except Difference as err:
        first = str(err)
    else:
        return "", True
    if model.symbols is None:
        return first, False
    try:
        compare(mine, model, [text for text in texts if not model.symbols.search(text)])
    except Difference:
        return first, False
    return first, True


def _overlaps(proto: Any) -> list[str]:
    """Two pieces of one score that share a letter: which of them stands depends on the order of merging."""
    groups: dict[float, list[str]] = {}
    for piece in proto.pieces:
        if piece.type == _NORMAL and len(piece.piece) > 1:
            groups.setdefault(piece.score, []).append(piece.piece)
    found: list[str] = []
    for tied in groups.values():
        beginning: dict[str, list[str]] = {}
        for text in tied:
            beginning.setdefault(text[0], []).append(text)
        # Each in turn is followed by another of those that may follow.
        following = [(number, text, beginning.get(text[-1], [])) for number, text in enumerate(tied)]
        found += [
            text + some[(number + at) % len(some)][1:] for number, text, some in following if some for at in (0, 1)
        ]
    return [text.replace("▁", " ") for text in found[:_MOST_OVERLAPS]]


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
    ties = Counter(scores.values())

    def place(pair: tuple[str, str]) -> tuple[float, int, int, int]:
        # Of equal scores sentencepiece merges the leftmost pair, so that a run of blanks grows from its left end.
        score = scores[pair[0] + pair[1]]
        return -score, -len(pair[0]) if ties[score] > 1 else 0, ids[pair[0]], ids[pair[1]]

    pairs.sort(key=place)
    return models.BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=fallback)


def _piece_normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        # Blanks alone: Strip would take line ends too.
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"▁+\z"), ""))  # the letter itself, too
    return normalizers.Sequence(steps)
