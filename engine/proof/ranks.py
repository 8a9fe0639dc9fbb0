"""Runs a function on every rank of a layout, each a forked process of this machine, and returns the results.

The ranks meet in a file store, so no port is used, and each has one thread. A watchdog prints every rank's stack if a
rank does not finish. Results travel through pipes as JSON and raw arrays, never as pickles.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from engine.distributed.context import ParallelContext, make_context
from engine.distributed.layout import Layout
from engine.errors import EngineError

_ARRAY = "array of bytes"  # key of an array in the JSON part of a message: (dtype, shape)
_WATCHDOG_S = 5.0  # the ranks print their stacks when their time is over; the caller waits this much longer


class RankError(EngineError):
    """A rank failed. rank: which one; -1: ranks that did not finish. trace: its traceback."""

    def __init__(self, code: str, message: str, rank: int = -1, trace: str = ""):
        super().__init__(code, message)
        self.rank, self.trace = rank, trace


def run(
    layout: Layout,
    function: Callable[[ParallelContext], Any],
    dtype: torch.dtype = torch.float64,
    transport: str = "auto",
    *,
    timeout_s: float = 60.0,
) -> list[Any]:
    """function(ctx) on every rank of a layout, on CPUs; returns the results by rank.

    A result is a JSON value that may contain numpy arrays; tuples come back as lists. Call it in a process without
    other threads that compute: it forks, and sets torch to one thread. Raises RankError if a rank fails, with the code
    of its error if that was expected, or if ranks do not finish within `timeout_s`.
    """
    torch.set_num_threads(1)  # before any fork: a child inherits locks of worker threads, but not the threads
    importlib.import_module("sympy")  # torch imports it in its first backward: here it saves a second in each rank
    fork = multiprocessing.get_context("fork")
    deadline = time.monotonic() + timeout_s  # before the watchdog of any rank
    with tempfile.TemporaryDirectory() as folder:
        pipes: list[Connection] = []
        processes = []
        for rank in range(layout.world):
            ours, theirs = fork.Pipe(duplex=False)
            pipes.append(ours)

            def body(rank: int = rank, pipe: Connection = theirs) -> None:
                faulthandler.dump_traceback_later(timeout_s, exit=True, file=2)
                for inherited in pipes:  # else a rank whose caller was killed would wait for a reader
                    inherited.close()
                _rank(pipe, lambda: function(_connect(layout, rank, f"{folder}/store", dtype, transport, timeout_s)))

            processes.append(fork.Process(target=body))
            processes[rank].start()
            theirs.close()
        try:
            return _collect(pipes, deadline)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _connect(
    layout: Layout, rank: int, store: str, dtype: torch.dtype, transport: str, timeout_s: float
) -> ParallelContext:
    if layout.world > 1:
        files, _, _ = next(rendezvous(f"file://{store}", rank, layout.world))
        limit = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", store=files, rank=rank, world_size=layout.world, timeout=limit)
    return make_context(layout, rank, dtype=dtype, connect=True, timeout_s=timeout_s, transport=transport)


def _rank(pipe: Connection, work: Callable[[], Any]) -> None:
    """Send the result of `work`, or its error, and end this process without clean-up that could wait for another."""
    try:
        message = pack({"result": work()})
    except BaseException as error:
        code, text = (error.code, str(error)) if isinstance(error, EngineError) else ("", repr(error))
        message = pack({"code": code, "text": text, "trace": traceback.format_exc()})
    with suppress(OSError):  # the caller has ended
        pipe.send_bytes(message)
    os._exit(0)


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    pending = dict(enumerate(pipes))
    while pending:
        ready = wait(list(pending.values()), max(0.0, deadline + _WATCHDOG_S - time.monotonic()))
        if not ready or time.monotonic() >= deadline:  # the watchdog may have ended the ranks already
            which = ", ".join(map(str, sorted(pending)))
            raise RankError("proof.ranks-hang", f"rank {which} did not finish in time; the stacks are above")
        for rank in [r for r, pipe in pending.items() if pipe in ready]:
            try:
                answer = unpack(pending.pop(rank).recv_bytes())
            except EOFError:
                raise RankError("proof.rank-killed", f"rank {rank} exited without a result", rank) from None
            if "result" not in answer:
                text = f"rank {rank} failed: {answer['text'] if answer['code'] else answer['trace']}"
                error = RankError("proof.rank-failed", text, rank, answer["trace"])
                error.code = answer["code"] or error.code
                raise error
            results[rank] = answer["result"]
    return results


def pack(value: Any) -> bytes:
    """A JSON value that may contain numpy arrays, as bytes: the length of the JSON, the JSON, the arrays' bytes.

    TypeError if it contains another object.
    """
    arrays: list[np.ndarray[Any, Any]] = []

    def array(x: object) -> dict[str, Any]:
        if isinstance(x, np.generic):
            x = np.asarray(x)
        if not isinstance(x, np.ndarray) or x.dtype.hasobject:
            raise TypeError(f"a rank returned a {type(x).__name__}: return JSON values and arrays of numbers")
        arrays.append(np.ascontiguousarray(x))
        return {_ARRAY: [x.dtype.str, list(x.shape)]}

    text = json.dumps(value, default=array).encode()
    return b"".join([len(text).to_bytes(8, "little"), text, *(x.tobytes() for x in arrays)])


def unpack(message: bytes) -> Any:
    """The value that `pack` has packed."""
    at = 8 + int.from_bytes(message[:8], "little")

    def array(found: dict[str, Any]) -> Any:
        nonlocal at
        if _ARRAY not in found:
            return found
        dtype, shape = np.dtype(found[_ARRAY][0]), tuple(found[_ARRAY][1])
        begin, at = at, at + dtype.itemsize * int(np.prod(shape))
        return np.frombuffer(message, np.uint8, at - begin, begin).view(dtype).reshape(shape).copy()

    return json.loads(message[8:at], object_hook=array)
