"""`prepare` killed at any point resumes to the same bytes; damage, other settings and a full disk are reported."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

import engine.data.prepare.flow as module
from engine.data.prepare import shards
from engine.data.prepare.report import PrepareReport
from engine.data.read import document_source
from engine.data.samples.indexed import IndexedDataset
from engine.data.tokenize.encoder import Encoder
from engine.data.tokenize.tokenizer import Tokenizer
from engine.errors import DataError
from tests.support.cases import same_bytes
from tests.support.errors import raises
from tests.support.paths import ROOT
from tests.support.verbs import prepare

TEXTS = [f"def function_{i}(a, b):\n    return a * {i} + b  # line {i % 7} of ünïcode\n" * (i % 4) for i in range(300)]


class Killed(BaseException):
    """Simulates SIGKILL: the engine must not catch it."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(iter(TEXTS), 400).save(folder)
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 3000)
    monkeypatch.setattr(document_source, "_BATCH_DOCUMENTS", 40)
    monkeypatch.setattr(document_source, "_BLOCK_BYTES", 2000)


def corpus(folder: Path, texts: list[str] = TEXTS) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(folder: Path, tokenizer: Path, **options: Any) -> PrepareReport:
    options = {"valid_fraction": 0.2, "tokenizer": tokenizer, "on_error": "skip", **options}
    return prepare([folder / "in.jsonl"], str(folder / "out"), **options)


def outputs(folder: Path) -> dict[str, bytes]:
    """Content of every written file by name, the report without its times and paths."""
    found = {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.glob("out*/*")) + sorted(folder.glob("out*.*"))
        if p.is_file()
    }
    report = json.loads(found.pop("out-report.json").replace(str(folder).encode(), b""))
    return {**found, "report": json.dumps({**report, "elapsed_s": 0, "tokenizer": ""}).encode()} | {
        name: data.replace(str(folder).encode(), b"") for name, data in found.items() if "skipped" in name
    }


def killing(monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
    """Raise Killed at the `at`-th call that changes the disk: before the change if `at` is odd, after it if even."""
    calls = [0]

    def hooked(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == at and at % 2:
                raise Killed
            result = real(*args, **kwargs)
            if calls[0] == at:
                raise Killed
            return result

        return call

    for name in ("replace", "fsync", "truncate", "unlink", "mkdir", "rmdir", "rename"):
        monkeypatch.setattr(os, name, hooked(getattr(os, name)))
    return calls


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_source, "_BATCH_DOCUMENTS", 40)
        corpus(folder, [*TEXTS[:90], "BAD", *TEXTS[90:]])
        spoil(folder)
        run(folder, tokenizer)
    return outputs(folder)


def spoil(folder: Path) -> None:
    path = folder / "in.jsonl"
    path.write_text(path.read_text().replace('{"text": "BAD"}', '{"text": 5}'))


@pytest.mark.timeout(400)
def test_killed_at_every_change_of_the_disk(
    tmp_path: Path, tokenizer: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    at, resumed = 1, 0
    while True:
        folder = tmp_path / str(at)
        corpus(folder, [*TEXTS[:90], "BAD", *TEXTS[90:]])
        spoil(folder)
        with monkeypatch.context() as patch:
            calls = killing(patch, at)
            with contextlib.suppress(Killed):
                run(folder, tokenizer)
        if calls[0] < at:
            break
        notes: list[str] = []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # a kill damages nothing, so no shard may be made again
                run(folder, tokenizer, note=notes.append)
        except DataError as err:
            assert err.code == "data.output-exists"  # killed after the last rename
        resumed += bool(notes)
        assert outputs(folder) == undisturbed, at
        assert not (folder / "out.parts").exists(), at
        at += 1 if at < 12 else 3  # all kinds of calls, both parities, in an acceptable time
    assert at > 40 and resumed > 5


def test_killed_with_the_tokenizer_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus(tmp_path)
    for at in (3, 9, 20, 31):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killing(patch, at)
            run(tmp_path, tmp_path / "new", train_vocab_size=300)
    run(tmp_path, tmp_path / "new", train_vocab_size=300)
    corpus(tmp_path / "other")
    run(tmp_path / "other", tmp_path / "other/new", train_vocab_size=300)
    for name in ("out-train.bin", "out-valid.idx", "new/tokenizer.json", "out-tokenizer/tokenizer.json"):
        same_bytes(tmp_path / name, tmp_path / "other" / name)


PROGRAM = """
import os, sys, threading, time
from engine.data.prepare import flow, shards
from engine.data.read import document_source
flow.SHARD_BYTES, document_source._BATCH_DOCUMENTS, document_source._BLOCK_BYTES = 20000, 100, 5000
delay, real = float(sys.argv.pop(1)), shards.Shards.commit
def commit(self, state):
    real(self, state)
    if delay and self.num_shards == 3:
        threading.Timer(delay, os.kill, (os.getpid(), 9)).start()
    if delay and self.num_shards == 20:
        time.sleep(60)  # a slow machine: the signal will still come
shards.Shards.commit = commit
import engine.cli.main
engine.cli.main.main(["prepare", *sys.argv[1:]])
"""


@pytest.mark.timeout(400)
def test_sigkill_of_the_command(tmp_path: Path, tokenizer: Path) -> None:
    corpus(tmp_path, TEXTS * 40)
    options = ["--input", tmp_path / "in.jsonl", "--tokenizer", tokenizer, "--output", tmp_path / "out"]
    for delay, code in ((0.01, -signal.SIGKILL), (0, 0)):
        command = [sys.executable, "-c", PROGRAM, str(delay), *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
        assert done.returncode == code, done.stderr
    assert "resuming " in done.stdout
    prepare([tmp_path / "in.jsonl"], str(tmp_path / "whole"), tokenizer=tokenizer)
    for suffix in ("bin", "idx", "json"):
        same_bytes(tmp_path / f"out-train.{suffix}", tmp_path / f"whole-train.{suffix}")


def begun(folder: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, at: int = 42, **options: Any) -> Path:
    """Kill a run after a few shards; returns its parts folder."""
    corpus(folder)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killing(patch, at)
        run(folder, tokenizer, **options)
    assert len(list((folder / "out.parts").glob("0*.json"))) >= 3
    return folder / "out.parts"


def whole(folder: Path, tokenizer: Path) -> dict[str, bytes]:
    corpus(folder / "whole")
    run(folder / "whole", tokenizer)
    return outputs(folder / "whole")


@pytest.mark.parametrize("damage", ["bin", "lengths", "shorter", "shard", "no shard", "longer"])
def test_damaged_parts_are_made_again(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, damage: str, recwarn: pytest.WarningsRecorder
) -> None:
    folder = begun(tmp_path, tokenizer, monkeypatch)
    path = folder / {"lengths": "train.lengths", "shard": "00000002.json", "no shard": "00000002.json"}.get(
        damage, "train.bin"
    )
    data = path.read_bytes()
    if damage == "no shard":
        path.unlink()
    elif damage in ("bin", "lengths"):
        path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    else:
        path.write_bytes(data + b"torn" if damage == "longer" else data[:100])
    run(tmp_path, tokenizer)
    reported = [str(warning.message) for warning in recwarn if "made again" in str(warning.message)]
    assert bool(reported) == (damage != "longer"), reported
    assert outputs(tmp_path) == whole(tmp_path, tokenizer)


def test_other_settings_or_inputs_are_rejected_with_the_difference(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(tmp_path, tokenizer, monkeypatch)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with raises(DataError, "data.work-of-another-call", "append_eod: was True, now False\n  seed: was 0, now 7\n"):
        run(tmp_path, tokenizer, append_eod=False, seed=7)
    Tokenizer.train(iter(TEXTS), 300).save(tmp_path / "another")
    with raises(DataError, "data.work-of-another-call", "tokenizer: digest: was ", ", now "):
        run(tmp_path, tmp_path / "another")
    os.utime(tmp_path / "in.jsonl", ns=(0, 0))
    with raises(
        DataError,
        "data.work-of-another-call",
        f"input removed: {tmp_path}/in.jsonl",
        f"input added: {tmp_path}/in.jsonl",
    ):
        run(tmp_path, tokenizer)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    run(tmp_path, tokenizer, overwrite=True)
    assert outputs(tmp_path) == whole(tmp_path, tokenizer)
    with raises(DataError, "data.output-exists", "out-train.bin"):
        run(tmp_path, tokenizer)


def test_two_commands_at_once_are_rejected(tmp_path: Path, tokenizer: Path) -> None:
    corpus(tmp_path)
    with (
        shards.Shards(tmp_path / "out.parts", ["train"]),
        raises(DataError, "data.work-folder-locked", "out.parts", os.getpid()),
    ):
        run(tmp_path, tokenizer)


@pytest.mark.parametrize("wrong", [-1, 400, 2**31 - 1])
def test_ids_outside_the_vocabulary_are_rejected(tmp_path: Path, wrong: int) -> None:
    with shards.Shards(tmp_path / "p", ["train"]) as folder:
        folder.start({})
        folder.open(400)
        folder.add("train", np.array([0, 399], np.int32), np.array([2], np.int32))
        with raises(DataError, "prepare.id-outside-the-vocabulary", wrong, "[0, 400)"):
            folder.add("train", np.array([1, wrong], np.int32), np.array([2], np.int32))


def test_a_full_disk_is_reported_and_resumed_from(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus(tmp_path)

    def full(self: Any, data: memoryview, limit: list[int] = [9000]) -> None:  # noqa: B006  (shared on purpose)
        limit[0] -= len(data)
        if limit[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, data)

    real = shards._DataFile.write
    with monkeypatch.context() as patch:
        patch.setattr(shards._DataFile, "write", full)
        with raises(DataError, "data.disk-full", "out.parts/") as raised:
            run(tmp_path, tokenizer)
    assert re.search(r"about [1-9][\d,]* .*, [1-9][\d,]* ", str(raised.value))  # bytes needed, and bytes free
    notes: list[str] = []
    run(tmp_path, tokenizer, note=notes.append)
    assert "resuming " in notes[0] and outputs(tmp_path) == whole(tmp_path, tokenizer)


def test_skip_resumes_where_stop_stopped(tmp_path: Path, tokenizer: Path) -> None:
    corpus(tmp_path, [*TEXTS, "BAD", *TEXTS])
    spoil(tmp_path)
    for _ in range(2):
        with raises(DataError, "read.document-refused", "in.jsonl:301: wrong type: 'text' is int"):
            run(tmp_path, tokenizer, on_error="stop")
    notes: list[str] = []
    report = run(tmp_path, tokenizer, note=notes.append)
    assert "resuming " in notes[0] and report.dropped == {"wrong type": 1}
    assert (
        report.documents_in
        == 600
        == sum(split.documents + split.empty_documents for split in (report.train, report.valid) if split)
    )
    (line,) = map(json.loads, (tmp_path / "out-skipped.jsonl").read_text().splitlines())
    assert (line["record"], line["reason"]) == (301, "wrong type") and line["file"].endswith("in.jsonl")


@pytest.fixture
def wrong_ids(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Make gigatoken return wrong ids from the ninth batch on."""
    calls, real = [0], Encoder._encode_fast

    def wrong(self: Encoder, texts: list[str]) -> Any:
        ids, lengths = real(self, texts)
        calls[0] += 1
        return (np.roll(ids, 1) if calls[0] > 8 else ids), lengths

    monkeypatch.setattr(Encoder, "_encode_fast", wrong)
    yield calls


def test_a_difference_falls_back_loudly_and_for_all_text(tmp_path: Path, tokenizer: Path, wrong_ids: list[int]) -> None:
    corpus(tmp_path)
    with pytest.warns(UserWarning, match="differs from tokenizers .* at token .* are encoded again"):
        report = run(tmp_path, tokenizer)
    assert report.encoder.startswith("tokenizers ") and "differs" in report.encoder_note and wrong_ids[0] > 8
    assert (tmp_path / "out-train.bin").read_bytes() == whole_by_reference(tmp_path, tokenizer)
    sidecar = json.loads((tmp_path / "out-train.json").read_bytes())
    digest = xxhash.xxh3_128_hexdigest((tmp_path / "out-train.bin").read_bytes())
    assert sidecar["bin_digest"] == digest  # no bytes of the first attempt are in it


def test_standard_input_cannot_fall_back(
    tmp_path: Path, tokenizer: Path, wrong_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(corpus(tmp_path).read_bytes())))
    with raises(DataError, "prepare.input-read-only-once", "--encoder tokenizers"):
        prepare(["-"], str(tmp_path / "out"), tokenizer=tokenizer)
    assert wrong_ids[0] > 8 and [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_tokenizer_travels_with_the_data(tmp_path: Path, tokenizer: Path) -> None:
    corpus(tmp_path)
    run(tmp_path, tokenizer)
    assert Tokenizer.load(tmp_path / "out-tokenizer").digest == Tokenizer.load(tokenizer).digest
    for path in tmp_path.glob("out*.*"):
        path.unlink()
    with raises(DataError, "data.output-exists", "out-tokenizer/tokenizer.json"):
        run(tmp_path, tokenizer)
    run(tmp_path, tmp_path / "out-tokenizer")  # the tokenizer is its own copy: it is not moved
    assert Tokenizer.load(tmp_path / "out-tokenizer").digest == Tokenizer.load(tokenizer).digest


def whole_by_reference(folder: Path, tokenizer: Path) -> bytes:
    corpus(folder / "reference")
    report = run(folder / "reference", tokenizer, encoder="tokenizers")
    assert report.encoder.startswith("tokenizers ") and report.encoder_note == "as requested"
    return (folder / "reference/out-train.bin").read_bytes()


def test_both_encoders_give_the_same_and_the_order_is_kept(tmp_path: Path, tokenizer: Path) -> None:
    corpus(tmp_path)
    report = run(tmp_path, tokenizer, valid_fraction=0.0)
    assert report.encoder.startswith("gigatoken ")
    data, chosen = IndexedDataset(tmp_path / "out-train"), Tokenizer.load(tokenizer)
    assert [chosen.decode(data[i][:-1]) for i in range(len(data))] == [text for text in TEXTS if text]
    slow = run(tmp_path, tokenizer, valid_fraction=0.0, encoder="tokenizers", overwrite=True)
    assert slow.train.tokens == report.train.tokens and IndexedDataset(tmp_path / "out-train").tokens.tolist() == list(
        data.tokens
    )


@pytest.mark.parametrize("encoder", ["auto", "tokenizers"])
def test_special_tokens_are_text_unless_requested(tmp_path: Path, tokenizer: Path, encoder: str) -> None:
    corpus(tmp_path, ["one<|endoftext|>two"])
    report = run(tmp_path, tokenizer, valid_fraction=0.0, encoder=encoder)
    plain = report.train.tokens
    assert report.encoder.startswith("gigatoken" if encoder == "auto" else "tokenizers")
    tokens = IndexedDataset(tmp_path / "out-train").tokens.tolist()
    assert tokens.count(0) == 1 and tokens[-1] == 0
    parsed = run(tmp_path, tokenizer, valid_fraction=0.0, encoder=encoder, parse_special=True, overwrite=True)
    tokens = IndexedDataset(tmp_path / "out-train").tokens.tolist()
    assert (
        tokens.count(0) == 2
        and parsed.train.tokens < plain
        and parsed.encoder.startswith("gigatoken" if encoder == "auto" else "tokenizers")
    )


def test_the_command_reads_standard_input_on_any_number_of_workers(tmp_path: Path, tokenizer: Path) -> None:
    data = corpus(tmp_path).read_bytes()
    run(tmp_path, tokenizer, valid_fraction=0.0)
    run_one = prepare([tmp_path / "in.jsonl"], str(tmp_path / "one"), tokenizer=tokenizer, workers=1)
    command = [sys.executable, "-m", "engine", "prepare", "--input", "-", "--tokenizer", str(tokenizer)]
    command += ["--output", str(tmp_path / "piped"), "--workers", "3"]
    done = subprocess.run(command, input=data, capture_output=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0 and run_one.encoder.encode() in done.stdout, done.stderr
    for name in ("one", "piped"):
        for suffix in ("bin", "idx"):
            same_bytes(tmp_path / f"{name}-train.{suffix}", tmp_path / f"out-train.{suffix}")
    wrong = subprocess.run([*command[:-1], "-1"], input=b"", capture_output=True, timeout=100, cwd=ROOT)
    assert wrong.returncode == 2 and b"--workers = -1: is below 0" in wrong.stderr


def test_the_output_may_be_inside_the_input_folder(tmp_path: Path, tokenizer: Path) -> None:
    corpus(tmp_path, [*TEXTS, "BAD", *TEXTS])
    spoil(tmp_path)
    with raises(DataError, "read.document-refused", "wrong type"):
        prepare([tmp_path], str(tmp_path / "out"), tokenizer=tokenizer)
    assert (tmp_path / "out.parts/settings.json").exists()  # it is not read as input
    notes: list[str] = []
    report = prepare([tmp_path], str(tmp_path / "out"), tokenizer=tokenizer, on_error="skip", note=notes.append)
    assert "resuming " in notes[0] and report.dropped == {"wrong type": 1}
    tokens = (tmp_path / "out-train.bin").read_bytes()
    again = prepare([tmp_path], str(tmp_path / "out"), tokenizer=tokenizer, on_error="skip", overwrite=True)
    written = len([path for path in tmp_path.glob("out-*") if path.is_file()]) + 1  # plus the tokenizer folder
    assert again.dropped == {"own file": written, "wrong type": 1}
    assert again.examples["own file"][0].endswith("this command writes it")
    assert (tmp_path / "out-train.bin").read_bytes() == tokens
