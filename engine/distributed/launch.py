"""Connects the ranks of a launcher into a ParallelContext, and turns an exception into one message and exit code.

Under torchrun every rank runs the same command; without it there is one rank and no process group.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from engine.distributed.board import Board
from engine.distributed.context import ParallelContext, make_context
from engine.distributed.env import Env, write_exit_code
from engine.distributed.failure import PATIENCE_S, STORE_S, bounded, end_with_launcher, report
from engine.distributed.layout import Layout
from engine.distributed.network import choose_interface
from engine.errors import EXIT_ERROR, EXIT_OK, EngineError

_STARTED, _ALL_STARTED = "engine/started", "engine/all_started"
_LEAVING, _ALL_LEAVE = "engine/leaving", "engine/all_leave"
_START_S = 120.0  # a start may take this long even if parallel.timeout_s is shorter


@dataclass(frozen=True)
class Mesh:
    """Arguments of `make_context` except the rank; the same on all ranks, except for the device index."""

    layout: Layout
    dtype: torch.dtype
    device: torch.device
    timeout_s: float
    transport: str = "auto"


def run(
    main: Callable[[ParallelContext], int],
    env: Env,
    mesh: Mesh,
    *,
    on_error: Callable[[int, str], None] = lambda code, text: None,
) -> int:
    """Connect the ranks, call main(ctx), and return its exit code; an exception becomes a message and a code.

    on_error: called with the exit code and the message in one line, only on the rank that reports the error.

    When one rank fails, the others fail too (their peer is gone). The first error is printed once, by its rank; the
    other ranks exit without a message. With several ranks a failed one exits without clean-up, which could wait for
    ranks that are gone.
    """
    store: Store | None = None
    board: Board | None = None
    end_with_launcher(env)
    if env.rank > 0:
        warnings.simplefilter("ignore")  # rank 0 prints the same warnings
    try:
        if mesh.device.type == "cuda":
            torch.cuda.set_device(mesh.device)
        if env.world > 1:
            store = _open_store(mesh.timeout_s)
            _init_process_group(store, env, mesh.device, mesh.timeout_s)
        ctx = make_context(
            mesh.layout,
            env.rank,
            dtype=mesh.dtype,
            device=mesh.device,
            connect=env.world > 1,
            timeout_s=mesh.timeout_s,
            transport=mesh.transport,
        )
        if (board := ctx.world.board) is not None:
            board.start_heartbeat()
        code = main(ctx)
        if store is not None and code != EXIT_OK:
            _wait_before_exit(store, env)
    except Exception as error:
        code = error.exit_code if isinstance(error, EngineError) else EXIT_ERROR
        if text := report(error, env, store, mesh.timeout_s, board):
            write_exit_code(code)
            on_error(code, text)
        if store is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code
    if store is not None:
        dist.destroy_process_group()
    return code


def leave(code: int, env: Env) -> int:
    """Exit this rank with `code`; one of several ranks uses os._exit, without interpreter shutdown.

    Threads of the process groups may hold the last reference to a tensor, and releasing it during interpreter shutdown
    aborts the process: seen as SIGABRT after runs whose every step and save had succeeded.
    """
    if env.world > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _open_store(timeout_s: float) -> Store:
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    return store


def _init_process_group(store: Store, env: Env, device: torch.device, timeout_s: float) -> None:
    choose_interface(env, device)
    _wait_for_all_ranks(store, env, max(timeout_s, _START_S))
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=env.rank, world_size=env.world, timeout=timeout)


def _wait_for_all_ranks(store: Store, env: Env, limit_s: float) -> None:
    """Wait until every rank has started: imports from a busy file system may take longer than any step."""
    if store.add(_STARTED, 1) == env.world:
        store.set(_ALL_STARTED, "1")
    try:
        store.wait([_ALL_STARTED], timedelta(seconds=limit_s))
    except dist.DistStoreError:
        started = bounded(lambda: store.add(_STARTED, 0), STORE_S)
        raise EngineError(
            "distributed.ranks-missing",
            f"only {started if started else 'some'} of {env.world} ranks have started within {limit_s:g} s: check the "
            "logs of the other nodes, and that each was started with the same number of ranks",
        ) from None


def _wait_before_exit(store: Store, env: Env) -> None:
    """Before an exit with a code other than 0, wait for all ranks: torchrun kills the others once one has exited.

    Rank 0 may still be writing exit.json. The wait is bounded, because everything is saved already.
    """

    def wait() -> None:
        if store.add(_LEAVING, 1) == env.world:
            store.set(_ALL_LEAVE, "1")
        store.wait([_ALL_LEAVE], timedelta(seconds=PATIENCE_S))

    bounded(wait, PATIENCE_S + STORE_S)


def backends() -> dict[str, bool]:
    """Process-group backend -> whether this torch was built with it."""
    return {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
