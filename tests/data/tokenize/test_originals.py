"""Converted sentencepiece models and files of ranks compared with their original libraries, in prepare too."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken
from sentencepiece import sentencepiece_model_pb2 as pb
from tokenizers import Regex, normalizers

import engine.data.tokenize.convert as convert_module
import engine.data.tokenize.encoder as encoder_module
from engine.data.samples.indexed import IndexedDataset
from engine.data.tokenize import conversion_cache, sentencepiece_model, tiktoken_ranks
from engine.data.tokenize.equivalence import texts_for
from engine.data.tokenize.tokenizer import Tokenizer
from engine.errors import DataError
from tests.support.errors import raises
from tests.support.verbs import prepare

TEXTS = ["def f(x):", "    return x + 1", "for i in range(10):", "がぎぐげご ガギグ 한국어 é ü", "the end of it"] * 20


def trained(path: Path, **options: object) -> sentencepiece.SentencePieceProcessor:
    settings = {"vocab_size": 400, "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 3, **options}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, **settings)
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def tie(path: Path, pieces: list[str], score: float) -> sentencepiece.SentencePieceProcessor:
    """Add pieces with equal scores to a model."""
    proto = pb.ModelProto()
    proto.ParseFromString(path.read_bytes())
    there = {piece.piece for piece in proto.pieces}
    for text in pieces:
        if text not in there:
            proto.pieces.add(piece=text, score=score)
    for piece in proto.pieces:
        if piece.piece in pieces:
            piece.score = score
    path.write_bytes(proto.SerializeToString())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_blank_pieces_of_one_score_merge_as_sentencepiece_does(tmp_path: Path) -> None:
    """As in Mistral-7B's model: pieces of 2 to 14 and 16 spaces, in the order of its file, and of one space."""
    path = tmp_path / "tokenizer.model.v1"
    trained(path, model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False)
    original = tie(path, ["▁" * n for n in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 1)], -1e9)
    chosen = Tokenizer.load(path)
    assert chosen.sentencepiece is None  # a tokenizer.json gives these ids: gigatoken can encode
    for n in range(1, 200):
        for text in (f"x{' ' * n}y", " " * n, f"{' ' * n}return", f"\n{' ' * n}"):
            assert chosen.encode(text) == original.encode(text)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_what_no_definition_gives_sentencepiece_encodes(tmp_path: Path, kind: str) -> None:
    """Ties that no order of merges reproduces (QX, XQ), and composed characters of six or more bytes."""
    path = tmp_path / "m.model"
    options = {"normalization_rule_name": "identity"} if kind == "bpe" else {"user_defined_symbols": ["<sep>"]}
    original = trained(path, model_type=kind, **options)
    if kind == "bpe":
        original = tie(path, ["QX", "XQ"], 0.0)
    chosen = Tokenizer.load(path)
    assert chosen.sentencepiece is not None and ("instead of" if kind == "bpe" else "ties differ") in chosen.note
    texts = [
        "ofofor forfo",
        "か\u3099 ｶﾞ \u1112\u1161\u11ab ω\u0314\u0342\u0345",
        "<sep>x",
        *TEXTS[:5],
        "",
        "\u2603 <s>",
    ]
    assert [list(ids) for ids in chosen.encode_batch(texts)] == original.encode(texts)
    assert [chosen.encode(text) for text in texts] == original.encode(texts)
    with_special = Tokenizer.load(path, True)
    assert with_special.encode("x</s> y<s>") == [*original.encode("x"), 2, *original.encode(" y"), 1]
    chosen.save(tmp_path / "folder")
    assert not (tmp_path / "folder/tokenizer.json").exists()
    again = Tokenizer.load(tmp_path / "folder")
    assert (again.digest, again.encode(texts[1]), again.eod) == (chosen.digest, original.encode(texts[1]), 2)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    report = prepare([tmp_path / "in.jsonl"], str(tmp_path / "out"), tokenizer=path, append_eod=False)
    assert report.encoder.startswith("sentencepiece") and "no tokenizer.json reproduces its ids" in report.encoder_note
    data = IndexedDataset(tmp_path / "out-train")
    assert [list(data[i]) for i in range(len(data))] == [ids for ids in original.encode(texts) if ids]
    assert Tokenizer.load(tmp_path / "out-tokenizer").digest == report.tokenizer_digest == chosen.digest


@pytest.mark.parametrize(
    ("letters", "pieces", "text"),
    [
        ("QZXY", {"XY": 1.0, "QXY": 0.0, "XYZ": 0.0}, "QXYZ"),  # they share two characters
        ("QX", {"▁X": 1.0, "XQ": 0.0, "QX": 0.0}, "\nXQX"),  # not at the beginning, where the space takes one
        (
            "YZQX",
            {"QXY": 0.0, "YZ": -1.0, "QX": -1.0},
            "QXYZ",
        ),  # they share none, but the first merge enables a better one
    ],
)
def test_ties_that_only_some_texts_show(tmp_path: Path, letters: str, pieces: dict[str, float], text: str) -> None:
    path = tmp_path / "m.model"
    trained(path, model_type="bpe", normalization_rule_name="identity")
    for number, letter in enumerate(letters):
        tie(path, [letter], -2e9 - 1e8 * number)
    for piece, score in pieces.items():
        original = tie(path, [piece], score)
    chosen = Tokenizer.load(path)
    assert chosen.sentencepiece is not None and chosen.encode(text) == original.encode(text)


def test_symbols_that_appear_when_a_text_is_normalised(tmp_path: Path) -> None:
    """A symbol that contains the prepended space cannot be found by searching the text."""
    path = tmp_path / "m.model"
    options = {"normalization_rule_name": "identity", "user_defined_symbols": ["▁[INST]"]}
    original = trained(path, model_type="bpe", remove_extra_whitespaces=False, **options)
    texts = ["[INST] the", "a [INST] x"]
    ids, _ = encoder_module.Encoder(Tokenizer.load(path)).encode(texts)
    assert ids.tolist() == [number for text in texts for number in original.encode(text)]


def test_only_texts_with_symbols_need_sentencepiece(tmp_path: Path) -> None:
    """As in Mistral's .model.v3: a text that begins with a symbol has a space before it."""
    path, options = tmp_path / "m.model", {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    original = trained(path, model_type="bpe", user_defined_symbols=["[REF]"], **options)
    texts = ["[REF] one", "two", "a [REF][REF] b", "", "   three\n", *TEXTS[:5]]
    chosen = Tokenizer.load(path)
    chosen.save(tmp_path / "folder")
    for tokenizer in (chosen, Tokenizer.load(tmp_path / "folder")):
        assert tokenizer.sentencepiece is not None and tokenizer.exact_without_symbols
        encoder = encoder_module.Encoder(tokenizer)
        assert encoder.name.startswith("gigatoken") and "user-defined symbols by sentencepiece" in encoder.name
        for some in (texts, texts[:1], texts[1:2]):
            ids, lengths = encoder.encode_checked(some)
            assert [list(x) for x in np.split(ids, np.cumsum(lengths)[:-1])] == original.encode(some)
    prefixless = trained(
        path, model_type="bpe", user_defined_symbols=["▁▁", "[REF]"], add_dummy_prefix=False, **options
    )
    exact = Tokenizer.load(path)  # like Gemma's
    assert exact.sentencepiece is None and [exact.encode(text) for text in texts] == prefixless.encode(texts)


def test_texts_to_compare_on_are_what_the_docs_say() -> None:
    together = "\n".join(texts_for(["が", "ệ", "é", "한", "ᾧ", "हि"]))
    for white in " \t\n\r\u00a0\u2003\u3000\u200b\ufeff":
        assert all(f"{edge}{white * n}" in together for n in range(1, 101) for edge in ("x", "y")[n % 10 != 1 :][:1])
    for sequence in (
        "か\u3099",
        "e\u0301",
        "\u1112\u1161\u11ab",
        "ω\u0314\u0342\u0345",
        "\u0915\u093c",
        "e\u0302\u0323",
    ):
        assert sequence in together
    assert "\u0430" not in together  # no Cyrillic piece, no Cyrillic text


def wrong_at(letter: str) -> normalizers.Normalizer:
    """Encodes like the correct tokenizer, except for one character."""
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.Replace(Regex(letter), "x")]
    return normalizers.Sequence(steps)


@pytest.mark.parametrize("late", [False, True])
def test_a_run_compares_its_own_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """A difference that only a text of the corpus shows: sentencepiece encodes everything again, or it is an error."""
    path, letter = tmp_path / "m.model", "\u4e00"
    original = trained(path, model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False)
    monkeypatch.setattr(sentencepiece_model, "_piece_normalizer", lambda spec: wrong_at(letter))
    if late:
        monkeypatch.setattr(encoder_module, "_FIRST_CHARS", 0)
    texts = [*TEXTS[:7], f"one {letter}"] if not late else [f"one {letter}", *TEXTS[:7]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.warns(
        UserWarning, match="differs from it: the ids of .*instead of.*encoded again by sentencepiece itself"
    ):
        report = prepare([tmp_path / "in.jsonl"], str(tmp_path / "out"), tokenizer=path, append_eod=False)
    data = IndexedDataset(tmp_path / "out-train")
    assert [list(data[i]) for i in range(len(data))] == original.encode(texts)
    kept = Tokenizer.load(tmp_path / "out-tokenizer")
    assert kept.sentencepiece is not None and kept.digest == report.tokenizer_digest
    assert np.array_equal(kept.encode(texts[-1]), original.encode(texts[-1]))


def test_what_is_compared_is_reported_by_the_place_in_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first texts are compared also if a thread has a later batch first, and after a resume."""
    trained(tmp_path / "m.model", model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False)
    monkeypatch.setattr(sentencepiece_model, "_piece_normalizer", lambda spec: wrong_at("\u2603"))
    encoder = encoder_module.Encoder(Tokenizer.load(tmp_path / "m.model"))
    texts = [*TEXTS[:7], "one \u2603"]  # not among the samples
    encoder.encode_checked(texts, 1 << 20)
    with pytest.raises(encoder_module.Mismatch):
        encoder.encode_checked(texts, 0)
    encoder.encode_checked(texts, 1 << 20)


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", "tokenize.not-sentencepiece"), (b"IQ== 0\nIg== 1\n", "tokenize.ranks-named-model")],
)
def test_models_that_are_none(tmp_path: Path, content: bytes, code: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with raises(DataError, code, tmp_path / "tokenizer.model"):
        Tokenizer.load(tmp_path)


def test_a_difference_in_ranks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {bytes([byte]): byte for byte in range(256)} | {b"an": 256, b"\xe2\x98": 257}
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in table.items())
    (tmp_path / "r50k_base.tiktoken").write_text("".join(lines))
    (tmp_path / "in.jsonl").write_text('{"text": "a banana"}\n{"text": "snow \u2603"}\n')
    right = tiktoken.Encoding.encode_ordinary

    def other(self: tiktoken.Encoding, text: str) -> list[int]:
        return right(self, text.replace("\u2603", "*"))

    monkeypatch.setattr(tiktoken.Encoding, "encode_ordinary", other)
    with raises(DataError, "tokenize.not-convertible", "'snow \u2603' from token 5 ", [257, 131]):
        prepare([tmp_path / "in.jsonl"], str(tmp_path / "out"), tokenizer=tmp_path / "r50k_base.tiktoken")
    monkeypatch.setattr(tiktoken_ranks, "texts_for", lambda spellings: ["\u2603"])
    with raises(DataError, "tokenize.not-convertible", "r50k_base.tiktoken", "'\u2603' from token 0 "):
        Tokenizer.load(tmp_path / "r50k_base.tiktoken")


def test_conversions_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry is reused unless it is damaged or any of its dependencies has changed; old entries are removed."""
    cache, made = tmp_path / "home/cache", []
    monkeypatch.setattr(conversion_cache, "folder", lambda: cache)
    convert = convert_module._convert
    monkeypatch.setattr(convert_module, "_convert", lambda found: (made.append(found.path.name), convert(found))[1])
    monkeypatch.setattr(sentencepiece_model, "texts_for", lambda spellings: ["か\u3099"])
    path = tmp_path / "m.model"
    trained(path, model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False)

    def loads(times: int) -> Tokenizer:
        made.clear()
        chosen = Tokenizer.load(path)
        assert len(made) == times
        return chosen

    first = loads(1)
    assert (loads(0).digest, loads(0).sentencepiece) == (first.digest, None)
    (entry,) = cache.iterdir()
    other = entry.read_bytes().replace(b"version", b"versiom", 1)
    for damage in (
        other,
        entry.read_bytes()[:-1],
        entry.read_bytes()[:-9] + b"X" + entry.read_bytes()[-8:],
        b"",
        b"{}",
    ):
        entry.write_bytes(damage)
        assert loads(1).digest == first.digest and loads(0).eod == 2
    monkeypatch.setattr(conversion_cache, "_version", lambda name: "another")
    loads(1)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    loads(0)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    loads(1)
    trained(path, model_type="bpe", vocab_size=390)
    changed = loads(1)  # nmt_nfkc: sentencepiece itself encodes
    assert changed.sentencepiece is not None and (loads(0).digest, loads(0).note) == (changed.digest, changed.note)
    monkeypatch.setattr(conversion_cache, "_MOST_ENTRIES", 2)
    trained(path, model_type="unigram")
    assert loads(1).sentencepiece is not None
    assert len(list(cache.iterdir())) == 2
    for impossible in (Path("/dev/null/cache"), Path("/proc/none")):
        monkeypatch.setattr(conversion_cache, "folder", lambda where=impossible: where)
        assert loads(1).vocab_size == loads(1).vocab_size
