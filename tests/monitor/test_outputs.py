"""Output files of a run other than checkpoints: UTF-8, not through links, and a failed write never ends the run."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.format import newest_step
from engine.checkpoint.storage import DISK, remove_tree
from engine.distributed.context import make_context
from engine.errors import CheckpointError, DataError
from engine.monitor.ending import ExitRecord
from engine.monitor.plot import plot_loss
from engine.train import loop
from engine.train.state import TrainState
from engine.train.step import StepResult, train_step
from tests.support.cases import layout_of, resolve
from tests.support.corpora import rows_of_61
from tests.support.errors import raises
from tests.support.paths import ROOT


def test_names_and_output_are_utf8_whatever_the_locale(tmp_path: Path) -> None:
    """With PYTHONUTF8=0 in the C locale, Python itself uses ASCII for everything."""
    (tmp_path / "größe.toml").write_text('[run]\ndir = "läufe/größe"\n', encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "engine", "train", "--config", "größe.toml", "--data.train", "döcs", "--dry-run"],
        cwd=tmp_path,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(name.encode() in done.stdout for name in ("größe.toml", "läufe/größe", "döcs"))


# -- a full disk, links, the exit record -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return rows_of_61(tmp_path_factory.mktemp("corpus") / "c")


def config(folder: Path, prefix: str, **overrides: Any) -> Any:
    return resolve(
        1, data_train=prefix, run_dir=folder, **{"train_steps": 4, "monitor_tensorboard": False, **overrides}
    )


def train(resolved: Any, during: Callable[[TrainState], None] = lambda state: None) -> int:
    """Train in this process; `during` is called before each step."""

    def step(state: TrainState, *args: Any, **options: Any) -> StepResult:
        during(state)
        return train_step(state, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        ctx = make_context(layout_of(resolved.config), 0, dtype=torch.float64)
        return loop.train(resolved, ctx, False)  # type: ignore[arg-type]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> None:
    with open(folder / "filler", "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)


def test_a_full_disk_costs_lines_and_not_the_run(small_disk: Path, corpus: str) -> None:
    run = small_disk / "run"

    def during(state: TrainState) -> None:
        if state.step == 3:
            fill(small_disk)
        if state.step == 60:
            (small_disk / "filler").unlink()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert train(config(run, corpus, train_steps=70), during) == 0
    texts = [str(w.message) for w in caught]
    assert sum("metrics.jsonl cannot be written (No space left" in text for text in texts) == 1, texts
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps[:3] == [1, 2, 3] and steps[-1] == 70 and 50 not in steps
    assert json.loads((run / "exit.json").read_text()) == {"code": 0, "reason": "done", "step": 70}


def test_a_tensorboard_that_cannot_write_is_left(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Writer:
        def __init__(self, *_: Any, **__: Any):
            pass

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append(step)
            if step == 2:
                raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    with pytest.warns(
        UserWarning, match=r"tensorboard cannot be written \(No space left on device\); continuing"
    ) as caught:
        assert train(config(tmp_path / "run", corpus, monitor_tensorboard=True)) == 0
    assert len(caught) == 1 and max(calls) == 2


def test_the_exit_record_needs_no_disk_space(small_disk: Path) -> None:
    exit_record = ExitRecord(small_disk)
    exit_record.begin()
    exit_record.begun, exit_record.step = True, 7
    assert json.loads((small_disk / "exit.json").read_text())["code"] is None
    fill(small_disk)
    exit_record.write(1, "rank 3: a reason " * 200)
    record = json.loads((small_disk / "exit.json").read_text())
    assert record["code"] == 1 and record["step"] == 7 and record["reason"].startswith("rank 3: a reason")
    assert not (small_disk / ".exit.json").exists()


def test_too_little_space_or_a_read_only_folder_is_found_at_the_start(small_disk: Path, corpus: str) -> None:
    fill(small_disk)
    with open(small_disk / "filler", "r+b") as file:
        file.truncate(file.seek(0, 2) - 200_000)
    with pytest.raises(
        CheckpointError, match=r"checkpoints: a checkpoint of this run needs [\d,]+ bytes, but only [\d,]+ are free"
    ):
        train(config(small_disk / "run", corpus))
    assert not (small_disk / "run/metrics.jsonl").exists()
    (small_disk / "filler").unlink()
    (small_disk / "run/checkpoints").rmdir()
    (small_disk / "run/checkpoints").write_text("not a folder")
    with raises(CheckpointError, "checkpoint.folder-not-writable", small_disk / "run/checkpoints"):
        train(config(small_disk / "run", corpus))
    (small_disk / "run/checkpoints").unlink()
    (small_disk / "run/checkpoints").mkdir()
    ro = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", small_disk / "run/checkpoints"]
    subprocess.run(ro, check=True)
    try:
        with raises(CheckpointError, "checkpoint.folder-not-writable", small_disk / "run/checkpoints", "Read-only"):
            train(config(small_disk / "run", corpus))
    finally:
        subprocess.run(["umount", "-l", small_disk / "run/checkpoints"], check=True)


NAMES = ("lock", "config.toml", "metrics.jsonl", "exit.json", "spike.json", "timeline.json")


@pytest.mark.parametrize("name", [*NAMES, "checkpoints", "tensorboard", "tokenizer/tokenizer.json"])
def test_links_in_a_run_folder_are_rejected(name: str, corpus: str, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (run / name).parent.mkdir(parents=True)
    if name in ("checkpoints", "tensorboard"):
        elsewhere.mkdir()
    else:
        elsewhere.write_text("{}\n")
    (run / name).symlink_to(elsewhere)
    with raises(CheckpointError, "checkpoint.link", run / name):
        train(config(run, corpus))
    assert list(elsewhere.iterdir()) == [] if elsewhere.is_dir() else elsewhere.read_text() == "{}\n"
    if name == "metrics.jsonl":
        with raises(DataError, "monitor.metrics-unreadable", run):
            plot_loss([run], tmp_path / "x.png")


def test_a_linked_checkpoint_is_skipped_and_its_target_stays(corpus: str, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere/step_00000002"
    assert train(config(run, corpus, train_steps=2)) == 0
    (run / "checkpoints/step_00000002").rename(tmp_path / "x")
    elsewhere.parent.mkdir()
    (tmp_path / "x").rename(elsewhere)
    (run / "checkpoints/step_00000002").symlink_to(elsewhere)
    with raises(CheckpointError, "checkpoint.link", run / "checkpoints/step_00000002"):
        train(config(run, corpus))
    with pytest.warns(UserWarning, match="step_00000002: is a link"):
        assert newest_step(run / "checkpoints") is None
    remove_tree(DISK, run / "checkpoints/step_00000002")
    assert sorted(p.name for p in elsewhere.iterdir()) == ["manifest.json", "rank00000.safetensors"]


def test_the_exit_record_names_the_rank_that_had_the_cause(corpus: str, tmp_path: Path) -> None:
    """Two ranks under torchrun; rank 1 raises an error at step 2."""
    for suffix in ("bin", "idx", "json"):
        shutil.copy(f"{corpus}.{suffix}", tmp_path / f"c.{suffix}")
    program = (
        "import os, sys; from engine.train import loop; from engine.cli.main import main\n"
        "from engine.errors import DataError\n"
        "step = loop.train_step\n"
        "def failing(state, *args, **options):\n"
        "    if state.step == 2 and state.ctx.rank == 1: raise DataError('data.gone', 'the corpus is gone')\n"
        "    return step(state, *args, **options)\n"
        "loop.train_step = failing\n"
        "main(sys.argv[1:])\n"
    )
    (tmp_path / "main.py").write_text(program)
    words = ["train", "--model.preset", "micro", "--data.train", "c", "--train.seq-len", "16", "--run.dir", "run"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "main.py", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode, done.stderr
    assert json.loads((tmp_path / "run/exit.json").read_text()) == {
        "code": 1,
        "reason": "rank 1: the corpus is gone [data.gone]",
        "step": 2,
    }
