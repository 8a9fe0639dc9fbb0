"""Runs a function on N ranks (gloo, and shared memory if built), forked from this process, which has imported torch.

It uses no ports (a file store) and one thread per rank. A watchdog dumps every rank's stack, and the first failing
rank's traceback is raised here with its rank.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import sympy  # noqa: F401  torch imports it in its first backward: before the fork it saves a second in each rank
import torch
import torch.distributed as dist

from engine.distributed.context import ParallelContext, make_context
from engine.distributed.layout import Layout

torch.set_num_threads(1)  # before any fork: a child inherits locks of worker threads, but not the threads
_FORK = multiprocessing.get_context("fork")


def run_ranks(
    layout: Layout,
    function: Callable[[ParallelContext], Any],
    *,
    dtype: torch.dtype = torch.float64,
    timeout_s: float = 60.0,
    transport: str = "auto",
) -> list[Any]:
    """function(ctx) on every rank of the layout; returns the results by rank (anything picklable)."""
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(layout.world):
            ours, theirs = _FORK.Pipe(duplex=False)
            args = (theirs, layout, rank, function, os.path.join(folder, "store"), dtype)
            args += (timeout_s, transport)
            process = _FORK.Process(target=_child, args=args)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout_s + 5)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    pending = dict(enumerate(pipes))
    while pending:
        ready = wait(list(pending.values()), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {sorted(pending)} did not finish; their stacks are above")
        for rank in [r for r, pipe in pending.items() if pipe in ready]:
            try:
                ok, value = pickle.loads(pending.pop(rank).recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} exited without a result") from None
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return results


def _child(
    pipe: Connection,
    layout: Layout,
    rank: int,
    function: Callable[[ParallelContext], Any],
    store: str,
    dtype: torch.dtype,
    timeout_s: float,
    transport: str,
) -> None:
    faulthandler.dump_traceback_later(timeout_s, exit=True)
    try:
        if layout.world > 1:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, layout.world),
                rank=rank,
                world_size=layout.world,
                timeout=timedelta(seconds=timeout_s),
            )
        ctx = make_context(
            layout,
            rank,
            dtype=dtype,
            connect=True,
            timeout_s=timeout_s,
            transport=transport,
        )
        message = (True, function(ctx))
    except BaseException:
        message = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(message))
    pipe.close()
    os._exit(0)  # no clean-up that could wait for another rank
