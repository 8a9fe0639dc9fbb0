"""The commands as a user types them: training on several processes, signals, errors that end all ranks, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.data.samples.indexed_writer import IndexedWriter
from tests.support.command import finish, train
from tests.support.paths import BIN


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A learnable corpus: every document counts upwards from a random number, modulo 97."""
    prefix = tmp_path_factory.mktemp("corpus") / "counting"
    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, vocab_size=97) as writer:
        for _ in range(200):
            writer.add((rng.integers(97) + np.arange(rng.integers(5, 200))) % 97)
        writer.finish({"text_bytes": 40000})
    return prefix


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_one_process_learns_and_leaves_a_whole_run_folder(corpus: Path, tmp_path: Path, warm: Path) -> None:
    options = ("--train.steps", "60", "--data.valid", str(corpus), "--monitor.tensorboard", "true")
    code, out, err = finish(train(corpus, tmp_path / "run", 1, *options, "--eval.every", "30"))
    assert code == 0, err
    steps = [r for r in records(tmp_path / "run") if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 61))
    assert set(steps[0]) >= {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_s", "data_s"}
    assert steps[-1]["loss"] < 1.0 < 4.0 < steps[0]["loss"]
    assert [r["step"] for r in records(tmp_path / "run") if "val_loss" in r] == [30, 60]
    assert json.loads((tmp_path / "run/exit.json").read_text()) == {"code": 0, "reason": "done", "step": 60}
    assert "step 60/60  loss" in out and "validation loss" in out and "saved" in out
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert events.Scalars("train/loss")[-1].step == 60 and events.Scalars("val/loss")[-1].step == 60
    options = ("--config", str(tmp_path / "run/config.toml"))
    again = finish(train(corpus, tmp_path / "run", 1, *options, commands=warm))
    assert again[0] == 0 and "nothing left to do: step 60 of 60 is done, resuming from" in again[1], again


@pytest.mark.parametrize("target", ["launcher", pytest.param("one rank", marks=pytest.mark.heavy)])
def test_sigterm_saves_and_the_run_resumes_in_another_layout(
    corpus: Path, tmp_path: Path, warm: Path, target: str
) -> None:
    run = tmp_path / "run"
    constant = ("--lr-schedule.kind", "constant")  # so that the rate stays when the run is made shorter
    process = train(corpus, run, 2, "--parallel.tensor", "2", "--train.steps", "100000", *constant)
    deadline = time.time() + 60
    while (not (run / "metrics.jsonl").exists() or len(records(run)) < 3) and time.time() < deadline:
        time.sleep(0.05)
    if target == "launcher":
        process.send_signal(signal.SIGTERM)
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGUSR1)
    finish(process, timeout=30)
    fields = json.loads((run / "exit.json").read_text())
    assert fields["code"] == 75 and fields["step"] == records(run)[-1]["step"]
    more = str(fields["step"] + 2)
    options = ("--parallel.pipeline", "2", "--train.steps", more, *constant)
    code, out, err = finish(train(corpus, run, 2, *options, commands=warm))
    assert code == 0 and f"resuming from {run}/checkpoints/step_{fields['step']:08d}" in out, err
    assert [r["step"] for r in records(run)] == list(range(1, int(more) + 1))


def test_plain_train_exits_75_on_sigterm(corpus: Path, tmp_path: Path) -> None:
    process = train(corpus, tmp_path / "run", 1, "--train.steps", "100000")
    deadline = time.time() + 60
    while not (tmp_path / "run/metrics.jsonl").exists() and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75


def test_config_faults_end_with_2_and_are_told_once(corpus: Path, tmp_path: Path, warm: Path) -> None:
    options = ("--parallel.tensor", "3", "--train.stepz", "5", "--model.num-layers", "two")
    code, _, err = finish(train(corpus, tmp_path / "run", 1, *options))
    assert code == 2 and err.count("error:") == 1 and err.count("\n  - ") >= 3
    assert "Did you mean train.steps?" in err and not (tmp_path / "run").exists()
    code, _, err = finish(train(corpus, tmp_path / "run", 2, "--parallel.tensor", "4", commands=warm))
    assert code != 0 and err.count("error: configuration has") == 1


def test_bad_data_ends_all_ranks_with_one_message(corpus: Path, tmp_path: Path, warm: Path) -> None:
    options = ("--parallel.data", "2", "--model.vocab-size", "96")
    code, _, err = finish(train(corpus, tmp_path / "run", 2, *options, commands=warm))
    assert code != 0 and err.count("error: rank") == 1 and "96" in err
    code, _, err = finish(train(tmp_path / "nothing", tmp_path / "run", 1))
    assert code == 1 and "nothing.idx" in err and "Traceback" not in err


def test_no_data_is_a_config_error(tmp_path: Path) -> None:
    code, _, err = finish(train(Path(""), tmp_path / "run", 1, "--data.train", ""))
    assert code == 2 and "data.train" in err and "engine prepare" in err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["trian"], ["train", "--help"], ["prepare", "--help"]])
def test_help_and_unknown_verbs(arguments: list[str]) -> None:
    done = subprocess.run([str(BIN / "engine"), *arguments], capture_output=True, text=True, timeout=60)
    known = arguments[-1:] == ["--help"]
    assert done.returncode == (0 if known else 2)
    text = done.stdout + done.stderr
    assert "--train.global-batch-size" in text if arguments == ["train", "--help"] else "usage: engine" in text


def test_without_the_extension_one_warning_line_and_the_same_losses(corpus: Path, tmp_path: Path, warm: Path) -> None:
    hide = "import sys; sys.modules['engine._index'] = None; from engine.cli.main import main; main()"
    (tmp_path / "hidden.py").write_text(hide)
    losses = []
    for index, head in enumerate([["-m", "engine"], [str(tmp_path / "hidden.py")]]):
        run = tmp_path / f"run{index}"
        command = [str(warm / "torchrun"), "--standalone", "--nproc-per-node", "2", *head, "train"]
        command += ["--run.dir", str(run), "--data.train", str(corpus), "--model.preset", "micro", "--train.steps", "3"]
        command += ["--train.seq-len", "32", "--monitor.tensorboard", "false"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stderr
        assert (done.stdout + done.stderr).count("warning: engine._index") == index
        losses.append([r["loss"] for r in records(run)])
    assert losses[0] == losses[1]
