"""Output for users: dry run, plot, out-of-memory errors, evaluation from another folder, exit code of the script."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from engine.cli.main import main
from engine.config.phases import Phase, Phases
from engine.data.samples.indexed_writer import IndexedWriter
from engine.errors import out_of_memory_help
from engine.monitor.metrics import read_metrics
from engine.monitor.plot import distinct_names, plot_loss
from engine.monitor.progress import Progress, duration
from tests.support.paths import ROOT

CONFIG = ROOT / "examples/configs/llama-2-7b.toml"


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--dry-run", *words])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_a_dry_run_shows_what_was_changed_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    out = shown(capsys, "--config", str(CONFIG))
    assert max(map(len, out.splitlines())) <= 80
    assert "optimizer.lr" in out and "optimizer.beta1" not in out and "--full" in out
    assert "optimizer.beta1" in shown(capsys, "--config", str(CONFIG), "--full")
    text = " ".join(out.split())
    assert "data.train: data/corpus-train: missing" in text and "data.tokenizer: data/tokenizer: missing" in text
    (tmp_path / "data/tokenizer").mkdir(parents=True)
    for name in ("corpus-train.bin", "corpus-train.idx", "tokenizer/tokenizer.json"):
        (tmp_path / "data" / name).touch()
    text = " ".join(shown(capsys, "--config", str(CONFIG)).split())
    assert "data.train: data/corpus-train: found" in text and "data.tokenizer: data/tokenizer: found" in text


def test_a_dry_run_says_that_a_long_model_trains_on_short_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    note = "note: train.seq_len is 256 by default; model.max_seq_len is 8192"
    assert note in shown(capsys, "--model.preset", "llama-3-8b")
    assert note not in shown(capsys, "--model.preset", "llama-3-8b", "--train.seq-len", "256")


def test_runs_are_named_apart_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    runs = [tmp_path / "a/run", tmp_path / "b/run"]
    for run in runs:
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert distinct_names(runs) == ["a/run", "b/run"]
    assert distinct_names([runs[0], tmp_path / "b/other"]) == ["run", "other"]
    assert plot_loss(runs, tmp_path / "loss.svg") == [
        f"{run}: the last line of metrics.jsonl is incomplete and was skipped" for run in runs
    ]
    assert read_metrics(runs[0]) == ({1: {"step": 1, "loss": 2.0}}, {}, True)


def test_an_error_of_memory_says_what_to_change() -> None:
    def huge() -> BaseException:
        try:
            torch.empty(1 << 60)
        except RuntimeError as error:
            return error
        raise AssertionError

    for error in (huge(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), MemoryError()):
        text = out_of_memory_help(error)
        assert text.startswith("out of memory: ")
        assert all(name in text for name in ("train.micro_batch_size", "train.recompute", "parallel.tensor"))
    assert out_of_memory_help(RuntimeError("shapes do not match")) == ""


def test_evaluation_finds_the_data_from_another_folder(tmp_path: Path, warm: Path) -> None:
    for name in ("train", "valid"):
        with IndexedWriter(tmp_path / name, vocab_size=97) as writer:
            for begin in range(40):
                writer.add((begin + len(name) + np.arange(40)) % 97)
            writer.finish({})
    engine = [str(warm / "engine")]
    sizes = ["--model.preset", "micro", "--train.seq-len", "16", "--train.steps", "1", "--monitor.tensorboard", "false"]
    data = ["--data.train", "train", "--data.valid", "valid", "--run.dir", "run"]
    done = subprocess.run([*engine, "train", *sizes, *data], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run([*engine, "evaluate", "../run"], cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert done.returncode == 0 and str(tmp_path / "valid") in done.stdout, done.stderr


def test_the_script_ends_with_2_for_a_fault_of_the_configuration(tmp_path: Path, warm: Path) -> None:
    path = f"{warm}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / "examples/pretrain_7b.sh"), "--optimizer.lr", "-1", "--run.dir", str(tmp_path / "run")],
        env=os.environ | {"PATH": path, "GPUS_PER_NODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "optimizer.lr" in done.stderr


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    ("steps", "step", "rate", "shown_rate"),
    [(250_000, 123_456, 93_000.0, "93,000"), (1_000_000, 999_000, 123_456_789.0, "123.46M"), (9, 8, 1e9, "1.00B")],
)
def test_progress_shows_what_matters_in_80_columns(
    terminal: bool, steps: int, step: int, rate: float, shown_rate: str
) -> None:
    out = io.StringIO()
    cfg: Any = SimpleNamespace(
        train=SimpleNamespace(steps=steps), monitor=SimpleNamespace(peak_tflops=0.0, log_every_s=0.0)
    )
    progress = Progress(cfg, SimpleNamespace(rank=0), Phases((Phase(1, 8, 1, 32),)))  # type: ignore[arg-type]
    progress.console = Console(file=out, force_terminal=terminal, width=80, highlight=False, soft_wrap=True)
    record = {"step": step, "loss": 12.3456, "tokens_per_s": rate, "grad_norm": 0.3, "lr": 3e-4, "gflops_per_rank": 4e5}
    with progress:
        progress.began -= 2.6 * 86400 * step / (steps - step)
        progress.step(record)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    line = [part for part in re.split(r"[\r\n]", plain) if "loss" in part][-1][:80]
    for text in (f"step {step}/{steps}", "loss 12.3456", f"{shown_rate} tokens/s", "2 d 14 h left"):
        assert text in line, line
    assert terminal or re.match(r"\d\d:\d\d:\d\d step ", line)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (42.4, "42 s"),
        (59.7, "1 min 00 s"),
        (11_100, "3 h 05 min"),
        (3_599.6, "1 h 00 min"),
        (86_399, "1 d 0 h"),
        (229_664, "2 d 16 h"),
        (1e9, "11,574 d"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
