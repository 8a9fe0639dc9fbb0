"""Output whose reader has gone or whose disk is full: commands end (silently without a reader), training continues."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.data.samples.indexed_writer import IndexedWriter
from tests.support.paths import ROOT

ENGINE = [sys.executable, "-m", "engine"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("corpus") / "counting"
    with IndexedWriter(prefix, vocab_size=97) as writer:
        for begin in range(60):
            writer.add((begin + np.arange(40)) % 97)
        writer.finish({})
    return prefix


def unread(words: list[str], cwd: Path, until: bytes, merged: bool = False) -> tuple[int, str]:
    """Exit code and standard error of a command whose reader closes the pipe after it has read `until`."""
    error = subprocess.STDOUT if merged else subprocess.PIPE
    process = subprocess.Popen([*ENGINE, *words], cwd=cwd, stdout=subprocess.PIPE, stderr=error)
    assert process.stdout is not None
    if until:
        process.stdout.readline()
    process.stdout.close()
    text = b"" if process.stderr is None else process.stderr.read()
    return process.wait(timeout=120), text.decode()


@pytest.mark.parametrize(
    ("words", "until"),
    [
        (["--help"], b""),
        (["train", "--help"], b""),
        (["train", "--help"], b"\n"),
        (["train", "--config", str(ROOT / "examples/configs/llama-2-7b.toml"), "--dry-run"], b""),
        (["schedule", "--text", "--microbatches", "64", "--output", "s.png"], b"\n"),
        (["inspect", "CORPUS", "--output", "l.png"], b""),
    ],
)
def test_a_reader_that_leaves_ends_a_verb_in_silence(
    words: list[str], until: bytes, corpus: Path, tmp_path: Path
) -> None:
    words = [str(corpus) if word == "CORPUS" else word for word in words]
    code, text = unread(words, tmp_path, until)
    assert text == "" and (code == 141 or (until and code == 0)), (code, text)


def test_errors_into_a_closed_pipe_are_silent_too(tmp_path: Path) -> None:
    assert unread(["verify", "nowhere"], tmp_path, b"", merged=True)[0] == 141


def test_a_full_disk_under_the_output_is_an_error_and_no_silence(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*ENGINE, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert (
        done.stderr == "error: standard output cannot be written: No space left on device [cli.output-not-writable]\n"
    )


@pytest.mark.parametrize("target", ["closed pipe", pytest.param("full disk", marks=pytest.mark.heavy)])
def test_training_outlives_its_listener(target: str, corpus: Path, tmp_path: Path) -> None:
    words = ["train", "--model.preset", "micro", "--data.train", str(corpus), "--train.seq-len", "16"]
    words += ["--train.steps", "4", "--lr-schedule.warmup-steps", "1", "--monitor.tensorboard", "false"]
    if target == "closed pipe":
        read, out = os.pipe()
        os.close(read)
    else:
        out = os.open("/dev/full", os.O_WRONLY)
    command = [*ENGINE, *words, "--run.dir", str(tmp_path / "run")]
    done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(out)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: standard output cannot be written") == 1 and "Traceback" not in done.stderr
    assert (tmp_path / "run/checkpoints/step_00000004").is_dir()
