"""Raw text -> tokenizer -> corpora: no text is changed or lost silently, and everything is counted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cli.prepare_console import show_prepared
from engine.data.read.progress import ProgressEvent
from engine.data.samples.indexed import IndexedDataset
from engine.data.tokenize.tokenizer import END_OF_TEXT, Tokenizer
from engine.errors import ConfigError, DataError
from tests.support.cases import same_bytes
from tests.support.errors import raises
from tests.support.verbs import prepare

TEXTS = [f"def function_{i}(a, b):\n    return a * {i} + b  # line {i % 7} of ünïcode\n" * (i % 4) for i in range(120)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(TEXTS), 400)


def jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_training_is_deterministic_and_saves(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert Tokenizer.train(iter(TEXTS), 400).digest == tokenizer.digest
    assert Tokenizer.train(iter(TEXTS[:50]), 400).digest != tokenizer.digest
    assert (tokenizer.eod, 257 < tokenizer.vocab_size <= 400) == (0, True)
    tokenizer.save(tmp_path / "t")
    for path in (tmp_path / "t", tmp_path / "t" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert (loaded.digest, loaded.eod, loaded.vocab_size) == (tokenizer.digest, 0, tokenizer.vocab_size)
        assert loaded.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])
    loaded.save(tmp_path / "again")
    for file in (tmp_path / "t").iterdir():
        same_bytes(tmp_path / "again" / file.name, file)


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=40))
def test_any_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    text = text.encode("utf-8", "ignore").decode("utf-8")  # hypothesis also draws lone surrogates: not text
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", [END_OF_TEXT, f"a{END_OF_TEXT}b", f" {END_OF_TEXT}{END_OF_TEXT}\n"])
def test_spelled_out_special_token_is_text(tokenizer: Tokenizer, tmp_path: Path, text: str) -> None:
    tokenizer.save(tmp_path)
    for chosen in (tokenizer, Tokenizer.load(tmp_path)):
        ids = chosen.encode(text)
        assert chosen.eod not in ids and chosen.decode(ids) == text
        assert [list(i) for i in chosen.encode_batch([text, ""])] == [ids, []]


def test_transformers_loads_saved_tokenizers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token == END_OF_TEXT and theirs.eos_token_id == 0
    assert theirs.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])
    assert theirs.decode(tokenizer.encode(TEXTS[3])) == TEXTS[3]


def test_stored_truncation_padding_and_templates_are_off(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {
        "strategy": {"Fixed": 512},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": END_OF_TEXT,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3]) == list(loaded.encode_batch([TEXTS[3]])[0])
    assert loaded.digest != tokenizer.digest


def test_bad_tokenizers_are_rejected(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with raises(DataError, "tokenize.none-in-folder", tmp_path):
        Tokenizer.load(tmp_path)
    for content in ("{", "{}", '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with raises(DataError, "tokenize.not-usable", tmp_path):
            Tokenizer.load(tmp_path)
    with raises(DataError, "tokenize.recipe-faults", 257):
        Tokenizer.train(iter(TEXTS), 256)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<none>"}}')
    with raises(DataError, "tokenize.no-end-token", "<none>"):
        _ = Tokenizer.load(tmp_path).eod


def run(tmp_path: Path, texts: list[str], **options: Any) -> Any:
    defaults: dict[str, Any] = {"tokenizer": tmp_path / "tok", "train_vocab_size": 300, "valid_fraction": 0.2}
    return prepare([jsonl(tmp_path / "in.jsonl", texts)], str(tmp_path / "out"), **{**defaults, **options})


def test_prepare_end_to_end(tmp_path: Path) -> None:
    events: list[ProgressEvent] = []
    report = run(tmp_path, TEXTS, progress=events.append)
    tok = Tokenizer.load(tmp_path / "tok")
    train, valid = (IndexedDataset(tmp_path / f"out-{s}", tok.vocab_size) for s in ("train", "valid"))
    decoded = [[tok.decode(data[i][:-1]) for i in range(len(data))] for data in (train, valid)]
    assert all(data[i][-1] == tok.eod for data in (train, valid) for i in range(len(data)))
    full = [t for t in TEXTS if t]
    assert sorted(decoded[0] + decoded[1]) == sorted(full)  # every document in exactly one split
    assert [t for t in full if t in set(decoded[0])] == decoded[0]  # in input order
    assert 5 < len(valid) < 45 and set(np.diff([full.index(t) for t in decoded[1]])) != {1}
    assert report.train.text_bytes + report.valid.text_bytes == sum(len(t.encode()) for t in TEXTS)
    assert report.train.empty_documents + report.valid.empty_documents == TEXTS.count("")
    assert report.train.tokens == train.num_tokens and report.train.longest_document_tokens == train.lengths.max()
    assert report.train.longest_document.startswith(f"{tmp_path}/in.jsonl:")
    assert train.meta["tokenizer_digest"] == tok.digest == report.tokenizer_digest and train.meta["eod"] == 0
    assert json.loads((tmp_path / "out-report.json").read_text())["train"]["tokens"] == train.num_tokens
    assert {e.phase for e in events} == {"train tokenizer", "encode"}
    assert events[-1].input_bytes == events[-1].input_bytes_total == (tmp_path / "in.jsonl").stat().st_size

    counts, v = Counter(train.tokens.tolist()), tok.vocab_size
    expected = (
        -sum(math.log((counts[t] + 1) / (train.num_tokens + v)) for t in valid.tokens.tolist()) / valid.num_tokens
    )
    assert report.valid_unigram_cross_entropy == pytest.approx(expected, rel=1e-12)
    shares = [c / train.num_tokens for c in counts.values()]
    assert train.meta["unigram_entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-12)
    assert report.valid_unigram_cross_entropy > report.train.unigram_entropy * 0.9


def test_split_is_stable_when_documents_are_added(tmp_path: Path) -> None:
    run(tmp_path, TEXTS)
    before = IndexedDataset(tmp_path / "out-valid").tokens.tolist()
    run(tmp_path, TEXTS + ["more text"] * 40, train_vocab_size=0, overwrite=True)
    assert IndexedDataset(tmp_path / "out-valid").tokens.tolist()[: len(before)] == before
    run(tmp_path, TEXTS, train_vocab_size=0, overwrite=True, seed=1)
    assert IndexedDataset(tmp_path / "out-valid").tokens.tolist() != before


def test_a_test_split_takes_documents_from_train_alone(tmp_path: Path) -> None:
    def texts_of(split: str) -> list[str]:
        tok, data = Tokenizer.load(tmp_path / "tok"), IndexedDataset(tmp_path / f"out-{split}")
        return [tok.decode(data[i][:-1]) for i in range(len(data))]

    run(tmp_path, TEXTS)
    train, valid = texts_of("train"), texts_of("valid")
    report = run(tmp_path, TEXTS, train_vocab_size=0, overwrite=True, test_fraction=0.3)
    test = texts_of("test")
    assert texts_of("valid") == valid and sorted(texts_of("train") + test) == sorted(train) and 15 < len(test) < 45
    assert report.test.documents == len(test) and report.test_unigram_cross_entropy > 0
    run(tmp_path, TEXTS, train_vocab_size=0, overwrite=True, test_fraction=0.3, valid_fraction=0.4)
    assert texts_of("test") == test and set(valid) < set(texts_of("valid"))  # a larger valid split takes none of test
    run(tmp_path, TEXTS, train_vocab_size=0, overwrite=True)
    assert not list(tmp_path.glob("out-test*"))
    with raises(ConfigError, "prepare.nothing-to-train-on", "--test-fraction = 0.5"):
        run(tmp_path, TEXTS, overwrite=True, test_fraction=0.5, valid_fraction=0.5)


@pytest.mark.parametrize("append_eod", [True, False])
def test_a_begin_token_before_every_document(tmp_path: Path, append_eod: bool) -> None:
    Tokenizer.train(iter(TEXTS), 300, special_tokens=("<|endoftext|>", "<s>", "<|start|>")).save(tmp_path / "tok")
    how = {"train_vocab_size": 0, "valid_fraction": 0.0, "prepend_bos": True, "append_eod": append_eod}
    report = run(tmp_path, TEXTS, **how)
    tok, data = Tokenizer.load(tmp_path / "tok"), IndexedDataset(tmp_path / "out-train")
    end = [tok.eod] * append_eod
    assert [data[i].tolist() for i in range(len(data))] == [[1, *tok.encode(text), *end] for text in TEXTS if text]
    assert (report.bos, report.eod) == (1, 0 if append_eod else None)
    assert data.meta["bos"] == 1 and data.meta["eod"] == report.eod
    config = tmp_path / "tok/tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "<|endoftext|>", "bos_token": {"content": "<|start|>"}}))
    run(tmp_path, TEXTS, overwrite=True, **how)
    assert IndexedDataset(tmp_path / "out-train")[0][0] == 2
    config.write_text(json.dumps({"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}))
    if append_eod:
        with raises(DataError, "prepare.bos-is-eod", tmp_path / "tok"):
            run(tmp_path, TEXTS, overwrite=True, **how)
    for bos_token in ({"bos_token": None}, {"bos_token": "<none>"}):
        config.write_text(json.dumps({"eos_token": "<|endoftext|>", **bos_token}))
        with raises(DataError, "tokenize.no-begin-token"):
            run(tmp_path, TEXTS, overwrite=True, **how)


def test_tokenizer_sees_train_documents_only(tmp_path: Path) -> None:
    run(tmp_path, TEXTS)
    tok = Tokenizer.load(tmp_path / "tok")
    train = IndexedDataset(tmp_path / "out-train")
    texts = [tok.decode(train[i][:-1]) for i in range(len(train))]
    assert Tokenizer.train(iter(texts), 300).digest == tok.digest != Tokenizer.train(iter(TEXTS), 300).digest


def test_nothing_is_overwritten_or_left_behind(tmp_path: Path) -> None:
    run(tmp_path, TEXTS)
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    with raises(DataError, "data.output-exists", "out-train.idx"):
        run(tmp_path, TEXTS, train_vocab_size=0)
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before
    report = run(tmp_path, TEXTS, overwrite=True, valid_fraction=0.0, append_eod=False)
    assert report.valid is None and report.valid_unigram_cross_entropy is None
    assert not list(tmp_path.glob("out-valid*")) and report.train.documents == len([t for t in TEXTS if t])
    assert Tokenizer.load(tmp_path / "tok").decode(IndexedDataset(tmp_path / "out-train")[0]) == TEXTS[1]


@pytest.mark.parametrize(
    ("texts", "code", "part"),
    [
        (["only one document"], "prepare.empty-split", "valid_fraction = 0.2"),
        ([""] * 9, "read.no-text", 9),
    ],
)
def test_a_split_without_documents_is_rejected(tmp_path: Path, texts: list[str], code: str, part: object) -> None:
    with raises(DataError, code, part):
        run(tmp_path, texts)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]  # no tokenizer either: the next call is not rejected


def test_bad_input_stops_cleanly(tmp_path: Path) -> None:
    with open(jsonl(tmp_path / "bad.jsonl", TEXTS), "a") as out:
        out.write('{"text": "torn')
    for size in (300, 0):
        Tokenizer.train(iter(TEXTS), 300).save(tmp_path / "have")
        where = tmp_path / ("tok" if size else "have")
        with raises(DataError, "read.document-refused", "bad.jsonl:121: malformed JSON"):
            prepare([tmp_path / "bad.jsonl"], str(tmp_path / "out"), tokenizer=where, train_vocab_size=size)
        assert sorted(p.name for p in tmp_path.iterdir()) == (["bad.jsonl", "have"])
    with raises(ConfigError, "prepare.fraction-out-of-range", "--valid-fraction = 1.0"):
        run(tmp_path, TEXTS, valid_fraction=1.0)
    (tmp_path / "empty").mkdir()
    with raises(DataError, "read.no-text", tmp_path / "empty"):
        prepare([tmp_path / "empty"], str(tmp_path / "out"), tokenizer=tmp_path / "have")


def test_preparing_starts_without_torch() -> None:
    program = "import sys, engine.data.prepare.run, engine.data.tokenize.train\n"
    program += "import engine.cli.prepare_console, engine.cli.main\n"
    done = subprocess.run([sys.executable, "-c", program + "assert 'torch' not in sys.modules"], timeout=60)
    assert done.returncode == 0


def test_no_documents_is_explained(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "tok")
    (tmp_path / "in").mkdir()

    def why(**options: Any) -> str:
        with pytest.raises(DataError) as raised:
            prepare([tmp_path / "in"], str(tmp_path / "out"), tokenizer=tmp_path / "tok", **options)
        assert not list(tmp_path.glob("out*"))
        return str(raised.value)

    assert why() == f"no text in {tmp_path}/in: 0 files were read."
    (tmp_path / "in/broken.jsonl").symlink_to("nowhere")
    (tmp_path / "in/empty.txt").touch()
    (tmp_path / "in/x.log").write_text("text")
    lines = why(exclude=("*.log",)).splitlines()
    assert lines[0] == (
        f"no text in {tmp_path}/in: 1 file was read (1 of 0 bytes), 1 file was not read, "
        f"1 name was excluded by --include and --exclude."
    )
    broken = f"  dropped: 1 broken link, the first: {tmp_path}/in/broken.jsonl: broken link: it points to nowhere"
    assert lines[1:] == [broken]
    (tmp_path / "in/a.jsonl").write_text('{"body": "x", "id": 1}\n\n' * 4)
    lines = why(exclude=("*.log", "empty*"), on_error="skip").splitlines()
    assert lines[0].startswith(f"no text in {tmp_path}/in: 1 file was read, 1 file was not read, 2 names were excluded")
    assert lines[1:] == [
        f"  dropped: 4 missing key, the first: {tmp_path}/in/a.jsonl:1: missing key: no key 'text'. "
        f"The keys here are: body, id; choose among them with --json-key.",
        f"  dropped: 4 blank line, the first: {tmp_path}/in/a.jsonl:2: blank line",
        broken,
    ]


def test_notes_are_in_the_report(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer.save(tmp_path / "tok")
    file = jsonl(tmp_path / "a.txt", TEXTS)
    notes: list[str] = []
    report = prepare([file, file], str(tmp_path / "out"), tokenizer=tmp_path / "tok", note=notes.append)
    assert report.noticed == {"read as JSON lines": 2, "read once more": 1} and report.documents_in == 2 * len(TEXTS)
    assert report.examples["read once more"] == [f"{file}: read once more: the same file as {file}"]
    assert notes == [f"note: {report.examples[kind][0]}" for kind in ("read as JSON lines", "read once more")]
    show_prepared(report)
    assert f"noticed: 2 read as JSON lines, the first: {file}: read as JSON lines: its" in capsys.readouterr().out
