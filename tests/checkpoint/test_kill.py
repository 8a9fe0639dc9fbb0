"""Real processes on a real disk: SIGKILL and errors injected by strace at every system call of a save; a full disk."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.format import find_damage, newest_step, step_dir
from engine.checkpoint.load import Reader
from engine.checkpoint.save import Saver
from engine.checkpoint.storage import DISK
from engine.distributed.collectives import gather_json
from engine.distributed.context import ParallelContext
from engine.distributed.layout import Layout
from engine.distributed.sharding import Parameter
from engine.distributed.specs import Chunk, ShardSpec
from engine.errors import EngineError
from engine.optim.optimizer import StateShard
from tests.support.harness import run_ranks
from tests.support.tiny_states import METADATA, SHAPES, context, states, values

STRACE = shutil.which("strace")
needs_strace = pytest.mark.skipif(not STRACE, reason="strace is not installed (apt-get install strace)")

# each row: one kind of call, with its names on different architectures
CALLS = ["pwrite64", "fsync", "rename,?renameat,?renameat2", "unlink,?unlinkat", "rmdir", "mkdir,?mkdirat", "fallocate"]
MORE = ["openat", "getdents64", "close"]


@contextmanager
def injected(calls: str, injection: str, log: Path) -> Iterator[None]:
    """Attach strace to this process and all its threads, and apply `injection` to the calls."""
    names = ",".join(name if name.startswith("?") else f"?{name}" for name in calls.split(","))
    command = [str(STRACE), "-f", "-o", str(log), "-e", f"trace={names}", "-e", f"inject={names}:{injection}"]
    tracer = subprocess.Popen([*command, "-p", str(os.getpid())], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    line = tracer.stderr.readline()
    if "attached" not in line:
        tracer.kill()
        pytest.skip(f"strace may not trace: {line}")
    try:
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(20)


def save(root: Path, step: int, ctx: ParallelContext, *, keep: int = 0, block_bytes: int = 200) -> tuple[str, ...]:
    with Saver(root, ctx, keep=keep, block_bytes=block_bytes) as saver:
        part, parts = ctx.data.rank, ctx.data.size
        saver.start(states(step, part, parts), step=step, metadata=METADATA, background=False)
        return saver.finish().notes


def check(root: Path, allowed: set[int]) -> int:
    """The newest checkpoint, checked to be complete and to have the right values."""
    step = newest_step(root)
    assert step in allowed
    with Reader(step_dir(root, step)) as reader:
        assert not list(find_damage(reader.folder, reader.manifest))
        for kind in ("model", "exp_avg", "exp_avg_sq"):
            for name in SHAPES:
                assert torch.equal(reader.read_whole(kind, name), values(step, kind, name, 0))
    return step


def child(body: Callable[[], None]) -> int:
    """Run `body` in a forked process; returns its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_everywhere(tmp_path: Path, calls: list[str]) -> int:
    fired = 0
    for kind in calls:
        at = 0
        while True:
            at += 1
            root = tmp_path / f"{kind.split(',')[0]}{at}"
            for step in (1, 2):
                save(root, step, context())

            def body(root: Path = root, kind: str = kind, at: int = at) -> None:
                with injected(kind, f"signal=KILL:when={at}", root.parent / "log"):
                    save(root, 3, context(), keep=1)

            code = child(body)
            if code == 0:
                check(root, {3})
                break
            assert code == -signal.SIGKILL, code
            fired += 1
            check(root, {2, 3})
            save(root, 3, context(), keep=1)
            assert check(root, {3}) == 3 and os.listdir(root) == ["step_00000003"]
            shutil.rmtree(root)
        assert at > 1 or kind == "fallocate", f"no {kind} in a save?"
    return fired


@needs_strace
@pytest.mark.parametrize(
    "calls", [["rename,?renameat,?renameat2"], pytest.param(CALLS + MORE, marks=pytest.mark.heavy)]
)
@pytest.mark.timeout(600)
def test_killed_at_every_system_call(tmp_path: Path, calls: list[str]) -> None:
    """The save deletes two older checkpoints, so the clean-up is tested too."""
    fired = kill_everywhere(tmp_path, calls)
    print(f"SIGKILL at system calls {calls}: {fired} fired; each time the old or the new checkpoint loaded")
    assert fired >= 3


def errors_everywhere(ctx: ParallelContext, tmp_path: Path, kind: str, error: str, failing: int) -> list[Any]:
    """For each rank: [(whether the error fired, message, seconds)] of saves with an error at the 1st, 2nd, ... call."""
    seen: list[Any] = []
    while True:
        root = tmp_path / f"{len(seen)}"
        save(root, 1, ctx)
        message, log = "", tmp_path / f"log{ctx.rank}"
        begin = time.monotonic()
        try:
            if ctx.rank == failing:
                with injected(kind, f"error={error}:when={len(seen) + 1}", log):
                    begin = time.monotonic()
                    notes = save(root, 2, ctx, keep=1)
            else:
                notes = save(root, 2, ctx, keep=1)
            message = "".join(notes) and f"note: {notes[0]}"
        except EngineError as fault:
            message = str(fault)
        seconds = time.monotonic() - begin
        hit = ctx.rank == failing and "(INJECTED)" in log.read_text()
        fired = any(gather_json(hit, ctx.world, ctx.device))
        if not fired:
            return seen
        seen.append((message, seconds))
        if ctx.rank == 0:
            check(root, {1, 2})
        gather_json(None, ctx.world, ctx.device)
        save(root, 2, ctx, keep=1)
        if ctx.rank == 0:
            check(root, {2})
            assert os.listdir(root) == ["step_00000002"]


ERRORS = [(kind, error) for kind in CALLS for error in ("ENOSPC", "EIO")]
QUICK = [("pwrite64", "ENOSPC"), ("fsync", "EIO")]


@needs_strace
@pytest.mark.parametrize("cases", [QUICK, pytest.param(ERRORS, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.timeout(600)
def test_an_error_at_every_call_on_either_rank(tmp_path: Path, cases: list[tuple[str, str]], failing: int) -> None:
    fired = 0

    folders = {(kind, error): tmp_path / f"{kind.split(',')[0]}-{error}" for kind, error in cases}
    for folder in folders.values():
        folder.mkdir()

    def job(ctx: ParallelContext) -> list[list[Any]]:
        return [errors_everywhere(ctx, folder, *case, failing) for case, folder in folders.items()]

    both = run_ranks(Layout(2, data=2), job, timeout_s=500)
    for (kind, error), *results in zip(cases, *both):
        text = {"ENOSPC": "No space left on device", "EIO": "Input/output error"}[error]
        for messages in zip(*results):
            fired += 1
            texts = [message for message, _ in messages]
            assert all(texts) == any(texts), f"one rank failed and another did not: {texts}"
            assert max(seconds for _, seconds in messages) < 10
            if texts[0] and not texts[0].startswith("note: "):
                assert all("bytes needed here" in t and "bytes free" in t and text in t for t in texts), (kind, texts)
    print(f"errors on rank {failing} of 2 at {[k for k, _ in cases]}: {fired} fired, told on both ranks within 10 s")
    assert fired >= 4


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """On a tmpfs of 512 KiB in a separate mount namespace, a save that does not fit is an error and frees its space."""

    def body() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(0x00020000) != 0:  # CLONE_NEWNS
            os._exit(77)
        for command in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", "size=512k", "none", str(tmp_path)]):
            if subprocess.run(["mount", *command], stderr=subprocess.DEVNULL, check=False).returncode:
                os._exit(77)
        root, ctx = tmp_path / "checkpoints", context()
        save(root, 1, ctx)
        free = DISK.free_bytes(tmp_path)
        p = Parameter(torch.empty(100_000, dtype=torch.float64), ShardSpec((Chunk("a.weight", (100_000,)),)))
        with Saver(root, ctx) as saver:
            saver.start([StateShard("model", p, 0, p.data)], step=2, metadata=METADATA, background=False)
            with pytest.raises(
                EngineError, match=r"No space left on device; 800,000 bytes needed here, \d\d\d,\d\d\d b"
            ):
                saver.finish()
        assert check(root, {1}) == 1 and os.listdir(root) == ["step_00000001"]
        assert DISK.free_bytes(tmp_path) >= free
        save(root, 2, ctx)
        check(root, {2})

    code = child(body)
    if code == 77:
        pytest.skip("no right to mount a tmpfs")
    assert code == 0
