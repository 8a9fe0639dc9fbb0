"""Training tokenizers: effect of the options, lossless decoding, and the end of training on signals and errors."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

import engine.data.tokenize.train as module
from engine.data.read.progress import ProgressEvent, StepEvent
from engine.data.tokenize.encoder import Encoder
from engine.data.tokenize.equivalence import EDGE_CASES
from engine.data.tokenize.recipe import Recipe
from engine.data.tokenize.tokenizer import Tokenizer
from engine.data.tokenize.train import TextSampler, save_atomically
from engine.data.tokenize.train_process import TrainProcess
from engine.errors import DataError
from tests.support.errors import raises
from tests.support.paths import ROOT
from tests.support.verbs import prepare, train_tokenizer

TEXTS = [page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))]


def chinese(count: int, seed: int = 0) -> list[str]:
    """Clauses of invented words without spaces, like Chinese, with some rare characters, digits and Latin."""
    draw = random.Random(seed)
    letters = [chr(0x4E00 + 7 * number) for number in range(900)]
    letter = lambda: letters[int(900 * draw.random() ** 2)]  # noqa: E731
    words = ["".join(letter() for _ in range(draw.choice([1, 2, 2, 3]))) for _ in range(1200)]
    word = lambda: words[int(1200 * draw.random() ** 3)]  # noqa: E731
    ends = ["，"] * 9 + ["。"] * 4 + ["１９９８年", " 2024 ", "GDP", "\U00020bb7"]
    return ["".join(word() + draw.choice(["", "", "", "", draw.choice(ends)]) for _ in range(60)) for _ in range(count)]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_trained_tokenizers(tmp_path: Path, kind: str) -> None:
    special = ("<eot>", "<pad>")
    train_tokenizer([ROOT / "docs"], tmp_path, Recipe(700, kind, special), include=["*.md"])
    chosen = Tokenizer.load(tmp_path)
    assert (chosen.eod, chosen.vocab_size, chosen.special_tokens[:2]) == (0, 700, special)
    assert not {0, 1} & set(chosen.encode("<eot> <pad>"))
    ids, lengths = Encoder(chosen).encode(["wörd ☕", "", "the"])
    if kind == "wordpiece":
        assert chosen.unknown == 2 and Encoder(chosen).unknown_bytes(["the ☕", "", "the"], ids, lengths).sum() > 0
        assert chosen.unknown_bytes("the ☕ ") == 3
    else:
        assert all(chosen.decode(chosen.encode(text)) == text for text in EDGE_CASES)
        assert all(chosen.unknown not in chosen.encode(text) for text in EDGE_CASES)
    with raises(DataError, "tokenize.output-exists", tmp_path / "tokenizer.json"):
        train_tokenizer([ROOT / "docs"], tmp_path, Recipe(700))


def test_training_by_command_and_its_errors(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "some words and some more"}\n{"text": 5}\n')
    command = [sys.executable, "-m", "engine", "tokenizer", "train", "--input", str(tmp_path / "a.jsonl")]
    command += ["--vocab-size", "270", "--output", str(tmp_path / "t"), "--json-key", "body", "--on-error", "skip"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0 and "dropped: 1 missing key" in done.stdout and "digest" in done.stdout, done.stderr
    with raises(DataError, "read.document-refused", "a.jsonl:2: missing key"):
        train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "u", Recipe(270), json_key=["body"])
    (tmp_path / "empty.txt").write_text("")
    with raises(DataError, "read.no-text", tmp_path / "empty.txt"):
        train_tokenizer([tmp_path / "empty.txt"], tmp_path / "u", Recipe(270))
    for size, options, words in (
        (257, {"special_tokens": ("a", "b")}, "need >= 258"),
        (300, {"special_tokens": ()}, "at least one"),
        (300, {"special_tokens": ("a", "a")}, "all different"),
        (300, {"kind": "word"}, "not one of bpe, unigram, wordpiece"),
    ):
        with raises(DataError, "tokenize.recipe-faults", words):
            Tokenizer.train(iter(TEXTS), size, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "u").exists()


def tokens_of(tokenizer: Tokenizer) -> list[str]:
    """The vocabulary's spellings, by id."""
    vocab = json.loads(tokenizer._definition)["model"]["vocab"]
    return [token for token, _ in vocab] if isinstance(vocab, list) else sorted(vocab, key=vocab.__getitem__)


def test_bpe_is_what_the_library_makes() -> None:
    texts = [*TEXTS[:9], *chinese(30)]
    plain = Library(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    plain.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        min_frequency=2,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    plain.train_from_iterator(iter(texts), trainer)
    assert Tokenizer.train(iter(texts), 900)._definition == plain.to_str()
    assert Tokenizer.train(iter(texts), 900, split_pattern="gpt2")._definition == plain.to_str()


def test_unigram_of_chinese_is_as_good_as_sentencepiece(tmp_path: Path) -> None:
    texts, unseen = chinese(400), chinese(60, seed=1)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = Recipe(2500, "unigram", ("<|endoftext|>", "<｜尾｜>"))
    trained = train_tokenizer([tmp_path / "in.jsonl"], tmp_path / "u", recipe)
    mine = trained.tokenizer
    model = io.BytesIO()
    settings: dict[str, Any] = {"byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 3}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=2500, model_type="unigram", **settings
    )
    original = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert sum(map(len, map(mine.encode, unseen))) < 1.02 * sum(map(len, map(original.encode, unseen)))
    # No text becomes a byte, unknown or special token because of its spelling, and none is split or lost.
    tricky = "<0x41><0x0A> <unk> <|endoftext|> <｜尾｜> <｜尾｜ ▁ ▅ ⁇ \ufffd \U0010ff01\U0010ff02 a\tb\0c\r\n\n  d"
    assert mine.decode(mine.encode(tricky)) == tricky and not {0, 1, mine.unknown} & set(mine.encode(tricky))
    assert mine.decode(mine.encode("<0x41>")) == "<0x41>" and len(mine.encode("<0x41>")) > 1
    assert any(token.startswith("<0x") for token in (mine._tokenizer.id_to_token(i) for i in mine.encode("𝄞")))
    assert all(mine.decode(mine.encode(text)) == text for text in (*unseen, *TEXTS, *EDGE_CASES))
    assert (
        Tokenizer.train(iter(texts), 2500, kind="unigram", special_tokens=recipe.special_tokens).digest == mine.digest
    )
    metadata = json.loads((tmp_path / "u" / "training.json").read_text())
    assert (metadata["kind"], metadata["documents"], metadata["character_coverage"]) == ("unigram", 400, 0.9995)
    assert metadata["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert {"reading", "finding pieces", "weighing pieces (EM)", "verifying"} <= set(trained.seconds)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    ("pattern", "digits", "longest"),
    [("", "individual", 1), ("", "triples", 3), ("qwen", "", 1), ("deepseek", "", 3), ("o200k", "individual", 1)],
)
def test_digits(kind: str, pattern: str, digits: str, longest: int) -> None:
    texts = ["in 1998 and 2024 and 19980101, 20240101 "] * 99
    made = Tokenizer.train(iter(texts), 600, kind=kind, split_pattern=pattern, digits=digits)
    runs = [run for token in tokens_of(made) if "<0x" not in token for run in re.findall("[0-9]+", token)]
    assert max(map(len, runs)) == longest
    assert "1998" in " ".join(tokens_of(Tokenizer.train(iter(texts), 600)))  # which would be a token otherwise
    assert all(made.decode(made.encode(text)) == text for text in (*texts[:2], *EDGE_CASES))
    if kind == "bpe" and pattern in ("qwen", "deepseek"):
        assert Encoder(made).name.startswith("gigatoken"), Encoder(made).note


def test_patterns_and_options_do_what_they_say() -> None:
    def train(texts: list[str], **options: Any) -> Tokenizer:
        return Tokenizer.train(iter(texts), 700, **options)

    for kind in ("bpe", "unigram"):  # a custom pattern: no token crosses a hyphen
        own = train(["ab-cd " * 50], kind=kind, split_pattern="[^-]+")
        assert not any("-" in token and len(token) > 1 for token in tokens_of(own)) and own.encode("ab-cd")
    mixed = ["中文GDP中文 " * 20, "中文。GDP" * 20]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    both = {"".join(piece for piece, _ in letters.pre_tokenize_str(text)) for text in ("文GDP", "GDP中")}
    assert any(part in token for part in both for token in tokens_of(train(mixed)))
    assert not any(part in token for part in both for token in tokens_of(train(mixed, split_pattern="deepseek")))
    for kind in ("bpe", "unigram", "wordpiece"):
        folded = train(["７．８％ ①"] * 9, kind=kind, normalizer="nfkc")
        assert folded.encode("７．８％") == folded.encode("7.8%") != []
        composed = train(["cafe\u0301 7７"] * 9, kind=kind, normalizer="nfc")
        assert composed.encode("cafe\u0301") == composed.encode("café")
        assert composed.encode("７") != composed.encode("7")
        marked = train(["go<think>go", "a<think>b"] * 9, kind=kind, user_tokens=("<think>", "<th"))
        ids = [marked.added_tokens["<think>"], marked.added_tokens["<th"]]
        assert marked.encode("x<think>y")[1] == ids[0] and ids[1] in marked.encode("x<thy")
        assert sorted(ids) == [marked.vocab_size - 2, marked.vocab_size - 1] and marked.special_tokens[0] not in ids
        assert not any("ink" in token or "go<" in token for token in tokens_of(marked))
    assert "%" in tokens_of(train(["７．８％"] * 9, kind="unigram", normalizer="nfkc"))  # training uses that form too
    odd = tokens_of(
        train(["if x:\n\ty ▁ \ufffd\n\n"] * 20, kind="unigram")
    )  # characters with a meaning in sentencepiece
    assert {*"\n\t▁\ufffd "} <= {*"".join(odd)} and any("\n\n" in token for token in odd)
    for kind in ("bpe", "wordpiece"):
        rare = ["once upon", "xyzzy xyzzy", *TEXTS[:2]]
        assert len(train(rare, kind=kind)._parsed["model"]["vocab"]) > 0
        assert "xyzzy" in " ".join(tokens_of(Tokenizer.train(iter(rare[:2]), 700, kind=kind)))
        assert "xyz" not in " ".join(tokens_of(Tokenizer.train(iter(rare[:2]), 700, kind=kind, min_frequency=3)))
    few = train(chinese(50), kind="unigram", character_coverage=0.5)
    many = Tokenizer.train(iter(chinese(50)), 1500, kind="unigram", character_coverage=1.0)
    seen = Counter("".join(chinese(50)))
    singles = [sum(seen[token] for token in set(tokens_of(made)) if len(token) == 1) for made in (few, many)]
    assert 0.5 <= singles[0] / seen.total() < 0.56 and singles[1] == seen.total()
    for kind, longest in (("bpe", 3), ("unigram", 3)):
        short = train(TEXTS[:3], kind=kind, max_token_length=longest)
        lengths = Counter(len(t) for t in tokens_of(short) if not t.startswith(("<|end", "<0x", "<unk>")))
        assert max(lengths) == 3 and lengths[3] > 20
    least = next(n for n in range(258, 400) if not list(Recipe(n, "unigram").errors()))
    for size in (least + 1, least + 9, 400):  # few pieces: mostly bytes
        small = Tokenizer.train(iter(["中文测试文字"] * 9), size, kind="unigram")
        assert small.vocab_size <= size and small.decode(small.encode("中文测试")) == "中文测试"
    piece = train(["字母很多的一句话，" + chr(0x4E00 + n) for n in range(99)], kind="wordpiece", limit_alphabet=9)
    assert piece.vocab_size < 40
    with raises(DataError, "tokenize.alphabet-too-large", "--limit-alphabet"):
        train(chinese(50), kind="wordpiece")
    with raises(DataError, "tokenize.alphabet-too-large", "vocab_size = "):
        train(chinese(50), kind="unigram", character_coverage=1.0)


REFUSED = (
    ("bpe", {"character_coverage": 0.99}, "256"),
    ("bpe", {"limit_alphabet": 99}, "256"),
    ("bpe", {"max_token_length": 1}, "nothing to train"),
    ("unigram", {"min_frequency": 3}, "likelihood"),
    ("unigram", {"limit_alphabet": 99}, "--character-coverage"),
    ("unigram", {"max_token_length": 1000}, "above 512"),
    ("unigram", {"character_coverage": 1.5}, "not a share"),
    ("wordpiece", {"split_pattern": "qwen"}, "BERT"),
    ("wordpiece", {"digits": "triples"}, "BERT"),
    ("wordpiece", {"character_coverage": 0.9}, "--limit-alphabet"),
    ("wordpiece", {"max_token_length": 9}, "no such limit"),
    ("bpe", {"split_pattern": "("}, "not a regular expression"),
    ("bpe", {"split_pattern": "a|b", "digits": "triples"}, "Write it into the pattern"),
    ("bpe", {"digits": "two"}, "not one of individual, triples"),
    ("bpe", {"normalizer": "nfd"}, "not one of none, nfc, nfkc"),
    ("bpe", {"min_frequency": 0}, "below 1"),
    ("bpe", {"user_tokens": ("<|endoftext|>",)}, "none special"),
    ("unigram", {"special_tokens": ("a", "a")}, "all different"),
    ("word", {}, "not one of bpe, unigram, wordpiece"),
)


@pytest.mark.parametrize(("kind", "options", "words"), REFUSED)
def test_options_that_would_do_nothing_are_rejected(kind: str, options: dict[str, Any], words: str) -> None:
    assert any(words in str(error) for error in Recipe(999, kind, **options).errors())
    with raises(DataError, "tokenize.recipe-faults", words):
        Tokenizer.train(iter(TEXTS), 999, kind=kind, **options)


def test_a_part_of_the_text_is_taken_evenly(tmp_path: Path) -> None:
    texts = [f"{number:03} " + "x" * (number % 90) for number in range(1000)]
    stored = [len(text) + 1 for text in texts]
    for most in (1, 700, 9_000, 40_000, 10**9):
        sampler, taken, consumed = TextSampler(most, sum(stored)), list[str](), 0
        for first in range(0, 1000, 37):
            consumed += sum(stored[first : first + 37])
            taken += sampler.take(texts[first : first + 37], consumed)
        size = sum(map(len, taken))
        assert (sampler.text_bytes, sampler.documents) == (size, len(taken))
        assert taken == texts if most > 10**6 else most <= size < most + 100
        if most == 9_000:  # a tenth of the selection from each tenth of the input
            places = Counter(int(text[:3]) // 100 for text in taken)
            assert min(places.values()) >= 12 and len(places) == 10
    first = TextSampler(700, 0)  # standard input, of unknown size
    assert [*first.take(texts[:9], 0), *first.take(texts[9:], 0)] == texts[:35] and first.is_full
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    events: list[ProgressEvent | StepEvent] = []
    more = {"max_bytes": 9_000, "progress": events.append}
    trained = train_tokenizer([tmp_path / "in.jsonl"], tmp_path / "t", Recipe(300), **more)
    assert 9_000 <= trained.text_bytes < 9_100 and trained.documents < 300
    prepared = {"tokenizer": tmp_path / "p" / "tok", "train_vocab_size": 300, "train_bytes": 9_000}
    prepare([tmp_path / "in.jsonl"], f"{tmp_path}/p/out", **prepared)
    assert Tokenizer.load(tmp_path / "p" / "tok").digest == trained.tokenizer.digest
    assert isinstance(events[0], ProgressEvent) and "verifying" in {e.step for e in events if isinstance(e, StepEvent)}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def busy_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start_long(folder: Path, how: str) -> tuple[subprocess.Popen[str], int]:
    """A training run of a minute that has read its texts, and its subprocess."""
    draw = random.Random(0)
    letters = [chr(0x4E00 + number) for number in range(3000)]
    lines = ("".join(draw.choices(letters, k=70)) + "\n" for _ in range(20_000))
    (folder / "in.txt").write_text("".join(lines))
    command = [sys.executable, "-m", "engine", "tokenizer", "train", "--kind", how, "--vocab-size", "30000"]
    if how == "prepare":
        command = [sys.executable, "-m", "engine", "prepare", "--tokenizer", str(folder / "tokenizer")]
        command += ["--train-vocab-size", "30000"]
    command += ["--input", str(folder / "in.txt"), "--output", str(folder / "out")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    deadline = time.monotonic() + 60
    while not (found := children(process.pid)) or busy_s(found[0]) < 1.0:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process, found[0]


def gone(pid: int, within: float = 5.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


ENDINGS = [
    ("bpe", signal.SIGINT),
    ("prepare", signal.SIGTERM),
    pytest.param("unigram", signal.SIGTERM, marks=pytest.mark.heavy),
    pytest.param("prepare", signal.SIGHUP, marks=pytest.mark.heavy),
]


@pytest.mark.parametrize(("how", "number"), ENDINGS)
def test_a_signal_ends_training_at_once(tmp_path: Path, how: str, number: signal.Signals) -> None:
    process, child = start_long(tmp_path, how)
    began = time.monotonic()
    process.send_signal(number)
    _, message = process.communicate(timeout=30)
    assert time.monotonic() - began < 5 and process.returncode == 128 + number and gone(child)
    assert "Traceback" not in message and "nothing is written" in message and "same command" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt"]


def test_a_training_that_is_killed_is_reported() -> None:
    with TrainProcess(Recipe(300), None) as apart:
        apart._process.kill()
        with raises(DataError, "tokenize.training-failed", "signal 9", "--max-bytes"):
            apart.send(["some text " * 9] * 9)
            apart.finish()


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_ends_with_the_verb_that_is_killed(tmp_path: Path, kind: str) -> None:
    process, child = start_long(tmp_path, kind)
    process.kill()
    process.communicate(timeout=30)
    assert gone(child) and sorted(path.name for path in tmp_path.iterdir()) == ["in.txt"]


def test_a_tokenizer_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (Tokenizer.train(iter([word * 9]), 300) for word in ("old words ", "new words "))
    save_atomically(old, tmp_path / "t")
    before = {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()}

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    replace, calls = os.replace, list[Path]()

    def fails_late(source: Path, target: Path) -> None:
        calls.append(target)
        fails() if len(calls) == 3 else replace(source, target)

    with monkeypatch.context() as patch, raises(DataError, "tokenize.not-writable", "No space left"):
        patch.setattr(module.os, "replace", fails_late)
        save_atomically(new, tmp_path / "u")
    assert not (tmp_path / "u" / "tokenizer.json").exists()  # tokenizer.json is written last
    shutil.rmtree(tmp_path / "u")
    for place, name in ((module.os, "replace"), (Tokenizer, "save_definition")):
        with monkeypatch.context() as patch, raises(DataError, "tokenize.not-writable", "No space left"):
            patch.setattr(place, name, fails)
            save_atomically(new, tmp_path / "t")
        assert {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["t"]
    save_atomically(new, tmp_path / "t")
    assert Tokenizer.load(tmp_path / "t").digest == new.digest
    with monkeypatch.context() as patch, raises(DataError, "tokenize.sentencepiece-missing", "trident-engine[formats]"):
        patch.setitem(sys.modules, "sentencepiece", None)
        train_tokenizer([tmp_path / "t"], tmp_path / "u", Recipe(400, "unigram"))
    (tmp_path / "file").write_text("")
    with raises(DataError, "tokenize.not-writable", tmp_path / "file" / "t"):
        train_tokenizer([tmp_path / "file"], tmp_path / "file" / "t", Recipe(300))
