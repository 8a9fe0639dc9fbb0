"""Error reports of failed ranks, lost peers and a lost launcher: one message, from one rank.

Every wait is bounded, because the store may be gone with its host.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from torch.distributed.distributed_c10d import Store

from engine.distributed.board import Board, PeerStatus
from engine.distributed.env import Env, master_address, torchrun_error_file, under_torchrun
from engine.errors import EXIT_ERROR, EngineError, out_of_memory_help
from engine.util.signals import LAUNCHER

T = TypeVar("T")

_FIRST = "engine/first_error"
PATIENCE_S = 5.0  # a rank that merely lost its peers waits this long for the rank that knows the cause to report
STORE_S = 2.0  # after this time an answer of the store will not come
_LOST_CONTACT_TEXTS = (
    "gloo",
    "NCCL",
    "Connection",
    "DistBackendError",
    "Application timeout",
    "Timed out",
)  # parts of torch's error messages
_TIMEOUT_TEXTS = ("Application timeout", "Timed out", "timed out", "timeout")
_POLL_S = 1.0  # interval at which a rank checks that torchrun still runs
_LINGER_S = 1.0  # torchrun calls the process that ends first the root cause: ranks without a report end later


def report(error: Exception, env: Env, store: Store | None, timeout_s: float, board: Board | None) -> str:
    """Print the error unless another rank has reported one before, and give torchrun's summary the same text.

    Returns the message in one line; empty if nothing was printed.
    """
    expected = isinstance(error, EngineError)
    if isinstance(error, EngineError):
        text = error.report()
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = out_of_memory_help(error) or "".join(traceback.format_exception(error)).rstrip()
    lost = False
    if store is not None:
        first_line = re.sub(r"^\[\S+:\d+\] ", "", str(error).partition("\n")[0])  # drops the place in gloo's source
        lost = not expected and any(word in f"{type(error).__name__} {error}" for word in _LOST_CONTACT_TEXTS)
        # read the status now: the other ranks are about to end
        peers = board.peer_status(timeout_s / 2) if lost and board is not None else PeerStatus()
        timed_out = lost and any(part in first_line for part in _TIMEOUT_TEXTS)
        # after a time-out of timeout_s, a rank that knew the cause would have reported it: a short wait is enough
        first = _is_first(store, patience_s=0.0 if not lost else _LINGER_S if timed_out else PATIENCE_S)
        # Without the store the first rank is unknown. All ranks of this host have lost the same peers: one reports.
        if first is False or (first is None and lost and env.local_rank > 0):
            time.sleep(_LINGER_S)
            return ""
        if lost:
            text = _lost_contact(first_line, timeout_s if timed_out else None, peers, store_gone=first is None)
        text = f"rank {env.rank}: {text}"
        _write_torchrun_error(text)
    print(f"error: {text}", file=sys.stderr, flush=True)
    if expected or lost or isinstance(error, OSError):
        return text.partition("\n")[0]
    return f"{f'rank {env.rank}: ' * (store is not None)}{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _lost_contact(error: str, silent_s: float | None, peers: PeerStatus, *, store_gone: bool) -> str:
    """The message of a rank that lost its peers, or waited for them for `silent_s` without an answer."""
    here, master = socket.gethostname(), master_address()
    if store_gone:
        text = f"lost contact with other ranks and with the first node, {master}: that host or the network is down"
    elif silent_s is not None and peers.behind:
        behind = "; ".join(f"rank {rank} is behind: {why}" for rank, why in peers.behind.items())
        text = f"{behind}; others have waited {silent_s:g} s for it (parallel.timeout_s)"
    elif silent_s is not None:
        text = (
            f"no message from another rank for {silent_s:g} s (parallel.timeout_s): its host or the network is down, "
            f"or it hangs{_others_status(peers)}"
        )
    else:
        who = f"rank {_joined(peers.ended)}" if peers.ended else "another rank"
        text = f"lost contact with {who}, which exited without an error message (killed? out of memory?)"
    return (
        f"{text}: {error}\n  Check the network of {here} and the logs of the other nodes, then start the same command "
        "again: it resumes from the last checkpoint."
    )


def _others_status(peers: PeerStatus) -> str:
    """Status of the other ranks for a message, when none was found to be behind."""
    waiting = f"; rank {_joined(peers.waiting)} on this host waits as well" if peers.waiting else ""
    return waiting + (f"; the state of rank {_joined(peers.unknown)} is not known here" if peers.unknown else "")


def _joined(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _write_torchrun_error(text: str) -> None:
    """Write the text where torchrun reads the root cause (the format of torch's elastic ErrorHandler)."""
    if file := torchrun_error_file():
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with suppress(OSError):  # a full disk there must not hide the error
            Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}), encoding="utf-8")


def _is_first(store: Store, patience_s: float) -> bool | None:
    """Whether no other rank has reported an error; None if the store is gone.

    A rank that merely lost its peers first waits `patience_s` for the rank that knows the cause to report.
    """

    def ask() -> bool:
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline and store.add(_FIRST, 0) == 0:
            time.sleep(0.1)
        return store.add(_FIRST, 1) == 1

    answers = bounded(lambda: store.add(_FIRST, 0), STORE_S)
    return None if answers is None else bounded(ask, patience_s + STORE_S)


def end_with_launcher(env: Env) -> None:
    """End this rank when torchrun is gone, as after SIGKILL: the rank would hang and keep the run folder locked."""

    def work() -> None:
        while os.getppid() == LAUNCHER:
            time.sleep(_POLL_S)
        with suppress(OSError):
            if env.local_rank == 0:
                text = f"torchrun (process {LAUNCHER}) exited without an error message (killed?), so its ranks end too"
                print(f"error: rank {env.rank}: {text}; the same command resumes", file=sys.stderr, flush=True)
        os._exit(EXIT_ERROR)

    if under_torchrun():
        threading.Thread(target=work, name="launcher", daemon=True).start()


def bounded(work: Callable[[], T], limit_s: float) -> T | None:
    """The result of `work`, or None when it raises or takes longer than `limit_s`.

    A store's client has no time-out for an answer: on a broken connection it waits until TCP gives up, a quarter of an
    hour. The thread is abandoned; the caller is about to end the process.
    """
    results: list[T] = []

    def try_it() -> None:
        with suppress(Exception):
            results.append(work())

    thread = threading.Thread(target=try_it, daemon=True)
    thread.start()
    thread.join(limit_s)
    return results[0] if results else None
