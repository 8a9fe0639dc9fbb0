"""From environment variables to a ParallelContext, and from an exception to one message and one exit code.

The only reader of os.environ. Under torchrun every rank runs the same
command; without it there is one rank and no process group. On one machine gloo is bound to the loopback interface, on
several to the one that leads to the master. Every wait on the way out is bounded: the store may be gone with its host.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import struct
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from engine.distributed.board import Board, Seen
from engine.distributed.context import ParallelContext, make_context
from engine.distributed.layout import Layout
from engine.errors import EXIT_ERROR, EXIT_OK, ConfigError, EngineError, Fault, out_of_memory
from engine.util.signals import LAUNCHER

T = TypeVar("T")

_FIRST = "engine/first_error"
_STARTED, _ALL_STARTED = "engine/started", "engine/all_started"
_LEAVING, _ALL_LEAVE = "engine/leaving", "engine/all_leave"
_START_S = 120.0  # a start may take this long, even where parallel.timeout_s is for quick steps
_PATIENCE_S = 5.0  # a rank that merely lost its peers waits so long for the one that knows the cause
_STORE_S = 2.0  # an answer of the store that takes longer will not come
_LOST = (
    "gloo",
    "NCCL",
    "Connection",
    "DistBackendError",
    "Application timeout",
    "Timed out",
)  # words of torch's errors
_SILENT = ("Application timeout", "Timed out", "timed out", "timeout")
_SIOCGIFADDR = 0x8915  # linux/sockios.h: an interface's IPv4 address
_LOOK_S = 1.0  # so often a rank looks whether torchrun is still there
_LINGER_S = 1.0  # torchrun names the process that ends first as the root cause: a rank with nothing to say ends later


@dataclass(frozen=True)
class Env:
    """What torchrun says about this process; one rank alone without it."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def leave_code(code: int) -> None:
    """Write the exit code of a failed start into the file that ENGINE_EXIT_CODE_FILE names: torchrun always says 1."""
    if file := os.environ.get("ENGINE_EXIT_CODE_FILE"):
        with suppress(OSError):
            Path(file).write_text(f"{code}\n", encoding="utf-8")


def limit_encoder_threads(count: int) -> None:
    """How many threads tokenizer libraries may use. They read it once, at their first batch."""
    os.environ["RAYON_NUM_THREADS"] = str(count)


def read_env() -> Env:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, as torchrun sets them."""
    if "RANK" not in os.environ:
        return Env()
    names = {"rank": "RANK", "world": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_world": "LOCAL_WORLD_SIZE"}
    texts = {name: os.environ.get(name) for name in names.values()}
    faults = [
        Fault("", name, text, f"is not a number, but RANK is set ({texts['RANK']!r})", "Start the ranks with torchrun.")
        for name, text in texts.items()
        if text is None or not text.isdecimal()
    ]
    if faults:
        raise ConfigError(faults)
    return Env(**{field: int(os.environ[name]) for field, name in names.items()})


def read_secret(reference: str) -> bytes:
    """The secret that file:PATH or env:NAME refers to. It is never shown, and what is no reference is not either.

    Raises ConfigError when it is not there, or in a file that others may read.
    """
    kind, colon, name = reference.partition(":")
    if not colon or not name or kind not in ("file", "env"):
        fault = Fault(
            "", "secret", "...", "is neither file:PATH nor env:NAME", "Give where the secret is, not the secret."
        )
        raise ConfigError([fault])
    if kind == "env":
        if name not in os.environ:
            raise ConfigError([Fault("", "secret", reference, "is not set", "Set it to at least 32 characters.")])
        return os.environ[name].encode()
    try:
        if Path(name).stat().st_mode & 0o077:
            raise ConfigError(
                [Fault("", "secret", reference, "others than its owner may read it", f"chmod 600 {name}")]
            )
        return Path(name).read_bytes()
    except OSError as error:
        relation = f"cannot be read: {error.strerror}"
        raise ConfigError([Fault("", "secret", reference, relation, "Give a file of at least 32 bytes.")]) from None


def pick_device(wanted: str, env: Env) -> torch.device:
    """The device of this rank for train.device auto, cpu or cuda. ConfigError when a GPU is asked for in vain."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and gpus < env.local_world):
        return torch.device("cpu")
    if gpus < env.local_world:
        relation = f"{gpus} GPUs for {env.local_world} local ranks"
        repair = "Use auto or cpu, or let each process see all GPUs of its node."
        raise ConfigError([Fault("", "train.device", "cuda", relation, repair)])
    return torch.device("cuda", env.local_rank)


def run(
    main: Callable[[ParallelContext], int],
    env: Env,
    layout: Layout,
    *,
    num_kv_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    timeout_s: float,
    transport: str = "auto",
    told: Callable[[int, str], None] = lambda code, text: None,
) -> int:
    """Connect the ranks, call main(ctx), and return its exit code; an exception becomes a message and a code.

    told: called on the one rank that tells the cause, with the code and the message in one line.

    When one rank fails, the others fail too (their peer is gone). The first cause is printed once, by the rank that
    had it; the others leave quietly. A failed rank of several ends without clean-up: that could wait for the dead.
    """
    store: Store | None = None
    board: Board | None = None
    _end_with_launcher(env)
    if env.rank > 0:
        warnings.simplefilter("ignore")  # rank 0 has the same to say
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if env.world > 1:
            store = _open_store(timeout_s)
            _join(store, env, device, timeout_s)
        ctx = make_context(
            layout,
            env.rank,
            num_kv_heads=num_kv_heads,
            dtype=dtype,
            device=device,
            connect=env.world > 1,
            timeout_s=timeout_s,
            transport=transport,
        )
        if (board := ctx.world.board) is not None:
            board.beat()
        code = main(ctx)
        if store is not None and code != EXIT_OK:
            _leave_together(store, env)
    except Exception as error:
        code = error.exit_code if isinstance(error, EngineError) else EXIT_ERROR
        if text := _report(error, env, store, timeout_s, board):
            leave_code(code)
            told(code, text)
        if store is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code
    if store is not None:
        dist.destroy_process_group()
    return code


def _end_with_launcher(env: Env) -> None:
    """End this rank once torchrun has, as by SIGKILL: nobody else would, and it would keep the run folder locked."""

    def work() -> None:
        while os.getppid() == LAUNCHER:
            time.sleep(_LOOK_S)
        with suppress(OSError):
            if env.local_rank == 0:
                text = f"torchrun (process {LAUNCHER}) has ended without a word (killed?), and so do its ranks"
                print(f"error: rank {env.rank}: {text}; the same command goes on", file=sys.stderr, flush=True)
        os._exit(EXIT_ERROR)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=work, name="launcher", daemon=True).start()


def backends() -> dict[str, bool]:
    """The process-group backends that this torch is built with."""
    return {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}


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


def _open_store(timeout_s: float) -> Store:
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    return store


def _join(store: Store, env: Env, device: torch.device, timeout_s: float) -> None:
    choose_interface(env, device)
    _meet(store, env, max(timeout_s, _START_S))
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=env.rank, world_size=env.world, timeout=timeout)


def _meet(store: Store, env: Env, limit_s: float) -> None:
    """Wait until every rank has come this far: imports from a busy file system may take longer than any step does."""
    if store.add(_STARTED, 1) == env.world:
        store.set(_ALL_STARTED, "1")
    try:
        store.wait([_ALL_STARTED], timedelta(seconds=limit_s))
    except dist.DistStoreError:
        came = _bounded(lambda: store.add(_STARTED, 0), _STORE_S)
        raise EngineError(
            f"only {came if came else 'some'} of {env.world} ranks have started within {limit_s:g} s: look at what the "
            "other nodes say, and that each was started with the same number of ranks"
        ) from None


def choose_interface(env: Env, device: torch.device) -> None:
    """Name the network interface for gloo, unless the user has: loopback on one machine, else the way to the master.

    Left alone, gloo binds to the address that the host's own name resolves to. On many systems that is 127.0.1.1 (a
    line in /etc/hosts), which no other host can reach, or one of several networks that the other hosts are not on. The
    way to MASTER_ADDR is known to work: the store has just been reached over it. NCCL looks at all interfaces itself.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    if env.local_world == env.world:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        return
    if device.type == "cuda":
        return
    master = os.environ.get("MASTER_ADDR", "")
    local = _address_towards(master)
    if local.startswith("127.") and master != "localhost" and not master.startswith("127."):
        relation = f"is {local} on its own host {socket.gethostname()}: no other host reaches it there"
        repair = "Give torchrun the address that the others use (--master-addr; --local-addr with c10d)."
        raise ConfigError([Fault("", "MASTER_ADDR", master, relation, repair)])
    if name := _interface_of(local):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _address_towards(host: str) -> str:
    """This host's IPv4 address on the way to `host`; empty when there is no such way (gloo then does as it likes)."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing: for a datagram socket the kernel only picks the route
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _interface_of(address: str) -> str:
    """The network interface whose first IPv4 address this is; empty for none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("40s", name.encode()))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


def _leave_together(store: Store, env: Env) -> None:
    """Wait until all ranks are about to leave with a code other than 0: torchrun ends the others when one has left.

    Rank 0 may still be writing down how the run ended. Bounded: all is saved, a missing rank is no reason to stay.
    """

    def wait() -> None:
        if store.add(_LEAVING, 1) == env.world:
            store.set(_ALL_LEAVE, "1")
        store.wait([_ALL_LEAVE], timedelta(seconds=_PATIENCE_S))

    _bounded(wait, _PATIENCE_S + _STORE_S)


def _report(error: Exception, env: Env, store: Store | None, timeout_s: float, board: Board | None) -> str:
    """Print the error unless another rank had one before; give torchrun's summary the same text.

    Returns its first line, or its last where it is a traceback; empty when nothing was told.
    """
    expected = isinstance(error, EngineError)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) if expected else out_of_memory(error) or "".join(traceback.format_exception(error)).rstrip()
    lost = False
    if store is not None:
        what = re.sub(r"^\[\S+:\d+\] ", "", str(error).partition("\n")[0])  # without the place in gloo's source
        lost = not expected and any(word in f"{type(error).__name__} {error}" for word in _LOST)
        seen = board.look(timeout_s / 2) if lost and board is not None else Seen()  # now: the others are about to end
        silent = lost and any(word in what for word in _SILENT)  # for timeout_s already: a cause would have been told
        first = _is_first(store, patience_s=0.0 if not lost else _LINGER_S if silent else _PATIENCE_S)
        # Without the store nobody knows who was first. All ranks of this host have lost the same peers: one speaks.
        if first is False or (first is None and lost and env.local_rank > 0):
            time.sleep(_LINGER_S)
            return ""
        if lost:
            text = _lost_contact(what, timeout_s if silent else None, seen, store_gone=first is None)
        text = f"rank {env.rank}: {text}"
        _tell_torchrun(text)
    print(f"error: {text}", file=sys.stderr, flush=True)
    if expected or lost or isinstance(error, OSError):
        return text.partition("\n")[0]
    return f"{f'rank {env.rank}: ' * (store is not None)}{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _lost_contact(what: str, silent_s: float | None, seen: Seen, *, store_gone: bool) -> str:
    """What a rank can say that lost its peers, or waited for them in vain for `silent_s`."""
    here, master = socket.gethostname(), os.environ.get("MASTER_ADDR")
    if store_gone:
        text = f"lost contact with other ranks and with the first node, {master}: that host or the network is down"
    elif silent_s is not None and seen.behind:
        behind = "; ".join(f"rank {rank} is behind: {why}" for rank, why in seen.behind.items())
        text = f"{behind}; others have waited {silent_s:g} s for it (parallel.timeout_s)"
    elif silent_s is not None:
        text = (
            f"no word from another rank for {silent_s:g} s (parallel.timeout_s): its host or the network is down, "
            f"or it hangs{_heard(seen)}"
        )
    else:
        who = f"rank {_listed(seen.ended)}" if seen.ended else "another rank"
        text = f"lost contact with {who}, which went without a word (killed? out of memory?)"
    return (
        f"{text}: {what}\n  Look at the network of {here} and at what the other nodes say, then start the same command "
        "again: it goes on from the last checkpoint."
    )


def _heard(seen: Seen) -> str:
    """Of whom more is known where nobody is found to be behind."""
    waiting = f"; rank {_listed(seen.waiting)} on this host waits as well" if seen.waiting else ""
    return waiting + (f"; what rank {_listed(seen.unknown)} does is not known here" if seen.unknown else "")


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _tell_torchrun(text: str) -> None:
    """Leave the text where torchrun looks for the root cause (the format of torch's elastic ErrorHandler)."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with suppress(OSError):  # a full disk there must not hide the error
            Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}), encoding="utf-8")


def _is_first(store: Store, patience_s: float) -> bool | None:
    """Whether no other rank has reported an error; None when the store is gone, as with its host.

    A rank that merely lost its peers gives the cause time to speak.
    """

    def ask() -> bool:
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline and store.add(_FIRST, 0) == 0:
            time.sleep(0.1)
        return store.add(_FIRST, 1) == 1

    answers = _bounded(lambda: store.add(_FIRST, 0), _STORE_S)
    return None if answers is None else _bounded(ask, patience_s + _STORE_S)


def _bounded(work: Callable[[], T], limit_s: float) -> T | None:
    """The result of `work`, or None when it raises or takes longer than `limit_s`.

    A store's client has no time-out of its own for an answer: on a cut line it waits until TCP gives up, a quarter of
    an hour. The thread is left behind; the caller is about to end the process.
    """
    results: list[T] = []

    def try_it() -> None:
        with suppress(Exception):
            results.append(work())

    thread = threading.Thread(target=try_it, daemon=True)
    thread.start()
    thread.join(limit_s)
    return results[0] if results else None
