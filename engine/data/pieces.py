"""sentencepiece's .model files, BPE and unigram, as a tokenizer.json."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from engine.data.awkward import AWKWARD, compare
from engine.errors import DataError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # kinds of pieces
_UNIGRAM, _BPE = 1, 2  # kinds of models


def from_sentencepiece(path: Path) -> tuple[str, str | None]:
    """The definition and the end token of a BPE or unigram `.model`.

    Raises DataError if it cannot be converted exactly, equally likely pieces aside."""
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
    tokenizer.encode_special_tokens = True
    mine = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    compare(path, mine, original.encode, [*AWKWARD, *control[:50]], likely)
    return tokenizer.to_str(), proto.pieces[original.eos_id()].piece if original.eos_id() >= 0 else None


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
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
