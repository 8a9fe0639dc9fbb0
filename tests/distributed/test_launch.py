"""Starting and ending ranks: one message and one exit code for any failure, agreements between ranks, signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.distributed import context, failure, launch
from engine.distributed.collectives import all_reduce_, gather_json, raise_together
from engine.distributed.context import ParallelContext, make_context
from engine.distributed.env import Env
from engine.distributed.layout import Layout
from engine.errors import ConfigError, DataError, EngineError, FieldError, TrainingError
from engine.util import signals
from engine.util.files import locked
from engine.util.signals import StopRequest
from tests.support.errors import raises
from tests.support.harness import run_ranks
from tests.support.launched import CPU, DAMAGED, PRINTED, RankExit, forked, last_rank_fails, ranks, start, wait_for_exit
from tests.support.paths import ROOT

# -- with torchrun -----------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from engine.distributed.env import read_env
from tests.support.launched import TWO, last_rank_fails, start
sys.exit(start(last_rank_fails, read_env(), TWO))
"""


def test_one_message_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(torchrun, capture_output=True, text=True, timeout=110, check=False, env=env)
    assert result.returncode != 0
    assert result.stdout == ""
    printed = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert printed == [f"error: rank 1: {PRINTED}"], result.stderr
    summary = result.stderr.split("Root Cause")[1]
    assert "rank      : 1 (local_rank: 1)" in summary and f"rank 1: {DAMAGED}" in summary, result.stderr
    assert "Connection" not in result.stderr and "in last_rank_fails" not in result.stderr, result.stderr


# -- the same with forked ranks: the agent's store, two processes, no imports to wait for ------------------------------


@pytest.fixture(autouse=True)
def _no_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks without a report end a second later, for torchrun's summary; only the real torchrun needs that."""
    monkeypatch.setattr(failure, "_LINGER_S", 0.0)


def test_success(tmp_path: Path) -> None:
    def job(ctx: ParallelContext) -> int:
        assert all_reduce_(torch.tensor([ctx.rank + 1.0]), ctx.data).item() == 6
        return 75

    assert ranks(job, tmp_path, world=3) == [RankExit(75, "")] * 3


def test_no_rank_exits_with_a_code_before_all_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun kills the other ranks once one has exited: rank 0 would have no time to write exit.json."""
    monkeypatch.setattr(dist, "destroy_process_group", lambda: print(time.monotonic()))

    def job(ctx: ParallelContext) -> int:
        if ctx.rank == 0:
            time.sleep(0.5)
            print(time.monotonic())
        return 75

    late, early = ranks(job, tmp_path)
    assert float(early.text) > float(late.text.split()[0])


def test_a_rank_that_never_starts_is_missed() -> None:
    store = dist.HashStore()
    with raises(EngineError, "distributed.ranks-missing", "1 of 2", "0.1 s"):
        launch._wait_for_all_ranks(store, Env(0, 2, 0, 1), 0.1)
    launch._wait_for_all_ranks(store, Env(1, 2, 0, 1), 0.1)


def test_a_store_that_does_not_answer_blocks_no_rank() -> None:
    class Dead:
        def add(self, key: str, amount: int) -> int:
            time.sleep(60)
            return 0

    begin = time.monotonic()
    assert failure._is_first(Dead(), patience_s=5.0) is None  # type: ignore[arg-type]
    assert time.monotonic() - begin < 40


@pytest.mark.parametrize("failing", [0, 1])
def test_the_first_cause_is_reported_once(failing: int, tmp_path: Path) -> None:
    def job(ctx: ParallelContext) -> int:
        if ctx.rank == failing:
            time.sleep(0.2)  # by now the other rank waits
            raise DataError("data.damaged", DAMAGED)
        all_reduce_(torch.zeros(1), ctx.world)
        return 0

    results = ranks(job, tmp_path)
    assert results[failing] == RankExit(1, f"error: rank {failing}: {PRINTED}\n")
    assert results[1 - failing] == RankExit(1, "")


def test_an_error_is_printed_where_torchruns_file_cannot_be_written(tmp_path: Path) -> None:
    def job(ctx: ParallelContext) -> int:
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(tmp_path / "no such folder/error.json")  # or a full /tmp
        return last_rank_fails(ctx)

    assert ranks(job, tmp_path)[1] == RankExit(1, f"error: rank 1: {PRINTED}\n")


def test_quiet_ranks_end_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun calls the process that ends first the root cause."""
    monkeypatch.setattr(failure, "_LINGER_S", 1.5)
    begin = time.monotonic()
    assert [r.text != "" for r in ranks(last_rank_fails, tmp_path)] == [False, True]
    assert time.monotonic() - begin > 1.5


def test_many_failures_are_reported_once(tmp_path: Path) -> None:
    def job(ctx: ParallelContext) -> int:
        raise TrainingError("train.not-finite", f"loss is nan on {ctx.rank}")

    results = ranks(job, tmp_path, world=4)
    assert [r.code for r in results] == [1] * 4
    # a rank that is still connecting may also print a line of gloo's log
    texts = [line for r in results for line in r.text.splitlines() if line.startswith("error: ")]
    assert len(texts) == 1 and texts[0].startswith("error: rank ")


def test_an_agreed_failure_is_reported_once(tmp_path: Path) -> None:
    def job(ctx: ParallelContext) -> int:
        raise_together(DataError("data.damaged", DAMAGED) if ctx.rank == 1 else None, ctx.world, CPU)
        return 0

    results = ranks(job, tmp_path)
    assert [r.code for r in results] == [1, 1]
    text = results[0].text + results[1].text
    assert text.count("\n") == 1 and text.count(f"rank 1: {DAMAGED}") == 1


def test_exit_code_is_that_of_the_error(tmp_path: Path) -> None:
    def job(ctx: ParallelContext) -> int:
        raise ConfigError([FieldError("data.none", "data.train", "", "no training data given", "Make some.")])

    assert [r.code for r in ranks(job, tmp_path)] == [2, 2]


def test_a_bug_comes_with_its_traceback(tmp_path: Path) -> None:
    def job(ctx: ParallelContext) -> int:
        if ctx.rank == 1:
            raise ValueError("never thought of that")
        all_reduce_(torch.zeros(1), ctx.world)
        return 0

    quiet, loud = ranks(job, tmp_path)
    assert quiet == RankExit(1, "") and loud.code == 1
    assert loud.text.startswith("error: rank 1: Traceback") and loud.text.count("Traceback") == 1
    assert loud.text.endswith("ValueError: never thought of that\n")


def test_a_killed_rank_is_reported_by_a_survivor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_first = failure._is_first
    monkeypatch.setattr(failure, "_is_first", lambda store, patience_s: is_first(store, min(patience_s, 0.3)))

    def job(ctx: ParallelContext) -> int:
        if ctx.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        all_reduce_(torch.zeros(1), ctx.world)
        return 0

    survivor, killed = ranks(job, tmp_path)
    assert killed == RankExit(-signal.SIGKILL, "")
    assert survivor.code == 1
    assert survivor.text.startswith("error: rank 0: lost contact with rank 1, which ")
    assert "(killed? out of memory?)" in survivor.text and survivor.text.count("error: ") == 1


# -- one process -------------------------------------------------------------------------------------------------------


def test_one_process_needs_no_group(capsys: pytest.CaptureFixture[str]) -> None:
    def job(ctx: ParallelContext) -> int:
        assert ctx.world.group is None and not dist.is_initialized()
        return 75

    assert start(job, Env(), Layout()) == 75
    assert start(last_rank_fails, Env(), Layout()) == 1
    assert capsys.readouterr().err == f"error: {PRINTED}\n"

    def bug(ctx: ParallelContext) -> int:
        raise KeyError("x")

    assert start(bug, Env(), Layout()) == 1
    assert "Traceback" in capsys.readouterr().err


def test_gloo_stays_on_loopback_on_one_machine(tmp_path: Path) -> None:
    def job(ctx: ParallelContext) -> int:
        print(os.environ["GLOO_SOCKET_IFNAME"])
        return 0

    assert ranks(job, tmp_path) == [RankExit(0, "lo\n")] * 2


# -- agreements --------------------------------------------------------------------------------------------------------


def test_gather_json_of_different_sizes() -> None:
    mine: list[Any] = [None, {"tensors": {"a": [1, 2.5]}, "text": "é€" * 500}, [], 0.1]
    results = run_ranks(Layout(4, data=4), lambda ctx: gather_json(mine[ctx.rank], ctx.world, CPU))
    assert results == [mine] * 4


def test_gather_json_follows_the_axis() -> None:
    layout = Layout(4, data=2, tensor=2)
    results = run_ranks(
        layout, lambda ctx: gather_json(ctx.rank, ctx.data, CPU) + gather_json(ctx.rank, ctx.self_axis, CPU)
    )
    assert results == [[0, 2, 0], [1, 3, 1], [0, 2, 2], [1, 3, 3]]


def test_raise_together() -> None:
    """A rank with an error raises that; the others raise the first rank's; without errors nothing is raised."""

    def job(ctx: ParallelContext, failing: set[int]) -> tuple[str, str] | None:
        error = DataError("data.bad", f"bad {ctx.rank}") if ctx.rank in failing else None
        try:
            raise_together(error, ctx.data, CPU)
        except EngineError as caught:
            return type(caught).__name__, str(caught)
        return None

    def outcome(*failing: int) -> list[Any]:
        return run_ranks(Layout(3, data=3), lambda ctx: job(ctx, set(failing)))

    others = ("EngineError", "rank 1: bad 1")
    assert outcome() == [None] * 3
    assert outcome(1) == [others, ("DataError", "bad 1"), others]
    assert outcome(2, 1) == [others, ("DataError", "bad 1"), ("DataError", "bad 2")]


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_first_signal_is_noted(number: signal.Signals, tmp_path: Path) -> None:
    def body() -> int:
        signal.signal(number, signal.SIG_DFL)  # the tests may have been started by nohup
        stop = StopRequest()
        assert not stop and stop.signal is None
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert stop and stop.signal is number
        return 3

    log = tmp_path / "log"
    with forked(body, log) as pid:
        assert wait_for_exit(pid, log) == RankExit(3, "")


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    def body() -> int:
        StopRequest()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(5)
        return 3

    log, begin = tmp_path / "log", time.monotonic()
    with forked(body, log) as pid:
        assert wait_for_exit(pid, log) == RankExit(128 + signal.SIGUSR1, "")
    assert time.monotonic() - begin < 4


def test_the_same_signal_passed_on_by_the_launcher_is_one_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body() -> int:
        stop = StopRequest()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(signals, "_SAME_REQUEST_S", 0.0)
        assert stop.signal is signal.SIGTERM
        print("still here")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return 3

    log = tmp_path / "log"
    with forked(body, log) as pid:
        assert wait_for_exit(pid, log) == RankExit(128 + signal.SIGTERM, "still here\n")


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    """Unlike other signals, which several processes forward, it is not one request for two seconds."""

    def body() -> int:
        StopRequest()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        return 3

    log = tmp_path / "log"
    with forked(body, log) as pid:
        assert wait_for_exit(pid, log) == RankExit(130, "")


def test_a_hang_up_that_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    def body() -> int:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        return 4 if stop else 3

    log = tmp_path / "log"
    with forked(body, log) as pid:
        assert wait_for_exit(pid, log) == RankExit(3, "")


def test_signals_that_arrive_while_blocked_are_handled(tmp_path: Path) -> None:
    def body() -> int:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        os.kill(os.getpid(), signal.SIGUSR1)
        return 3 if StopRequest().signal is signal.SIGUSR1 else 4

    log = tmp_path / "log"
    with forked(body, log) as pid:
        assert wait_for_exit(pid, log) == RankExit(3, "")


def test_a_released_request_lets_signals_be(tmp_path: Path) -> None:
    def body() -> int:
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGTERM)
        stop.release()
        time.sleep(5)
        return 3

    log = tmp_path / "log"
    with forked(body, log) as pid:
        assert wait_for_exit(pid, log) == RankExit(-signal.SIGTERM, "")


# -- who is behind -----------------------------------------------------------------------------------------------------


def neighbours_wait(ctx: ParallelContext) -> int:
    """Reduce over data, then over tensor; rank 3 is stopped: ranks 1 and 2 wait for it, and rank 0 for rank 1."""
    for step in range(3):
        if ctx.rank == 3 and step == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        all_reduce_(torch.zeros(1), ctx.data)
        all_reduce_(torch.zeros(1), ctx.tensor)
    return 0


@pytest.mark.parametrize("transport", ["auto", "gloo"])
def test_a_rank_that_does_not_run_is_named(transport: str, tmp_path: Path) -> None:
    layout = Layout(4, tensor=2, data=2)
    results = ranks(neighbours_wait, tmp_path, 4, transport, layout=layout, timeout_s=4.0, stopped=3)
    texts = [line for r in results for line in r.text.splitlines() if line.startswith("error: ")]
    assert len(texts) == 1, results
    assert re.match(
        r"error: rank [012]: rank 3 is behind: its process \(\d+\) has not run for \d+ s \(stopped\?", texts[0]
    )
    assert not re.search(r"rank [012]\b", texts[0].split(": ", 2)[2]), "no other rank is blamed"


def test_a_rank_that_is_busy_alone_is_named(tmp_path: Path) -> None:
    def job(ctx: ParallelContext) -> int:
        if ctx.rank == 0:
            time.sleep(8)
            os._exit(1)
        all_reduce_(torch.zeros(1), ctx.tensor)
        all_reduce_(torch.zeros(1), ctx.world)
        return 0

    results = ranks(job, tmp_path, 3, "auto", timeout_s=2.0)
    text = "".join(r.text for r in results)
    assert re.search(
        r"error: rank [12]: rank 0 is behind: it runs \(process \d+\), but has been busy alone for", text
    ), text


# -- torchrun is killed ------------------------------------------------------------------------------------------------


def test_a_rank_ends_when_torchrun_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    lock = tmp_path / "lock"

    def rank() -> int:
        monkeypatch.setattr(failure, "LAUNCHER", os.getppid())
        with locked(lock) as holder:
            failure.end_with_launcher(Env(1, 2, 0, 2))
            print(holder or "holds it")
            time.sleep(60)
        return 0

    def torchrun() -> int:
        with forked(rank, tmp_path / "rank.log"):
            time.sleep(60)
        return 0

    with forked(torchrun, tmp_path / "log") as pid:
        rank_log = tmp_path / "rank.log"
        assert soon(lambda: rank_log.exists() and "holds it" in rank_log.read_text(), 20)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert soon(lambda: free(lock), 10)
    assert re.search(r"error: rank 1: torchrun \(process \d+\) exited without an error", rank_log.read_text())


def soon(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def free(lock: Path) -> bool:
    with locked(lock) as holder:
        return not holder


def test_on_gpus_the_world_does_not_queue_behind_an_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    """An axis with all ranks has a separate group on GPUs, and every group is connected once, in order."""
    connected: list[Any] = []
    monkeypatch.setattr(context, "_connect_nccl", lambda groups, device: connected.extend(groups))

    def job(ctx: ParallelContext) -> bool:
        on_gpu = make_context(ctx.layout, ctx.rank, dtype=torch.bfloat16, device="cuda:0", connect=True, timeout_s=30.0)
        assert ctx.world.group is ctx.data.group and not ctx.tensor.group
        assert connected == [on_gpu.world.group, on_gpu.data.group]
        all_reduce_(torch.ones(1), ctx.world)  # the other rank may still be connecting to this one
        return on_gpu.world.group is not on_gpu.data.group

    assert run_ranks(Layout(2, data=2), job) == [True, True]
