"""`engine merge-datasets`: bytes equal to Megatron-LM's merge_datasets.py, correct sidecars, never half an output.

`megatron` builds the expected .idx from the format description with struct only. It was compared with the script itself
(commit d98e8a64) on multimodal and plain corpora with empty and multi-sequence documents: equal bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.cli.main import main
from engine.data.prepare.merge import find_corpora, merge
from engine.data.samples.contents import verify
from engine.data.samples.indexed import IndexedDataset
from engine.data.tokenize.tokenizer import Tokenizer
from engine.errors import DataError
from engine.util.signals import Interrupts, Stopped
from tests.support.errors import raises
from tests.support.verbs import prepare

Documents = Sequence[Sequence[Sequence[int]]]  # documents of sequences of tokens
CORPORA: dict[str, Documents] = {
    "a": [[[1, 2, 3]], [], [[4], [5, 6]]],
    "a-b": [[[9] * 7]],
    "B": [],
    "c.d": [[[8], [7, 7]], [[60000]]],
}


def megatron(prefix: Path, documents: Documents, code: int = 8, modes: bool = False) -> None:
    """Write documents in Megatron's format: uint16 for code 8, int32 for code 4."""
    letter, size = ("H", 2) if code == 8 else ("i", 4)
    sequences = [sequence for document in documents for sequence in document]
    bounds = [0]
    for document in documents:
        bounds.append(bounds[-1] + len(document))
    pointers = [sum(map(len, sequences[:i])) * size for i in range(len(sequences))]
    idx = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds))
    idx += b"".join(struct.pack("<i", len(sequence)) for sequence in sequences)
    idx += b"".join(struct.pack("<q", pointer) for pointer in pointers) + struct.pack(f"<{len(bounds)}q", *bounds)
    idx += b"\1" * len(sequences) if modes else b""
    Path(f"{prefix}.idx").write_bytes(idx)
    flat = [token for sequence in sequences for token in sequence]
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(flat)}{letter}", *flat))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name, documents in CORPORA.items():
        megatron(tmp_path / "in" / name, documents)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("modes", [False, True])
@pytest.mark.parametrize("code", [8, 4])
def test_the_bytes_are_megatrons_in_its_order(tmp_path: Path, code: int, modes: bool) -> None:
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/notes.txt").write_text("is no corpus")
    for name, documents in CORPORA.items():
        megatron(tmp_path / "in" / name, documents, code, modes)
    megatron(tmp_path / "want", [d for name in ("B", "a", "a-b", "c.d") for d in CORPORA[name]], code, modes)
    report = merge([str(tmp_path / "in")], str(tmp_path / "out"), multimodal=modes)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"want{suffix}").read_bytes()
    assert (report.sequences, report.documents, report.tokens) == (7, 6, 17)
    assert not (tmp_path / "out.json").exists() and "have no sidecar" in report.why_no_sidecar
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.bin", "out.idx", "want.bin", "want.idx"]


def test_prefixes_keep_the_order_they_are_given_in(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder / name) for name in ("in/c.d.idx", "in/a")]
    with pytest.raises(SystemExit) as end:
        main(["merge-datasets", "--input", *arguments, "--output-prefix", str(folder / "out"), "--json"])
    assert not end.value.code and json.loads(capsys.readouterr().out)["tokens"] == 10
    megatron(folder / "want", [*CORPORA["c.d"], *CORPORA["a"]])
    assert (folder / "out.idx").read_bytes() == (folder / "want.idx").read_bytes()
    assert find_corpora([str(folder / "in/a*")]) == [str(folder / "in/a"), str(folder / "in/a-b")]


def prepared(folder: Path, name: str, texts: Sequence[str], **how: Any) -> str:
    if not (folder / "tok").exists():
        Tokenizer.train(iter(["some words to train on"] * 9), 300, special_tokens=("</s>", "<s>")).save(folder / "tok")
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([folder / f"{name}.jsonl"], str(folder / name), tokenizer=folder / "tok", **how)
    return str(folder / f"{name}-train")


def test_the_sidecar_is_that_of_the_whole_text(tmp_path: Path) -> None:
    texts = [f"words {i} to train" * (i % 3) for i in range(20)]
    parts = [prepared(tmp_path, "one", texts[:7]), prepared(tmp_path, "two", texts[7:])]
    whole = prepared(tmp_path, "whole", texts)
    merge(parts, str(tmp_path / "out"))
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"out{suffix}").read_bytes() == Path(f"{whole}{suffix}").read_bytes()
    assert len(verify(IndexedDataset(tmp_path / "out"), Tokenizer.load(tmp_path / "tok"))) == 3


def test_incompatible_corpora_are_rejected_and_leave_no_files(folder: Path) -> None:
    megatron(folder / "wide", [[[1]]], code=4)
    megatron(folder / "seen", [[[1]]], modes=True)
    (folder / "half.bin").write_bytes(b"")
    one, bos = prepared(folder, "one", ["words"]), prepared(folder, "bos", ["words"], prepend_bos=True)
    a, before = str(folder / "in/a"), files(folder)
    cases: list[tuple[list[str], str, str]] = [
        ([a, str(folder / "wide")], "prepare.token-sizes-differ", "wide has int32 tokens"),
        ([a, str(folder / "seen")], "prepare.multimodal-not-asked", "seen.idx"),
        ([a, f"{folder}/in/../in/a"], "prepare.corpus-twice", "in/../in/a"),
        ([str(folder)], "prepare.half-a-corpus", "half.bin"),
        ([str(folder / "none")], "samples.corpus-not-found", "none.idx"),
        ([one, bos], "prepare.corpora-differ", "bos None"),
    ]
    for inputs, code, part in cases:
        with raises(DataError, code, part):
            merge(inputs, str(folder / "out"))
    with raises(DataError, "prepare.not-multimodal", "a.idx"):
        merge([a], str(folder / "out"), multimodal=True)
    with raises(DataError, "prepare.output-is-a-corpus", a):
        merge([a, str(folder / "seen")], a, overwrite=True, multimodal=True)
    assert files(folder) == before


def test_damage_in_a_corpus_is_found_while_it_is_copied(tmp_path: Path) -> None:
    parts = [prepared(tmp_path, name, ["words to", "train on"]) for name in ("one", "two")]
    raw = bytearray(Path(f"{parts[1]}.bin").read_bytes())
    for value, code in ((raw[0] ^ 1, "prepare.corpus-damaged"), (0xFF, "samples.token-outside-vocabulary")):
        raw[:2] = bytes([value, 0xFF if value == 0xFF else 0])
        Path(f"{parts[1]}.bin").write_bytes(raw)
        with raises(DataError, code, f"{parts[1]}.bin"):
            merge(parts, str(tmp_path / "out"))
        assert not list(tmp_path.glob("out*"))


def test_a_kill_never_leaves_half_an_output(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge([str(folder / "in/a-b")], str(folder / "out"))
    old = files(folder)
    real, calls = os.replace, [0]
    for at in range(1, 4):  # publish.json, .bin, .idx
        shutil.rmtree(folder / "out.merging", ignore_errors=True)
        calls[0] = 0

        def killed(*arguments: Any, at: int = at) -> None:
            calls[0] += 1
            if calls[0] == at:
                raise KeyboardInterrupt
            real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                merge([str(folder / "in")], str(folder / "out"), overwrite=True)
        if at == 1:
            assert files(folder) == old
            with raises(DataError, "data.output-exists", "out.idx"):
                merge([str(folder / "in")], str(folder / "out"))
        merge([str(folder / "in")], str(folder / "out"), overwrite=at == 1)  # resumes with complete files
        megatron(folder / "want", [d for name in ("B", "a", "a-b", "c.d") for d in CORPORA[name]])
        for suffix in (".bin", ".idx"):
            assert (folder / f"out{suffix}").read_bytes() == (folder / f"want{suffix}").read_bytes()


def test_a_signal_during_publishing_is_handled_after_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, stop = os.replace, Interrupts(listen=False)

    def interrupted(*arguments: Any) -> None:
        if str(arguments[1]).endswith("out.bin"):
            stop.signal = signal.SIGTERM
        real(*arguments)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(Stopped):
        merge([str(folder / "in")], str(folder / "out"), stop=stop)
    assert stop.resume_hint() == f"{folder}/out is complete" and len(IndexedDataset(folder / "out")) == 7


def test_too_little_space_is_reported_before_any_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 100))  # type: ignore[attr-defined]
    with raises(DataError, "prepare.disk-too-small", "100"):
        merge([str(folder / "in")], str(folder / "out"))
    assert not list(folder.glob("out*"))
