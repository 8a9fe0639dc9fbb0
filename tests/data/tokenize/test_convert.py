"""Tokenizer files of other libraries: which are found in a folder, under which names, and which are rejected."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from engine.data.tokenize import sentencepiece_model, tiktoken_ranks
from engine.data.tokenize.equivalence import EDGE_CASES
from engine.data.tokenize.tiktoken_ranks import _ENCODINGS
from engine.data.tokenize.tokenizer import Tokenizer
from engine.errors import DataError
from tests.support.errors import raises
from tests.support.paths import ROOT

TEXTS = [page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))[:4]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare files with their library on few texts here; test_originals.py tests that comparison."""
    for module in (sentencepiece_model, tiktoken_ranks):
        monkeypatch.setattr(module, "texts_for", lambda spellings: EDGE_CASES)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of every kind, each under its usual name in a folder of its kind."""
    top = tmp_path_factory.mktemp("files")
    for name in ("json", "gpt2", "spm", "bert"):
        (top / name).mkdir()
    trained = Tokenizer.train(iter(TEXTS), 700)
    trained.save(top / "json")
    model = json.loads((top / "json/tokenizer.json").read_bytes())["model"]
    (top / "gpt2/vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (top / "gpt2/merges.txt").write_text("#version: 0.2\n" + merges)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].split("\n")),
        model_prefix=str(top / "spm/tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=3,
    )
    (top / "spm/tokenizer.vocab").unlink()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.,'!0123456789", "天", "气"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"] + ["don", "cafe", "##end", "the"]
    (top / "bert/vocab.txt").write_text("".join(f"{word}\n" for word in words))
    return top


def test_gpt2_files_are_their_tokenizer(files: Path, tmp_path: Path) -> None:
    right = Tokenizer.load(files / "json")
    named = tmp_path / "named"
    named.mkdir()
    shutil.copy(files / "gpt2/vocab.json", named / "gpt2-vocab.json")
    shutil.copy(files / "gpt2/merges.txt", named / "gpt2-merges.txt")
    shutil.copy(files / "gpt2/merges.txt", tmp_path / "other.txt")
    alone = tmp_path / "alone.json"
    shutil.copy(files / "gpt2/vocab.json", alone)
    for path, merges in (
        (files / "gpt2", None),
        (files / "gpt2/vocab.json", None),
        (named, None),
        (named / "gpt2-vocab.json", None),
        (alone, tmp_path / "other.txt"),
    ):
        chosen = Tokenizer.load(path, merges=merges)
        assert [chosen.encode(text) for text in (*TEXTS, *EDGE_CASES)] == [
            right.encode(t) for t in (*TEXTS, *EDGE_CASES)
        ]
        assert (chosen.eod, chosen.vocab_size) == (right.eod, right.vocab_size)
    with raises(DataError, "tokenize.merges-missing", "--merges"):
        Tokenizer.load(alone)
    with raises(DataError, "tokenize.merges-without-vocabulary", tmp_path / "other.txt"):
        Tokenizer.load(files / "json", merges=tmp_path / "other.txt")


@pytest.mark.parametrize("lower", [True, False])
def test_bert_files_give_the_ids_of_bert(files: Path, tmp_path: Path, lower: bool) -> None:
    shutil.copy(files / "bert/vocab.txt", tmp_path)
    theirs = BertTokenizerLegacy(str(tmp_path / "vocab.txt"), do_lower_case=lower)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    for chosen in (Tokenizer.load(tmp_path), Tokenizer.load(files / "bert/vocab.txt", lower_case=lower)):
        for text in ("Café THE  don't 今天天气!\u200b e\u0301nd", "\tabcend 123. \u00a0the\ufffd", *EDGE_CASES[:6]):
            assert chosen.encode(text) == theirs.convert_tokens_to_ids(theirs.tokenize(text)), text
        assert chosen.eod == 3 and chosen.unknown == 1
    assert Tokenizer.load(files / "bert").encode("CAFE") == [chosen.token_id("cafe")]  # all pieces are lower case
    with raises(DataError, "tokenize.lower-case-has-no-effect", files / "json"):
        Tokenizer.load(files / "json", lower_case=True)


def test_sentencepiece_models_under_all_their_names(files: Path, tmp_path: Path) -> None:
    original = sentencepiece.SentencePieceProcessor(model_file=str(files / "spm/tokenizer.model"))
    for name in (
        "tokenizer.model",
        "tokenizer.model.v3",
        "mistral_instruct_tokenizer_241114.model.v7m1",
        "spiece.model",
    ):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(files / "spm/tokenizer.model", folder / name)
        for path in (folder, folder / name):
            assert Tokenizer.load(path).encode(TEXTS[1]) == original.encode(TEXTS[1])
    shutil.copy(files / "spm/tokenizer.model", tmp_path / "tokenizer.model/tokenizer.model.v3")  # as Mistral has it
    assert Tokenizer.load(tmp_path / "tokenizer.model").eod == 2
    (tmp_path / "tokenizer.model/tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    with raises(DataError, "tokenize.class-unknown", "XLMRobertaTokenizer"):
        Tokenizer.load(tmp_path / "tokenizer.model")


def ranks() -> dict[bytes, int]:
    words = sorted({word.encode() for text in TEXTS for word in text.split()[:300] if len(word) > 1})
    pieces = [bytes([byte]) for byte in range(256)]
    for word in words:
        pieces += [word[:end] for end in range(2, len(word) + 1) if word[:end] not in pieces]
    return {piece: number for number, piece in enumerate(pieces)}


def test_what_tokenizer_config_says_of_a_model(files: Path, tmp_path: Path) -> None:
    shutil.copy(files / "spm/tokenizer.model", tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": "</s>", "eos_token": {"content": "<s>"}}))
    chosen = Tokenizer.load(tmp_path)
    chosen.save(tmp_path / "copy")
    for one in (chosen, Tokenizer.load(tmp_path / "copy")):
        assert (one.bos, one.eod) == (2, 1)
    config.write_text(json.dumps({"bos_token": None}))
    with raises(DataError, "tokenize.no-begin-token"):
        _ = Tokenizer.load(tmp_path).bos
    for number, content, special in ((1, "<s>", False), (400, "<pad>", True)):  # special: never matched in texts
        config.write_text(json.dumps({"added_tokens_decoder": {number: {"content": content, "special": special}}}))
        assert Tokenizer.load(tmp_path).eod == 2
    config.write_text(json.dumps({"added_tokens_decoder": {"400": {"content": "<tool>", "special": False}}}))
    with raises(DataError, "tokenize.added-token-missing", "'<tool>'", 400):
        Tokenizer.load(tmp_path)


def test_whispers_rank_files(tmp_path: Path) -> None:
    """multilingual.tiktoken ends in a line "= 50256": a rank without a token."""
    table, pattern = ranks(), _ENCODINGS["r50k_base"][0]
    lines = [base64.b64encode(token).decode() + f" {rank}\n" for token, rank in table.items()]
    theirs = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=table, special_tokens={})
    for empty in (f"= {len(table)}\n", f" {len(table)}\n", ""):
        (tmp_path / "multilingual.tiktoken").write_text("".join(lines) + empty)
        chosen = Tokenizer.load(tmp_path)
        assert chosen.encode(TEXTS[0]) == theirs.encode_ordinary(TEXTS[0]) and chosen.eod == 50257
    for line, words in (
        (lines[300], "repeats the token"),
        ("a b c\n", "has 3 words"),
        ("YWI* 7\n", "base64"),
        ("/w/A x\n", "x"),
    ):
        (tmp_path / "gpt2.tiktoken").write_text("".join(lines) + line)
        with raises(DataError, "tokenize.not-tiktoken", words):
            Tokenizer.load(tmp_path / "gpt2.tiktoken")


def test_tekken_files(tmp_path: Path) -> None:
    table, pattern = ranks(), _ENCODINGS["o200k_base"][0]
    entries = [{"rank": r, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for t, r in table.items()]
    used = len(entries) - 5  # the file has more tokens than the model
    config = {"pattern": pattern, "default_vocab_size": used + 30, "default_num_special_tokens": 30, "version": "v3"}
    content: dict[str, object] = {"config": config, "vocab": entries}
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    kept = {token: rank for token, rank in table.items() if rank < used}
    theirs = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=kept, special_tokens={})
    chosen = Tokenizer.load(tmp_path)
    for text in (*TEXTS, *EDGE_CASES):
        assert chosen.encode(text) == [rank + 30 for rank in theirs.encode_ordinary(text)]
        assert chosen.decode(chosen.encode(text)) == text
    assert (chosen.eod, chosen.vocab_size, chosen.token_id("[SUFFIX]")) == (2, used + 30, 16)
    assert chosen.token_id("<SPECIAL_29>") == 29
    content["special_tokens"] = [
        {"rank": 0, "token_str": "<none>", "is_control": True},
        {"rank": 1, "token_str": "</s>"},
    ]
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path / "tekken.json").eod == 1
    (tmp_path / "tekken.json").write_text('{"config": {"pattern": "a"}, "vocab": []}')
    with raises(DataError, "tokenize.not-tekken", tmp_path / "tekken.json"):
        Tokenizer.load(tmp_path / "tekken.json")


def test_what_is_no_tokenizer_names_the_formats(files: Path, tmp_path: Path) -> None:
    every = ("tokenizer.json", ".model", ".tiktoken", "tekken.json", "vocab.json with merges.txt", "vocab.txt")
    (tmp_path / "readme.md").write_text("text")
    (tmp_path / "some.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "some.json").write_text('{"a": [1]}')
    for name, kind in (
        ("", "none-in-folder"),
        ("readme.md", "not-usable"),
        ("some.bin", "not-usable"),
        ("some.json", "not-usable"),
        ("none", "not-found"),
    ):
        with raises(DataError, f"tokenize.{kind}", *every):
            Tokenizer.load(tmp_path / name)
    shutil.copy(files / "bert/vocab.txt", tmp_path)
    shutil.copy(files / "spm/tokenizer.model", tmp_path)
    with raises(DataError, "tokenize.several-in-folder", "tokenizer.model, vocab.txt"):
        Tokenizer.load(tmp_path)
