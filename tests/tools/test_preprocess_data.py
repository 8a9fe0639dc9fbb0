"""tools/preprocess_data.py: Megatron's argument names and files, and an error or note for every difference."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tokenizers

from engine.data.samples.indexed import IndexedDataset
from engine.data.tokenize.tokenizer import Tokenizer
from engine.errors import ConfigError
from tests.support.paths import ROOT

# Of tools/preprocess_data.py and its tokenizer arguments (Megatron-LM 0.20), and of older ones.
OPTIONS = """
--input --json-keys --split-sentences --keep-newlines --append-eod --lang --output-prefix --workers
--find-optimal-num-workers --workers-to-check --max-documents --performance-dir --partitions --log-interval
--keep-sequential-samples --vocab-size --padded-vocab-size --no-pad-vocab-size --vocab-file --merge-file
--vocab-extra-ids --tokenizer-type --tokenizer-model --tokenizer-metadata --tokenizer-special-tokens
--tiktoken-pattern --tiktoken-num-special-tokens --tokenizer-sentencepiece-legacy --trust-remote-code
--tokenizer-sentencepiece-ignore-extra-whitespaces --tokenizer-hf-no-use-fast --null-tokenizer-eod-id
--tokenizer-hf-no-include-special-tokens --null-tokenizer-pad-id --chat-template --use-gigatoken
--dataset-impl --chunk-size --make-vocab-size-divisible-by --tiktoken-special-tokens
"""
TEXTS = [f"a text with the number {i} in it" for i in range(50)]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preprocess_data", ROOT / "tools/preprocess_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": text, "title": [text[:6], "x"]}) for text in TEXTS]
    (tmp_path / "in.json").write_text("\n".join(lines))
    Tokenizer.train(iter(TEXTS), 300).save(tmp_path / "tok")
    return tmp_path


def stored(prefix: Path) -> list[list[int]]:
    data = IndexedDataset(prefix)
    return [data[i].tolist() for i in range(len(data))]


def test_a_command_of_megatron_works_as_it_is(
    corpus: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--input", corpus / "in.json", "--output-prefix", corpus / "my", "--json-keys", "text", "title"]
    options += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", corpus / "tok", "--append-eod"]
    done = call(*options, "--workers", "1", "--partitions", "2", "--log-interval", "10", "--dataset-impl", "mmap")
    assert done.returncode == 0, done.stderr
    assert "note: --partitions has no effect here" in done.stdout
    chosen = Tokenizer.load(corpus / "tok")
    Tokenizer.train(iter(TEXTS), 300, special_tokens=("</s>", "<s>")).save(corpus / "bos")
    for key, texts in {"text": TEXTS, "title": [f"{text[:6]}\nx" for text in TEXTS]}.items():
        data = IndexedDataset(corpus / f"my_{key}_document", chosen.vocab_size)
        assert [list(data[i]) for i in range(len(data))] == [[*chosen.encode(text), chosen.eod] for text in texts]
    assert script.main([*map(str, options)]) == 1 and "so this work is done" in capsys.readouterr().err
    before = stored(corpus / "my_title_document")
    for path in corpus.glob("my_title_document*"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    assert script.main([*map(str, options), "--tokenizer-model", str(corpus / "bos")]) == 1, "another tokenizer"
    assert "already exists" in capsys.readouterr().err
    os.utime(corpus / "in.json", (later := time.time() + 60, later))
    assert script.main([*map(str, options)]) == 1, "the input has changed"
    os.utime(corpus / "in.json", (0, 0))
    assert script.main([*map(str, options)]) == 0, "an interrupted command goes on"
    assert "with the missing keys" in capsys.readouterr().out
    assert stored(corpus / "my_title_document") == before


def test_a_reader_that_leaves(corpus: Path) -> None:
    """As for other commands: silently, with exit code 141, after all files are written."""
    read, out = os.pipe()
    os.close(read)
    options = ["--input", corpus / "in.json", "--output-prefix", corpus / "my", "--tokenizer-model", corpus / "tok"]
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), *map(str, options)]
    done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, timeout=100)
    os.close(out)
    assert (done.returncode, done.stderr) == (141, b"") and (corpus / "my_text_document-report.json").exists()


def test_the_commands_of_the_readme(corpus: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2's and BERT's files under Megatron's names, and input of any name, read as JSON lines."""
    (corpus / "in.json").rename(corpus / "my-corpus.csv")  # with any name
    head = ["--input", str(corpus / "my-corpus.csv"), "--output-prefix", str(corpus / "my"), "--workers", "2"]
    made = Tokenizer.train(iter(TEXTS), 300)
    made.save(corpus / "tok")
    model = tokenizers.Tokenizer.from_file(str(corpus / "tok/tokenizer.json")).model
    model.save(str(corpus), "gpt2")
    gpt2 = ["--vocab-file", str(corpus / "gpt2-vocab.json"), "--merge-file", str(corpus / "gpt2-merges.txt")]
    assert script.main([*head, *gpt2, "--tokenizer-type", "GPT2BPETokenizer", "--append-eod"]) == 0
    assert stored(corpus / "my_text_document") == [[*made.encode(text), made.eod] for text in TEXTS]
    (corpus / "bert-vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "A", "text"]))
    bert = [*head, "--vocab-file", str(corpus / "bert-vocab.txt"), "--overwrite", "--tokenizer-type"]
    (corpus / "my-corpus.csv").write_text('{"text": "A text"}\n')
    for kind, ids in {"BertWordPieceLowerCase": [4, 6], "BertWordPieceCase": [5, 6]}.items():
        assert script.main([*bert, kind]) == 0 and stored(corpus / "my_text_document") == [ids]
    assert "without [CLS] and [SEP]" in capsys.readouterr().out


def test_a_begin_token_as_the_template_has_it(
    corpus: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Tokenizer.train(iter(TEXTS), 300, special_tokens=("</s>", "<s>", "[CLS]"))
    made.save(corpus / "tok")
    definition = json.loads((corpus / "tok/tokenizer.json").read_text())
    head = ["--input", str(corpus / "in.json"), "--output-prefix", str(corpus / "my"), "--overwrite"]
    head += ["--tokenizer-model", str(corpus / "tok"), "--tokenizer-type", "HuggingFaceTokenizer"]

    def first(template: str, *more: str) -> tuple[int, list[int]]:
        processor = tokenizers.processors.TemplateProcessing(template, None, [("<s>", 1), ("[CLS]", 2)])
        definition["post_processor"] = json.loads(processor.__getstate__())
        (corpus / "tok/tokenizer.json").write_text(json.dumps(definition))
        code = script.main([*head, *more])
        return code, stored(corpus / "my_text_document")[0] if not code else []

    ids = made.encode(TEXTS[0])
    assert first("$A") == (0, ids) and first("$A", "--prepend-bos") == (0, [1, *ids])
    assert first("<s> $A") == (0, [1, *ids]) and "(BOS), which Megatron stores" in capsys.readouterr().out
    assert first("<s> $A", "--tokenizer-hf-no-include-special-tokens") == (0, ids)
    assert first("[CLS] $A <s>") == (2, []) and "puts the tokens [2] before and [1] behind" in capsys.readouterr().err
    assert first("[CLS] $A") == (2, [])


def errors(script: ModuleType, *arguments: Any) -> dict[str, str]:
    """The error code of each option."""
    with pytest.raises(ConfigError) as error:
        script.parse([*map(str, arguments)])
    return {fault.path: fault.code for fault in error.value.errors}


def test_everything_refused_is_told_at_once(
    corpus: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--input", corpus / "in.json", "--output-prefix", corpus / "my", "--tokenizer-model", corpus / "tok"]
    more = ["--split-sentences", "--merge-file", "m.txt", "--append-eos", "--tokenizer-type", "GPT3BPETokenizer"]
    done = call(*options, *more, "--workers", "-1")
    assert done.returncode == 2 and "configuration has 4 errors" in done.stderr
    for text in ("--split-sentences", "Did you mean --append-eod?", "Did you mean GPT2BPETokenizer?", "below 0"):
        assert text in done.stderr
    assert not list(corpus.glob("my*"))
    assert script.main([*map(str, options[:4]), "--tokenizer-model", str(corpus / "none")]) == 1
    assert "none: no such file. Give" in capsys.readouterr().err
    assert set(errors(script)) == {"--input", "--output-prefix", "--tokenizer-model"}
    assert errors(script, *options, "--workers", "x") == {"arguments": "preprocess.bad-arguments"}
    null = errors(script, *options, "--tokenizer-type", "NullTokenizer")
    assert null == {"--tokenizer-type": "preprocess.unsupported-tokenizer-type"}
    assert set(errors(script, *options[:4], "--tokenizer-type", "GPT2BPETokenizer")) == {"--vocab-file"}
    once = errors(script, "--input", "-", *options[2:], "--json-keys", "a", "b")
    assert once == {"--json-keys": "preprocess.input-read-only-once"}
    here = corpus / "in.json"
    for wrong in (["--vocab-file", here], ["--merge-file", here], ["--tokenizer-type", "BertWordPieceCase"]):
        assert len(errors(script, *options, *wrong)) == 1
    gpt2 = [*options[:4], "--tokenizer-type", "GPT2BPETokenizer", "--vocab-file"]
    assert set(errors(script, *gpt2, here)) == {"--merge-file"}
    absent = errors(script, *gpt2, "gpt2-vocab.json", "--merge-file", "gpt2-merges.txt")
    assert absent == dict.fromkeys(("--vocab-file", "--merge-file"), "preprocess.no-such-file")


def test_every_option_of_megatron_is_taken_or_refused_by_name(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    options = OPTIONS.split()
    found = errors(script, *(f"{option}=1" for option in options if option in script.REFUSED))
    assert all(found[option] == "preprocess.unsupported-option" for option in options if option in script.REFUSED)
    taken = [option for option in options if option not in script.REFUSED]
    assert "arguments" not in errors(script, *taken[:1], "x", "--no-such-option")
    with pytest.raises(SystemExit):
        script.parse(["--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in taken), [option for option in taken if option not in text]
