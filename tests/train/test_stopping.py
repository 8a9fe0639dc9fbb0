"""Stopping a run by a signal at any moment, and runs that hang: saving, exit codes, and which rank is behind."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.samples.indexed_writer import IndexedWriter
from engine.distributed.context import ParallelContext
from engine.monitor.ending import ExitRecord
from engine.monitor.metrics import lacks_validation, read_metrics
from engine.train.evaluate import Evaluator
from engine.train.loop import train
from tests.support.cases import layout_of, resolve
from tests.support.checkpoints import complete_steps
from tests.support.examples import SCRIPT, environment
from tests.support.harness import run_ranks
from tests.support.launched import ranks


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = tmp_path_factory.mktemp("corpus") / "noise"
    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, vocab_size=61) as writer:
        for _ in range(40):
            writer.add(rng.integers(0, 61, rng.integers(5, 60)))
        writer.finish({})
    return str(prefix)


class Stop:
    """A stop request of one rank that arrives with its `at`-th chunk of a validation; 0: never."""

    def __init__(self, at: int = 0):
        self.at, self.chunks = at, 0

    def __bool__(self) -> bool:
        return 0 < self.at <= self.chunks


def job(cfg: Any, ctx: ParallelContext, at: int) -> tuple[int, int]:
    """(exit code, number of validated chunks); only the last rank gets the signal."""
    stop = Stop(at if ctx.rank == ctx.world.size - 1 else 0)
    chunk = Evaluator._chunk

    def counted(self: Evaluator, samples: np.ndarray, count: int) -> Any:
        stop.chunks += 1
        return chunk(self, samples, count)

    Evaluator._chunk = counted  # type: ignore[method-assign]  # undone below, for the next run in this process
    try:
        return train(cfg, ctx, stop), stop.chunks  # type: ignore[arg-type]
    finally:
        Evaluator._chunk = chunk  # type: ignore[method-assign]


def validations(run: Path) -> dict[int, float]:
    return {step: record["val_loss"] for step, record in read_metrics(run)[1].items()}


@pytest.mark.parametrize("degrees", [{}, {"parallel_pipeline": 2}])
def test_a_signal_during_validation_finds_the_step_saved(degrees: dict[str, int], corpus: str, tmp_path: Path) -> None:
    """At the last step and at another; the next start repeats the validation, and all results are as without a stop."""

    def cfg_of(name: str, **more: Any) -> Any:
        return resolve(
            2 if degrees else 1,
            **degrees,
            train_steps=5,
            eval_every=2,
            eval_batches=3,
            data_train=corpus,
            data_valid=corpus,
            run_dir=tmp_path / name,
            **more,
        )

    def all_starts(ctx: ParallelContext) -> list[Any]:
        run, seen = tmp_path / "run", []
        for at in (2, 2, 5, 2, 1, 0, 0):  # each number: in which chunk of this start's validations
            code, chunks = job(cfg_of("run"), ctx, at)
            steps = complete_steps(run / "checkpoints")
            if ctx.rank == 0:  # which writes it
                assert json.loads((run / "exit.json").read_text())["code"] == code
            seen.append((code, chunks, steps[-1]))
        return [seen, job(cfg_of("undisturbed"), ctx, 0)]

    cfg = cfg_of("run")
    for seen, undisturbed in run_ranks(layout_of(cfg.config), all_starts):
        # 2: in the validation of step 2, twice (the second start begins with it); 5: that one whole, then in the next
        assert seen == [
            (75, 2, 2),
            (75, 2, 2),
            (75, 5, 4),
            (75, 2, 4),
            (75, 1, 4),
            (0, 6, 5),
            (0, 0, 5),
        ]
        assert undisturbed == (0, 9)
    assert validations(tmp_path / "run") == pytest.approx(validations(tmp_path / "undisturbed"), rel=1e-12)
    assert list(validations(tmp_path / "run")) == [2, 4, 5]


def test_the_step_is_saved_before_it_is_validated(
    corpus: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = resolve(
        1,
        train_steps=2,
        eval_every=1,
        eval_batches=1,
        checkpoint_every=1,
        checkpoint_async_save=False,
        data_train=corpus,
        data_valid=corpus,
        run_dir=tmp_path / "run",
    )
    assert run_ranks(layout_of(cfg.config), lambda ctx: job(cfg, ctx, 0)) == [(0, 2)]
    lines = [line for line in capfd.readouterr().out.splitlines() if " saved " in line or ": validation" in line]
    assert [line.split()[3] for line in lines] == ["saved", "validation", "saved", "validation"]


@pytest.mark.parametrize("early", [False, True])
def test_all_ranks_stay_until_exit_json_is_written(
    early: bool, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun kills the other ranks soon after one has exited, and a disk may be slow."""
    cfg = resolve(2, parallel_data=2, train_steps=1, data_train=corpus, run_dir=tmp_path / "run")
    write = ExitRecord.write

    def slow(self: ExitRecord, code: int, reason: str) -> None:
        time.sleep(1)
        write(self, code, reason)

    def one(ctx: ParallelContext) -> Any:
        code = train(cfg, ctx, early)  # type: ignore[arg-type]
        return code, json.loads((tmp_path / "run/exit.json").read_text())["code"]

    monkeypatch.setattr(ExitRecord, "write", slow)
    code = 75 if early else 0
    assert run_ranks(layout_of(cfg.config), one) == [(code, code)] * 2


def test_a_spoiled_line_of_metrics_stops_no_start(tmp_path: Path) -> None:
    """A corrupt line after a power cut: whether the step lacks its validation is then not known."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 4, "loss": 1.0}\n')
    assert lacks_validation(tmp_path, 4)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(bytes(100) + b'0}\n{"step": 6, "loss": 1.0}\n')
    assert not lacks_validation(tmp_path, 6)
    assert not lacks_validation(tmp_path / "none", 6)


def test_a_signal_before_the_first_step_is_reported_and_asks_for_another_start(
    corpus: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = resolve(1, train_steps=2, data_train=corpus, run_dir=tmp_path / "run")

    class Always:
        def __bool__(self) -> bool:
            return True

    assert run_ranks(layout_of(cfg.config), lambda ctx: train(cfg, ctx, Always())) == [75]  # type: ignore[arg-type]
    record = {"code": 75, "reason": "stopped on a signal before the first step", "step": 0}
    assert json.loads((tmp_path / "run/exit.json").read_text()) == record
    printed = (
        "stopped on a signal before the first step: nothing to save yet; the same command starts from the beginning\n"
    )
    assert capfd.readouterr().out[len("12:34:56 ") :] == printed
    assert run_ranks(layout_of(cfg.config), lambda ctx: train(cfg, ctx, Stop())) == [0]  # type: ignore[arg-type]
    assert run_ranks(layout_of(cfg.config), lambda ctx: train(cfg, ctx, Always())) == [75]  # type: ignore[arg-type]
    assert capfd.readouterr().out.endswith("nothing to save yet; the same command resumes from step 2\n")


# -- the script, at any moment -----------------------------------------------------------------------------------------

RANK = """
import os, signal, sys, time
time.sleep(0.5)
got = []
signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
deadline = time.monotonic() + 10
while not got and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.5)
os.makedirs("run", exist_ok=True)
with open("run/exit.json", "w") as file:
    file.write('{"code": 75}' if got == [signal.SIGUSR1] else str(got))
sys.exit(75)
"""

TORCHRUN = """#!/usr/bin/env python
import os, signal, subprocess, sys, time
open("there", "w").close()
time.sleep(0.5)
rank = subprocess.Popen([sys.executable, "rank.py"], start_new_session=True)
sys.exit(1 if rank.wait() else 0)
"""


@pytest.mark.parametrize("group", [False, True])
def test_a_signal_before_there_are_ranks_is_kept_for_them(group: bool, tmp_path: Path) -> None:
    """It arrives once, at a rank that starts later and installs its handler later; sent to all, it ends no torchrun."""
    (tmp_path / "torchrun").write_text(TORCHRUN)
    (tmp_path / "torchrun").chmod(0o755)
    (tmp_path / "rank.py").write_text(RANK)
    variables = environment()
    variables["PATH"] = f"{tmp_path}:{variables['PATH']}"
    command = ["bash", str(SCRIPT), "--run.dir=run"]
    with subprocess.Popen(command, env=variables, cwd=tmp_path, start_new_session=True) as script:
        deadline = time.monotonic() + 20
        while not (tmp_path / "there").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (os.killpg if group else os.kill)(script.pid, signal.SIGUSR1)
        assert script.wait(30) == 75
    assert (tmp_path / "run/exit.json").read_text() == '{"code": 75}'


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_signals_at_random_moments(tiny: Path, tmp_path: Path) -> None:
    """40 starts of two ranks, each with a signal to the script or its process group: exit code 75 and one message."""
    rng, run, printed = random.Random(40), tmp_path / "run", []
    for trial in range(40):
        number = rng.choice([signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        group, delay = rng.random() < 0.5, rng.choice([rng.uniform(0.05, 0.3), rng.uniform(0, 4), rng.uniform(2, 12)])
        variables = environment(GPUS_PER_NODE="2", MASTER_PORT=str(rng.randrange(20000, 30000)))
        command = ["bash", str(SCRIPT), "--config", str(tiny), "--run.dir", str(run), "--train.device", "cpu"]
        log = tmp_path / f"log{trial}"
        with log.open("w") as out:
            script = subprocess.Popen(
                [*command, "--train.steps", "10000000"],
                env=variables,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        time.sleep(delay)
        (os.killpg if group else os.kill)(script.pid, number)
        try:
            code = script.wait(90)
        finally:
            if script.returncode is None:
                os.killpg(script.pid, signal.SIGKILL)
                script.wait()
        errors = log.read_text()
        why = re.findall(r"stopped on (?:a signal|SIG\w+) (before|after) ", errors)
        assert code == 75 and len(why) == 1, (trial, number, group, delay, code, errors)
        printed += why
    print(f"{printed.count('before')} before the first step, {printed.count('after')} after one")


# -- who is behind -----------------------------------------------------------------------------------------------------

LAYOUTS = ((4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2), (1, 2, 2))  # tensor, pipeline, data


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.parametrize("transport", ["shared", "gloo"])
def test_a_stopped_rank_is_named_in_every_layout(transport: str, corpus: str, tmp_path: Path) -> None:
    """SIGSTOP to one of four ranks at a random moment of its training: the message names it and no other."""
    rng = random.Random(transport)
    for number, (tensor, pipeline, data) in enumerate(LAYOUTS):
        victim, delay, folder = rng.randrange(4), rng.uniform(1, 3), tmp_path / str(number)
        folder.mkdir()
        cfg = resolve(
            4,
            parallel_tensor=tensor,
            parallel_pipeline=pipeline,
            parallel_data=data,
            model_num_layers=4,
            train_precision="fp32",  # as in `ranks`
            train_steps=1_000_000,
            data_train=corpus,
            run_dir=folder / "run",
        )

        def endless(ctx: ParallelContext) -> int:
            if ctx.rank == victim:  # noqa: B023  # run before the next turn
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGSTOP)).start()  # noqa: B023
            return train(cfg, ctx, Stop())  # type: ignore[arg-type]  # noqa: B023

        results = ranks(endless, folder, 4, transport, layout=layout_of(cfg.config), timeout_s=6.0, stopped=victim)
        errors = [line for r in results for line in r.text.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, results
        text = errors[0].partition(": ")[2].partition(": ")[2]  # without "error: rank N: "
        assert text.startswith(f"rank {victim} is behind: its process "), (LAYOUTS[number], victim, errors)
        assert set(re.findall(r"rank (\d)", text)) == {str(victim)}, errors
