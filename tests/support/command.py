"""The `engine` command as a user types it: in this process, or training in separate processes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from engine.cli.main import main
from tests.support.paths import BIN


def exit_code(*words: Any) -> int:
    """Run `engine WORDS` in this process; returns its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)


def run_cli(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    """Run `engine WORDS` in this process; returns its exit code and output (stdout, then stderr)."""
    code, captured = exit_code(*words), capsys.readouterr()
    return code, captured.out + captured.err


def train(corpus: Path, run: Path, ranks: int, *options: str, commands: Path = BIN) -> subprocess.Popen[str]:
    """Start `engine train` on a micro model. commands: the folder of `engine` and `torchrun`."""
    command = [str(commands / "engine")]
    if ranks > 1:
        command = [str(commands / "torchrun"), "--standalone", "--nproc-per-node", str(ranks), "-m", "engine"]
    command += ["train", "--run.dir", str(run), "--data.train", str(corpus), "--model.preset", "micro"]
    command += ["--model.vocab-size", "97", "--train.seq-len", "32", "--train.global-batch-size", "8"]
    command += ["--optimizer.lr", "1e-2", "--monitor.tensorboard", "false", *options]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str], timeout: float = 90) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err
