"""`engine inspect`: its output is correct, and --verify finds errors that opening does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.samples.contents import count, decoded_samples, find_tokenizer, histogram, verify
from engine.data.samples.indexed import IndexedDataset
from engine.data.samples.indexed_writer import IndexedWriter
from engine.data.samples.order import SampleOrder
from engine.data.tokenize.tokenizer import Tokenizer
from engine.errors import DataError
from tests.support.command import exit_code
from tests.support.corpora import corpus
from tests.support.errors import raises

TEXTS = ["one short text", "another text, a little longer than that", "x", "ends here [not a mark] naïve"] * 30


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(TEXTS), 300)


@pytest.fixture
def prefix(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    tokenizer.save(tmp_path / "tokenizer")
    with IndexedWriter(tmp_path / "texts", tokenizer.vocab_size) as writer:
        for text in TEXTS:
            writer.add(np.array(tokenizer.encode(text)))
        writer.finish({"tokenizer_digest": tokenizer.digest, "text_bytes": sum(len(t.encode()) for t in TEXTS)})
    return tmp_path / "texts"


def run(*arguments: Any) -> int:
    return exit_code("inspect", *arguments)


def test_the_command(prefix: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "pictures/lengths.png"
    assert run(prefix, "--output", picture, "--verify", "--samples", 2, "--seq-len", 40) == 0
    out = capsys.readouterr().out
    data = IndexedDataset(prefix)
    assert f"120 documents, {data.num_tokens:,} tokens, {2 * data.num_tokens:,} bytes of uint16" in out
    assert out.count("verified: ") == 3 and "tokenizer_digest match the files" in out
    assert out.count("\nsample ") == 2 and "⟦document " in out and "[not a mark] naïve" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run(prefix, "--output", "x.jpg", "--samples", -1, "--seq-len", 0) == 2
    assert "configuration has 3 errors" in capsys.readouterr().err
    assert run(tmp_path / "none") == 1


def test_counts_and_histogram(tmp_path: Path) -> None:
    data = corpus(tmp_path / "c", [1, 1, 2, 3, 4, 7, 8, 100])
    c = count(data)
    assert (c.documents, c.tokens, c.shortest, c.median, c.longest, c.longest_document) == (8, 126, 1, 3, 100, 7)
    edges, documents, tokens = histogram(data)
    assert edges.tolist() == [0, 1, 2, 4, 8, 16, 32, 64, 128]
    assert documents.tolist() == [0, 2, 2, 2, 1, 0, 0, 1] and tokens.tolist() == [0, 2, 5, 11, 8, 0, 0, 100]
    with raises(DataError, "samples.corpus-empty", tmp_path / "e"):
        count(corpus(tmp_path / "e", []))


def test_the_parts_of_a_sample_are_its_tokens(tmp_path: Path) -> None:
    data = corpus(tmp_path / "c", [i % 5 for i in range(2700)])
    order = SampleOrder(data, 7, 5)
    for sample in (0, 1, 100, order.samples_per_epoch, 2 * order.samples_per_epoch - 1):
        parts = [data[document][offset : offset + length] for document, offset, length in order.parts(sample)]
        assert np.concatenate(parts).tolist() == order.gather(np.array([sample]))[0].tolist()


def test_samples_show_boundaries(prefix: Path, tokenizer: Tokenizer) -> None:
    data = IndexedDataset(prefix)
    (text,) = decoded_samples(data, tokenizer, 60, 1, 5)
    marks = text.count("⟦document ")
    assert marks >= 3 and " from token " in text
    sample = int(text.split()[1].rstrip(":"))
    assert [document for document, _, _ in SampleOrder(data, 60, 5).parts(sample)] == [
        int(part.split("⟧")[0].split()[0]) for part in text.split("⟦document ")[1:]
    ]


def test_the_tokenizer_is_found_beside_the_corpus(prefix: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert find_tokenizer(str(prefix), None) == tmp_path / "tokenizer"
    assert find_tokenizer(str(prefix), Path("given")) == Path("given")
    tokenizer.save(tmp_path / "texts-tokenizer")
    assert find_tokenizer(str(prefix), None) == tmp_path / "texts-tokenizer"
    assert find_tokenizer(str(tmp_path / "elsewhere/texts"), None) is None


def test_verify_finds_a_token_outside(prefix: Path) -> None:
    raw = bytearray(Path(f"{prefix}.bin").read_bytes())
    raw[20:22] = b"\xff\xff"
    Path(f"{prefix}.bin").write_bytes(raw)
    with raises(DataError, "samples.token-outside-vocabulary", "texts.bin: offset 20 (document ", "id 65535 ", "[0, "):
        verify(IndexedDataset(prefix), None)


def test_verify_finds_a_changed_token_and_another_tokenizer(prefix: Path, tokenizer: Tokenizer) -> None:
    assert len(verify(IndexedDataset(prefix), tokenizer)) == 3
    raw = bytearray(Path(f"{prefix}.bin").read_bytes())
    raw[20:22], raw[22:24] = b"\x00\x00", b"\x00\x00"
    Path(f"{prefix}.bin").write_bytes(raw)
    with raises(DataError, "samples.sidecar-differs", "unigram_entropy is "):
        verify(IndexedDataset(prefix), None)
    meta = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps({**meta, "tokenizer_digest": "other", "unigram_entropy": 0}))
    with raises(DataError, "samples.sidecar-differs", "unigram_entropy is 0, ", "tokenizer_digest is 'other'"):
        verify(IndexedDataset(prefix), tokenizer)
    Path(f"{prefix}.json").unlink()
    assert "the tokenizer and the digest of the tokens are unknown" in verify(IndexedDataset(prefix), tokenizer)[-1]
    assert "no token < 0" in verify(IndexedDataset(prefix), None)[1]
