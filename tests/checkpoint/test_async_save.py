"""Background saves write the state at the time of the call, and the same files as blocking saves."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engine.train.loop as loop_module
from engine.checkpoint import staging
from engine.checkpoint import storage as storage_module
from engine.checkpoint.format import find_damage, read_manifest, step_dir
from engine.checkpoint.save import Saver
from engine.checkpoint.storage import Disk
from engine.data.samples.indexed_writer import IndexedWriter
from engine.distributed.context import ParallelContext
from engine.errors import EngineError
from engine.monitor.metrics import read_metrics
from engine.train.loop import train
from engine.train.resume import manifest_fields
from engine.train.state import TrainState, setup
from engine.train.step import train_step
from engine.util.files import locked
from engine.util.signals import StopRequest
from tests.support.cases import config, layout_of, random_batches, resolve, same_bytes
from tests.support.checkpoints import complete_steps
from tests.support.harness import run_ranks

METADATA: dict[str, Any] = {"prefix": "x", "num_documents": 1, "num_tokens": 1, "tokenizer_digest": None}


TWO = config(2, parallel_data=2, parallel_zero=1)


def start(saver: Saver, state: TrainState, *, background: bool) -> None:
    states = state.optimizer.states(owned=True)
    saver.start(states, step=state.step, metadata=manifest_fields(state, METADATA), background=background)


def spoil(state: TrainState) -> None:
    """Overwrite all states that a checkpoint contains."""
    with torch.no_grad():
        for held in state.optimizer.states():
            held.flat.fill_(-1.0)
    state.scale.value, state.optimizer.steps, state.step = 1.0, 10**6, state.step + 1


CASES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "tensor": ({"parallel_tensor": 2}, torch.float64),
    "zero, gather still under way": (
        {"parallel_data": 2, "parallel_zero": 1, "parallel_overlap_gather": True},
        torch.float64,
    ),
    "bf16 masters": ({"parallel_pipeline": 2, "train_precision": "bf16"}, torch.bfloat16),
    "fp16 scale": (
        {"parallel_data": 2, "parallel_zero": 1, "train_precision": "fp16", "train_loss_scale": 2.0**10},
        torch.float16,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_those_of_a_save_that_waits(tmp_path: Path, case: str) -> None:
    overrides, dtype = CASES[case]
    cfg = config(2, **overrides)

    def job(ctx: ParallelContext) -> None:
        state = setup(cfg, ctx)
        with Saver(tmp_path / "waits", ctx) as waits, Saver(tmp_path / "background", ctx) as background:
            for step in range(2):  # the second save reuses the buffers (NeMo-RL#3312 always wrote the first state)
                train_step(state, random_batches(cfg, ctx, step))
                start(background, state, background=True)
                background.wait_copied()  # as train_step does before its update
                start(waits, state, background=False)
                waits.finish()
                kept = (state.scale.value, state.optimizer.steps, state.step)
                copies = [held.flat.clone() for held in state.optimizer.states()]
                spoil(state)
                background.finish()
                (state.scale.value, state.optimizer.steps, state.step) = kept
                for held, copy in zip(state.optimizer.states(), copies):
                    held.flat.copy_(copy)
                state.optimizer.masters_to_weights()

    run_ranks(layout_of(cfg), job, dtype=dtype)
    different = []
    for step in (1, 2):
        a, b = (step_dir(tmp_path / name, step) for name in ("waits", "background"))
        assert sorted(os.listdir(a)) == sorted(os.listdir(b)) and len(os.listdir(a)) == 3
        for name in os.listdir(a):
            same_bytes(a / name, b / name)
        different.append((a / "rank00000.safetensors").read_bytes())
    assert different[0] != different[1]


@pytest.mark.parametrize(
    "guarded", [True, pytest.param(False, marks=pytest.mark.xfail(strict=True, raises=AssertionError))]
)
def test_an_update_waits_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool) -> None:
    """The copy is late: the next step's forward and backward may overtake it, but its update must wait."""
    copy, update_is_next = staging._copy, threading.Event()

    def late(states: Any, copies: Any) -> None:
        assert update_is_next.wait(60)
        copy(states, copies)

    monkeypatch.setattr(staging, "_copy", late)

    def job(ctx: ParallelContext) -> None:
        state = setup(TWO, ctx)
        with Saver(tmp_path / "waits", ctx) as waits, Saver(tmp_path / "background", ctx) as background:
            train_step(state, random_batches(TWO, ctx, 0))
            update_is_next.set()
            start(waits, state, background=False)
            waits.finish()
            update_is_next.clear()
            start(background, state, background=True)  # would not return if it waited for the copy
            if guarded:
                state.before_update = lambda: (update_is_next.set(), background.wait_copied())
            train_step(state, random_batches(TWO, ctx, 1))
            update_is_next.set()
            background.finish()

    run_ranks(layout_of(TWO), job)
    for name in os.listdir(tmp_path / "waits/step_00000001"):
        a, b = (tmp_path / root / "step_00000001" / name for root in ("waits", "background"))
        same_bytes(a, b)


class Slow(Disk):
    """A storage whose files are slow, so that training can overtake a save; counts concurrent saves."""

    delay = 0.0
    writing: set[str]
    most = 0

    def __init__(self) -> None:
        self.writing = set()

    def create(self, path: Path, size: int) -> storage_module.Writer:
        self.writing.add(path.parent.name)
        self.most = max(self.most, len(self.writing))
        time.sleep(self.delay)
        return super().create(path, size)

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self.writing.discard(old.name)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("where", ["safetensors", "manifest.json"])
def test_an_error_surfaces_at_the_next_step_on_all_ranks(tmp_path: Path, failing: int, where: str) -> None:
    if where == "manifest.json":
        failing = 0  # who writes it

    def job(ctx: ParallelContext) -> tuple[str, float]:
        class Full(Slow):
            def create(self, path: Path, size: int) -> storage_module.Writer:
                if ctx.rank == failing and path.name.endswith(where) and "00000002" in str(path):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                return super().create(path, size)

        disk = Full()
        disk.delay = 0.0 if ctx.rank == failing else 0.5
        state = setup(TWO, ctx)
        with Saver(tmp_path, ctx, storage=disk) as saver:
            message, begin = "", 0.0
            for step in range(1, 200):
                train_step(state, random_batches(TWO, ctx, step))
                if step <= 2:
                    start(saver, state, background=True)
                    if step == 1:
                        saver.finish()
                    begin = time.monotonic()
                    continue
                flags = torch.tensor([float(saver.busy), float(saver.failed)])
                torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
                try:
                    assert saver.advance(*(bool(f) for f in flags.tolist())) is None
                except EngineError as error:
                    message = str(error)
                    break
            assert saver.in_flight is None
            disk.delay = 0.0
            state.step = 3
            start(saver, state, background=True)
            saver.finish()
        return message, time.monotonic() - begin

    results = run_ranks(layout_of(TWO), job)
    for message, seconds in results:
        assert "checkpoint not saved" in message and "No space left on device" in message and where in message
        assert "bytes needed here" in message and seconds < 10
    assert complete_steps(tmp_path) == [1, 3] and not [n for n in os.listdir(tmp_path) if n.startswith(".")]


def corpus(folder: Path) -> str:
    rng = random.Random(1)
    with IndexedWriter(folder / "corpus", vocab_size=61) as writer:
        for _ in range(200):
            writer.add(np.array([rng.randrange(61) for _ in range(rng.randrange(5, 60))], np.int64))
        writer.finish({})
    return str(folder / "corpus")


LOOP = loop_module._loop


def run(cfg: Any, ctx: ParallelContext, delay: float, disk_delay: float) -> tuple[int, int]:
    """Train on this rank, with SIGTERM to the last rank `delay` s after its loop starts.

    Returns (exit code, largest number of concurrent saves).
    """
    disk = Slow()
    disk.delay = disk_delay
    loop_module.open_storage = lambda reference, encrypt=False: disk  # each rank is a process, so this is not undone
    stop = StopRequest()
    timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM))

    def begun(*args: Any) -> tuple[int, str]:
        if delay and ctx.rank == ctx.world.size - 1:
            timer.start()
        return LOOP(*args)

    loop_module._loop = begun
    try:
        return train(cfg, ctx, stop), disk.most if ctx.rank == 0 else 1  # rank 0 renames, so it sees the end of each
    finally:
        timer.cancel()


@pytest.mark.parametrize("moments", [5, pytest.param(50, marks=pytest.mark.heavy)])
@pytest.mark.timeout(600)
def test_stopped_at_random_moments(tmp_path: Path, moments: int) -> None:
    """SIGTERM while a save is nearly always in flight; each run resumes the previous one. The result is bitwise equal
    to an uninterrupted run without background saves."""
    prefix = corpus(tmp_path)

    def cfg_of(name: str, **overrides: Any) -> Any:
        return resolve(
            2,
            parallel_data=2,
            parallel_zero=1,
            model_num_layers=1,
            train_steps=100_000,
            data_train=prefix,
            run_dir=tmp_path / name,
            checkpoint_every=1,
            checkpoint_keep=2,
            **overrides,
        )

    def stopped(ctx: ParallelContext) -> list[tuple[int, int, float]]:
        rng, seen = random.Random(moments), []
        for _ in range(moments):
            delay, disk_delay = rng.uniform(0.15, 0.5), rng.uniform(0, 0.08)
            begin = time.monotonic()
            seen.append((*run(cfg_of("stopped"), ctx, delay, disk_delay), time.monotonic() - begin - delay))
        return seen

    ranks = run_ranks(layout_of(cfg_of("stopped").config), stopped, timeout_s=550)
    assert all(code == 75 and most == 1 and seconds < 30 for rank in ranks for code, most, seconds in rank)
    root = tmp_path / "stopped/checkpoints"
    steps = complete_steps(root)
    assert not [n for n in os.listdir(root) if n.startswith(".")] and len(steps) == 2
    assert not list(find_damage(step_dir(root, steps[-1]), read_manifest(step_dir(root, steps[-1]))))
    exit_facts = json.loads((tmp_path / "stopped/exit.json").read_text())
    assert exit_facts["code"] == 75 and exit_facts["step"] == steps[-1]

    def undisturbed(ctx: ParallelContext) -> int:
        cfg = resolve(
            2,
            parallel_data=2,
            parallel_zero=1,
            model_num_layers=1,
            train_steps=100_000,
            data_train=prefix,
            run_dir=tmp_path / "undisturbed",
            checkpoint_async_save=False,
        )
        return reference(cfg, ctx, steps[-1])

    run_ranks(layout_of(cfg_of("stopped").config), undisturbed, timeout_s=500)
    ours, _, _ = read_metrics(tmp_path / "stopped")
    theirs, _, _ = read_metrics(tmp_path / "undisturbed")
    assert len(ours) == steps[-1] and [ours[s]["loss"] for s in ours] == [theirs[s]["loss"] for s in ours]
    last = step_dir(root, steps[-1]) / "rank00001.safetensors"
    same_bytes(last, step_dir(tmp_path / "undisturbed/checkpoints", steps[-1]) / last.name)
    print(
        f"SIGTERM at {moments} random moments: {moments} exits 75, step {steps[-1]} reached, every loss bitwise equal"
    )


class _After:
    """A stop request that becomes true after `steps` steps."""

    def __init__(self, steps: int):
        self.left = steps + 2  # the loop asks twice before the first step

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def reference(cfg: Any, ctx: ParallelContext, steps: int) -> int:
    return train(cfg, ctx, _After(steps))  # type: ignore[arg-type]


def test_the_next_save_waits_and_progress_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cfg = resolve(
        2, parallel_data=2, train_steps=4, data_train=corpus(tmp_path), run_dir=tmp_path / "run", checkpoint_every=1
    )
    ranks = run_ranks(layout_of(cfg.config), lambda ctx: run(cfg, ctx, 0, 0.3))
    assert ranks == [(0, 1), (0, 1)] and complete_steps(tmp_path / "run/checkpoints") == [1, 2, 3, 4]
    output = capfd.readouterr().out
    for step in (1, 2, 3):
        assert f"step {step}: saving in the background\n" in output
    for step in (1, 2, 3, 4):
        assert output.count(f"step {step}: saved {tmp_path}/run/checkpoints/step_0000000{step}\n") == 1
    assert output.index("step 1: saved") < output.index("step 2: saving in the background")
    assert "step 4: saving in the background" not in output, "the last one is waited for"


def test_two_runs_in_one_folder_are_rejected(tmp_path: Path) -> None:
    cfg = resolve(2, parallel_data=2, train_steps=1, data_train=corpus(tmp_path), run_dir=tmp_path / "run")

    def rejected(ctx: ParallelContext) -> str:
        try:
            train(cfg, ctx, StopRequest())
        except EngineError as error:
            return str(error)
        return ""

    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run/lock") as holder:
        assert not holder
        for output in run_ranks(layout_of(cfg.config), rejected):
            assert f"another run (process {os.getpid()} on " in output and "choose another --run.dir" in output
    assert run_ranks(layout_of(cfg.config), rejected) == ["", ""]


def test_host_memory_is_allocated_once() -> None:
    def job(ctx: ParallelContext) -> bool:
        state = setup(TWO, ctx)
        with Saver(Path("/nowhere"), ctx) as saver:
            saver.reserve(state.optimizer.states(owned=True))
            before = [b.data_ptr() for b in saver._staging._buffers]
            copies, ready, ordered = saver._staging.copy(state.optimizer.states(owned=True))
            ready()
            assert not ordered  # on a CPU this call does the copying
            return before == [h.flat.data_ptr() for h in copies] and sum(len(h.flat) for h in copies) > 0

    assert all(run_ranks(layout_of(TWO), job))
