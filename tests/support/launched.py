"""Forked ranks in the environment of torchrun: the agent's store, variables, exit codes and output."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from engine.distributed.collectives import all_reduce_
from engine.distributed.context import ParallelContext
from engine.distributed.env import Env, read_env
from engine.distributed.launch import Mesh, run
from engine.distributed.layout import Layout
from engine.errors import DataError
from engine.util.signals import STOP_SIGNALS

CPU = torch.device("cpu")
TWO = Layout(2, data=2)
DAMAGED = "corpus.bin: 3 bytes at offset 12, expected 4: prepare it again"
PRINTED = f"{DAMAGED} [data.damaged]"  # the message as printed
RankFunction = Callable[[ParallelContext], int]


def start(job: RankFunction, env: Env, layout: Layout, timeout_s: float = 20.0, transport: str = "auto") -> int:
    """launch.run as the command line calls it."""
    return run(job, env, Mesh(layout, torch.float32, CPU, timeout_s, transport))


def last_rank_fails(ctx: ParallelContext) -> int:
    if ctx.rank == ctx.layout.world - 1:
        raise DataError("data.damaged", DAMAGED)
    all_reduce_(torch.zeros(1), ctx.world)  # waits for a rank that will not come
    return 0


@dataclass(frozen=True)
class RankExit:
    """How a rank ended: its exit code (negative: the signal that killed it) and its output."""

    code: int
    text: str


@contextmanager
def forked(body: Callable[[], int], log: Path) -> Iterator[int]:
    """Run `body` in a child process with output to `log`; its result is the exit code. Yields the process id.

    This process must have no other threads: a child that inherits a locked lock of the C library hangs.
    """
    pid = os.fork()
    if pid == 0:
        try:
            fd = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            sys.stdout = sys.stderr = os.fdopen(fd, "w", buffering=1)
            for number in STOP_SIGNALS:  # a command that ran in this process may have left handlers
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            os._exit(body())
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        os._exit(99)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):  # normally it has ended and been waited for
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def wait_for_exit(pid: int, log: Path) -> RankExit:
    return RankExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), log.read_text())


def ranks(
    job: RankFunction,
    tmp_path: Path,
    world: int = 2,
    transport: str = "auto",
    *,
    layout: Layout | None = None,
    timeout_s: float = 20.0,
    stopped: int | None = None,
) -> list[RankExit]:
    """Run a job on forked ranks, with the environment and the store of torchrun's agent.

    stopped: a rank that does not end by itself; it is killed when the others have ended.
    """
    reader, writer = os.pipe()

    def agent() -> int:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writer, str(store.port).encode())
        time.sleep(60)
        return 0

    def body(rank: int, port: str) -> int:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.pop("TORCHELASTIC_ERROR_FILE", None)
        return start(job, read_env(), layout or Layout(world, data=world), timeout_s, transport)

    logs = [tmp_path / f"rank{rank}.log" for rank in range(world)]
    with ExitStack() as stack:
        stack.enter_context(forked(agent, tmp_path / "agent.log"))
        port = os.read(reader, 20).decode()
        pids = [stack.enter_context(forked(functools.partial(body, rank, port), log)) for rank, log in enumerate(logs)]
        order = sorted(range(world), key=lambda rank: rank == stopped)
        found = {}
        for rank in order:
            if rank == stopped:
                os.kill(pids[rank], signal.SIGKILL)
            found[rank] = wait_for_exit(pids[rank], logs[rank])
        results = [found[rank] for rank in range(world)]
    os.close(reader)
    os.close(writer)
    return results
