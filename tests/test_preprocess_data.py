"""tools/preprocess_data.py: Megatron's argument names, Megatron's files, and a word on everything that differs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.data.indexed import IndexedDataset
from engine.data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [f"a text with the number {i} in it" for i in range(50)]


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": text, "title": [text[:6], "x"]}) for text in TEXTS]
    (tmp_path / "in.json").write_text("\n".join(lines))
    Tokenizer.train(iter(TEXTS), 300).save(tmp_path / "tok")
    return tmp_path


def test_a_command_of_megatron_works_as_it_is(corpus: Path) -> None:
    options = ["--input", corpus / "in.json", "--output-prefix", corpus / "my", "--json-keys", "text", "title"]
    options += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", corpus / "tok", "--append-eod"]
    done = call(*options, "--workers", "1", "--partitions", "2", "--log-interval", "10")
    assert done.returncode == 0, done.stderr
    assert "note: --partitions has no meaning here" in done.stdout
    chosen = Tokenizer.load(corpus / "tok")
    for key, texts in {"text": TEXTS, "title": [f"{text[:6]}\nx" for text in TEXTS]}.items():
        data = IndexedDataset(corpus / f"my_{key}_document", chosen.vocab_size)
        assert [list(data[i]) for i in range(len(data))] == [[*chosen.encode(text), chosen.eod] for text in texts]
    again = call(*options)
    assert again.returncode == 1 and "so this is done" in again.stderr
    plain = call(*options[:4], "--tokenizer-model", corpus / "tok", "--overwrite")
    assert plain.returncode == 0, plain.stderr
    data = IndexedDataset(corpus / "my_text_document")
    assert list(data[0]) == chosen.encode(TEXTS[0])  # without --append-eod there is none, as with Megatron


def test_everything_refused_is_told_at_once(corpus: Path) -> None:
    options = ["--input", corpus / "in.json", "--output-prefix", corpus / "my", "--tokenizer-model", corpus / "tok"]
    more = ["--split-sentences", "--merge-file", "m.txt", "--append-eos", "--tokenizer-type", "GPT2BPETokenizer"]
    done = call(*options, *more, "--workers", "-1")
    assert done.returncode == 2 and "configuration has 5 faults" in done.stderr
    for text in ("--split-sentences", "--merge-file", "Did you mean --append-eod?", "is none of Hugging", "below 0"):
        assert text in done.stderr
    assert not list(corpus.glob("my*"))
    missing = call(*options[:4], "--tokenizer-model", corpus / "none")
    assert missing.returncode == 1 and "none: no such file. Give tokenizer.json" in missing.stderr
