"""Communication test between two new processes on this machine, over gloo or shared memory, for `engine doctor`."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from engine.distributed.context import make_context
from engine.distributed.env import Env
from engine.distributed.layout import Layout
from engine.distributed.network import choose_interface
from engine.errors import ConfigError

_END_S = 2.0  # a process whose pipe has closed ends within this time


def try_pair(transport: str, timeout_s: float) -> str:
    """All-reduce a number between two new processes over gloo, or over shared memory ("shared"); "" or the error.

    Takes some seconds. The processes connect through a file store and gloo, bound to the interface that ranks of a
    training run on one machine would use.
    """
    spawn = multiprocessing.get_context("spawn")  # this process may have threads, whose locks a fork would copy
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as folder:
        pending: dict[Connection, int] = {}
        ranks = []
        for rank in range(2):
            ours, theirs = spawn.Pipe(duplex=False)
            ranks.append(
                spawn.Process(target=_one_of_two, args=(theirs, rank, f"{folder}/store", transport, timeout_s))
            )
            ranks[rank].start()
            theirs.close()
            pending[ours] = rank
        try:
            while pending:
                ready = [p for p in wait(list(pending), max(0.0, deadline - time.monotonic())) if p in pending]
                if not ready:
                    return f"no answer within {timeout_s:g} s from rank {min(pending.values())}"
                for pipe in ready:
                    if answer := _answer(pipe, ranks[rank := pending.pop(pipe)]):
                        return f"rank {rank}: {answer}"
        finally:
            for process in ranks:
                process.kill()
                process.join()
    return ""


def _answer(pipe: Connection, process: SpawnProcess) -> str:
    try:
        return pipe.recv_bytes().decode()
    except EOFError:
        process.join(_END_S)
        return f"exited without an error message (exit code {process.exitcode})"


def _one_of_two(pipe: Connection, rank: int, file: str, transport: str, timeout_s: float) -> None:
    try:
        env = Env(rank, 2, rank, 2)
        choose_interface(env, torch.device("cpu"))
        store, _, _ = next(rendezvous(f"file://{file}", rank, 2))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=timeout_s))
        number = torch.tensor([rank + 1.0])
        ctx = make_context(
            Layout(2, data=2),
            rank,
            dtype=number.dtype,
            connect=True,
            timeout_s=timeout_s,
            transport=transport,
        )
        if ctx.world.link is None:
            dist.all_reduce(number)
        else:
            ctx.world.link.all_reduce(number, "sum").wait()
        answer = "" if number.item() == 3.0 else f"the sum of 1 and 2 came out as {number.item()}"
    except ConfigError as error:
        answer = error.errors[0].problem
    except Exception as error:
        answer = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    pipe.send_bytes(answer.encode())
    time.sleep(timeout_s)  # until it is killed: closing the connection early can lose the other process's answer
