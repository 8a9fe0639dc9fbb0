"""From environment variables to a ParallelContext, and from an exception to one message and one exit code.

The only reader of os.environ and the only caller of init_process_group. Under torchrun every rank runs the same
command; without it there is one rank and no process group. On one machine gloo is bound to the loopback interface.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from engine.context import ParallelContext, make_context
from engine.errors import EXIT_ERROR, ConfigError, EngineError, Fault
from engine.layout import Layout

_FIRST = "engine/first_error"
_LINGER_S = 1.0  # torchrun names the process that ends first as the root cause: a rank with nothing to say ends later


@dataclass(frozen=True)
class Env:
    """What torchrun says about this process; one rank alone without it."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def read_env() -> Env:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, as torchrun sets them."""
    if "RANK" not in os.environ:
        return Env()
    names = {"rank": "RANK", "world": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_world": "LOCAL_WORLD_SIZE"}
    texts = {name: os.environ.get(name) for name in names.values()}
    faults = [
        Fault(name, text, f"is not a number, but RANK is set ({texts['RANK']!r})", "Start the ranks with torchrun.")
        for name, text in texts.items()
        if text is None or not text.isdecimal()
    ]
    if faults:
        raise ConfigError(faults)
    return Env(**{field: int(os.environ[name]) for field, name in names.items()})


def pick_device(wanted: str, env: Env) -> torch.device:
    """The device of this rank for train.device auto, cpu or cuda. ConfigError when a GPU is asked for in vain."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and gpus < env.local_world):
        return torch.device("cpu")
    if gpus < env.local_world:
        fault = Fault("train.device", "cuda", f"{gpus} GPUs for {env.local_world} local ranks", "Use auto or cpu.")
        raise ConfigError([fault])
    return torch.device("cuda", env.local_rank)


class StopRequest:
    """SIGTERM or SIGUSR1 asks for a save and an orderly stop; a second one stops at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)

    def __bool__(self) -> bool:
        return self.signal is not None


def run(
    main: Callable[[ParallelContext], int],
    env: Env,
    layout: Layout,
    *,
    num_kv_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    timeout_s: float,
) -> int:
    """Connect the ranks, call main(ctx), and return its exit code; an exception becomes a message and a code.

    When one rank fails, the others fail too (their peer is gone). The first cause is printed once, by the rank that
    had it; the others leave quietly. A failed rank of several ends without clean-up: that could wait for the dead.
    """
    store: Store | None = None
    if env.rank > 0:
        warnings.simplefilter("ignore")  # rank 0 has the same to say
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if env.world > 1:
            store = _connect(env, device, timeout_s)
        ctx = make_context(
            layout,
            env.rank,
            num_kv_heads=num_kv_heads,
            dtype=dtype,
            device=device,
            connect=env.world > 1,
            timeout_s=timeout_s,
        )
        code = main(ctx)
    except Exception as error:
        code = error.exit_code if isinstance(error, EngineError) else EXIT_ERROR
        _report(error, env, store)
        if store is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code
    if store is not None:
        dist.destroy_process_group()
    return code


def leave(code: int, env: Env) -> int:
    """End this rank with `code` when it is one of several, without taking the interpreter down piece by piece.

    Threads of the process groups may still hold the last reference to a tensor; one that reaches for an interpreter
    which is going away aborts the process: seen as SIGABRT after a run whose every step and save had succeeded.
    """
    if env.world > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _connect(env: Env, device: torch.device, timeout_s: float) -> Store:
    if env.local_world == env.world:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = timedelta(seconds=timeout_s)
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return store


def _report(error: Exception, env: Env, store: Store | None) -> None:
    """Print the error unless another rank had one before; give torchrun's summary the same text."""
    expected = isinstance(error, EngineError)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) if expected else "".join(traceback.format_exception(error)).rstrip()
    if store is not None:
        words = ("gloo", "NCCL", "Connection", "DistBackendError")
        lost = not expected and any(word in f"{type(error).__name__} {error}" for word in words)
        if not _is_first(store, patience_s=5.0 if lost else 0.0):
            time.sleep(_LINGER_S)
            return
        if lost:
            what = str(error).splitlines()[0]
            text = f"lost contact with another rank, which went without a word (killed? out of memory?): {what}"
        text = f"rank {env.rank}: {text}"
        _tell_torchrun(text)
    print(f"error: {text}", file=sys.stderr, flush=True)


def _tell_torchrun(text: str) -> None:
    """Leave the text where torchrun looks for the root cause (the format of torch's elastic ErrorHandler)."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def _is_first(store: Store, patience_s: float) -> bool:
    """Whether no other rank has reported an error. A rank that merely lost its peers gives the cause time to speak."""
    try:
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline and store.add(_FIRST, 0) == 0:
            time.sleep(0.1)
        return store.add(_FIRST, 1) == 1
    except Exception:  # the store died with its host: then everybody speaks
        return True
