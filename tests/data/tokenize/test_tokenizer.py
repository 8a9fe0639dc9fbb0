"""The Tokenizer class with files of other libraries, and with tokenizers trained here."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from tokenizers import normalizers

from engine.data.tokenize import sentencepiece_model, tiktoken_ranks
from engine.data.tokenize.equivalence import EDGE_CASES
from engine.data.tokenize.tiktoken_ranks import byte_letters
from engine.data.tokenize.tokenizer import Tokenizer
from engine.errors import DataError
from tests.support.errors import raises
from tests.support.paths import ROOT

TEXTS = [page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare files with their library on few texts here; test_originals.py tests that comparison."""
    for module in (sentencepiece_model, tiktoken_ranks):
        monkeypatch.setattr(module, "texts_for", lambda spellings: EDGE_CASES)


def piece_model(folder: Path, kind: str, **options: object) -> Path:
    (folder / "text").write_text("\n".join(TEXTS))
    settings = {"model_type": kind, "vocab_size": 600, "byte_fallback": True, "minloglevel": 3, **options}
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "text"), model_prefix=str(folder / kind), **settings)
    return folder / f"{kind}.model"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("like", ["llama", "default"])
def test_sentencepiece_models_give_their_own_ids(tmp_path: Path, kind: str, like: str) -> None:
    options: dict[str, object] = {"user_defined_symbols": ["<sep>"]}
    if like == "llama":
        options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    path = piece_model(tmp_path, kind, **options)
    chosen, original = Tokenizer.load(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert (chosen.vocab_size, chosen.unknown, chosen.eod) == (600, 0, 2)
    for text in (*TEXTS, *EDGE_CASES):
        mine, right = chosen.encode(text), original.encode(text)
        assert mine == right
    assert not {0, 1, 2} & set(chosen.encode("<unk><s></s>")) and 2 in Tokenizer.load(path, True).encode("</s>")
    if like == "llama":
        assert chosen.decode(chosen.encode(TEXTS[0])) == TEXTS[0]
    chosen.save(tmp_path / "folder")
    again = Tokenizer.load(tmp_path / "folder")
    assert (again.digest, again.eod, again.encode(TEXTS[0])) == (chosen.digest, 2, chosen.encode(TEXTS[0]))


def rank_file(folder: Path, name: str = "mine") -> dict[bytes, int]:
    """A .tiktoken file made of a trained BPE."""
    definition = json.loads(Tokenizer.train(iter(TEXTS), 900)._definition)
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    tokens = [bytes(byte_of[c] for c in token) for token in definition["model"]["vocab"] if token != "<|endoftext|>"]
    order = {token: number for number, token in enumerate(sorted(tokens, key=len))}
    (folder / f"{name}.tiktoken").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % n for t, n in order.items()))
    return order


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base", "r50k_base"])
def test_tiktoken_files_give_their_own_ids(tmp_path: Path, name: str) -> None:
    ranks, (pattern, _) = rank_file(tmp_path), tiktoken_ranks._ENCODINGS[name]
    special = {"<|endoftext|>": len(ranks) + 7}  # a gap before it, as in cl100k_base
    (tmp_path / "mine.json").write_text(json.dumps({"pattern": pattern, "special_tokens": special}))
    chosen = Tokenizer.load(tmp_path / "mine.tiktoken")
    theirs = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    assert chosen.eod == len(ranks) + 7 == chosen.vocab_size - 1
    for text in (*TEXTS, *EDGE_CASES, "<|endoftext|>"):
        assert chosen.encode(text) == theirs.encode_ordinary(text)
        assert chosen.decode(chosen.encode(text)) == text
    assert chosen.eod in Tokenizer.load(tmp_path / "mine.tiktoken", True).encode("a<|endoftext|>")


def test_foreign_files_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, code: str, content: bytes | None = None, value: object = "") -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with raises(DataError, code, tmp_path, value):
            Tokenizer.load(tmp_path / name)

    refuse("none.model", "tokenize.not-found")
    refuse("bad.model", "tokenize.not-sentencepiece", b"nothing")
    refuse("none.tiktoken", "tokenize.not-found")
    refuse("bad.tiktoken", "tokenize.not-tiktoken", b"one two three\n")
    rank_file(tmp_path)
    refuse("mine.tiktoken", "tokenize.ranks-without-rules", value=tmp_path / "mine.json")
    (tmp_path / "mine.json").write_text('{"pattern": 5}')
    refuse("mine.tiktoken", "tokenize.rules-invalid", value=tmp_path / "mine.json")
    path = piece_model(tmp_path, "bpe", normalization_rule_name="identity")
    monkeypatch.setattr(sentencepiece_model, "_piece_normalizer", lambda spec: normalizers.Replace(" ", "▁"))
    inexact = Tokenizer.load(path)  # then sentencepiece itself encodes
    assert inexact.sentencepiece is not None and "instead of" in inexact.note
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    refuse(path.name, "tokenize.sentencepiece-missing", value="trident-engine[formats]")
