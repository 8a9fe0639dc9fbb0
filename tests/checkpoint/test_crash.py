"""A crash at any operation of a save, losing any unsynced data: the old or the new checkpoint loads.

The disk is an in-memory double (tests/support/disk_double.py) that enumerates the possible states. After each crash the
newest checkpoint is the previous one or the one being saved, complete and with the right values; the next save works
and leaves no other files.
"""

from __future__ import annotations

import errno
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import retention
from engine.checkpoint.format import find_damage, newest_step, read_manifest, step_dir
from engine.checkpoint.load import Reader
from engine.checkpoint.save import Saver
from engine.errors import CheckpointError
from tests.support.disk_double import MemoryDisk, Op, crash_states, error
from tests.support.errors import raises
from tests.support.tiny_states import BLOCK, FOLDER, METADATA, SHAPES, context, save_by_two_ranks, states, values


def save(disk: MemoryDisk, step: int, *, keep: int = 0, keep_every: int = 0, run: int = 0) -> tuple[str, ...]:
    saver = Saver(FOLDER, context(), keep=keep, keep_every=keep_every, storage=disk, block_bytes=BLOCK)
    with saver:
        saver.start(states(step, run=run), step=step, metadata=METADATA, background=bool(step % 2))
        return saver.finish().notes


def run_of(disk: MemoryDisk, step: int) -> int:
    """The run whose values a checkpoint has. Raises AssertionError if it has values of several runs."""
    with Reader(step_dir(FOLDER, step), disk) as reader:
        assert not list(find_damage(reader.folder, reader.manifest, disk))
        for run in (0, 1):
            same = {
                torch.equal(reader.read_whole(kind, name), values(step, kind, name, run))
                for kind in ("model", "exp_avg", "exp_avg_sq")
                for name in SHAPES
            }
            assert len(same) == 1, "a mix of two saves"
            if same == {True}:
                return run
    raise AssertionError("has values that no run saved")


def latest(disk: MemoryDisk) -> int | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about damaged checkpoints that are skipped
        return newest_step(FOLDER, disk)


Action = Callable[[MemoryDisk], object]


def killed_save(disk: MemoryDisk) -> None:
    """Leave the files of a save of step 2 that was killed before it wrote its manifest."""
    dead = False

    def kill(op: Op) -> None:
        nonlocal dead
        dead = dead or op.path.endswith("manifest.json")
        if dead:
            raise error(errno.EIO, op.path)

    disk.before = kill
    with raises(CheckpointError, "checkpoint.write-failed"):
        save(disk, 2, run=1)
    disk.before = lambda op: None
    assert any(name.endswith(".tmp") for name in disk.list(FOLDER))


def damaged(disk: MemoryDisk) -> None:
    save(disk, 2, run=1)
    disk.unlink(step_dir(FOLDER, 2) / "rank00000.safetensors")


# name -> (setup, save, steps that may be the newest after a crash)
SCENARIOS: dict[str, tuple[list[Action], list[Action], set[int | None]]] = {
    "first": ([], [lambda d: save(d, 1)], {None, 1}),
    "one more": ([lambda d: save(d, 1)], [lambda d: save(d, 2)], {1, 2}),
    "two ranks": ([lambda d: save(d, 1)], [lambda d: save_by_two_ranks(d, 2)], {1, 2}),
    "keep": ([lambda d: save(d, 1), lambda d: save(d, 2)], [lambda d: save(d, 3, keep=1)], {2, 3}),
    "keep some": (
        [lambda d, s=s: save(d, s) for s in (1, 2, 3)],
        [lambda d: save(d, 4, keep=2, keep_every=2)],
        {3, 4},
    ),
    "over a killed one": ([lambda d: save(d, 1), killed_save], [lambda d: save(d, 2)], {1, 2}),
    "over a damaged one": ([lambda d: save(d, 1), damaged], [lambda d: save(d, 2, keep=2)], {1, 2}),
    "again": ([lambda d: save(d, 1), lambda d: save(d, 2, run=1)], [lambda d: save(d, 2)], {1, 2}),
    "back": ([lambda d, s=s: save(d, s, run=1) for s in (1, 3)], [lambda d: save(d, 2)], {1, 2, 3}),
    "two in a row": ([lambda d: save(d, 1)], [lambda d: save(d, 2, keep=1), lambda d: save(d, 3, keep=1)], {1, 2, 3}),
}


def enumerate_crashes(scenario: str, samples: int) -> tuple[int, int]:
    """Check every crash state; returns (number of states, number of states that lost something)."""
    prepare, actions, allowed = SCENARIOS[scenario]
    disk = MemoryDisk()
    disk.make_folder(Path("/run"))
    for action in prepare:
        action(disk)
    before, disk.log = disk.copy(), []
    for action in actions:
        action(disk)
    log, new = list(disk.log), latest(disk)
    states_seen, lossy = 0, 0
    for done, state in crash_states(before, log, random.Random(scenario), samples):
        states_seen += 1
        now = latest(state)
        assert now in allowed, (done, log[:done][-3:])
        if now is not None:
            run_of(state, now)
        if done == len(log):
            assert now == new, "a checkpoint reported as saved does not exist"
        lossy += {p: f and f.data for p, f in state.tree.items()} != {p: f and f.data for p, f in disk.tree.items()}
        save(state, new or 1, keep=2)
        assert latest(state) == (new or 1) and run_of(state, new or 1) == 0
        assert not [name for name in state.list(FOLDER) if name.startswith(".")], "left behind"
    return states_seen, lossy


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_crash_at_any_operation(scenario: str) -> None:
    seen, lossy = enumerate_crashes(scenario, samples=2)
    assert seen > 60 and lossy > 50
    print(f"crash states, {scenario}: {seen} enumerated, {lossy} of them with something lost")


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_thousands_of_crash_states() -> None:
    counts = [enumerate_crashes(scenario, samples=25) for scenario in SCENARIOS]
    seen, lossy = (sum(column) for column in zip(*counts))
    print(f"crash states: {seen} enumerated, {lossy} of them with something lost; 0 wrong")
    assert seen >= 2000 and lossy >= 2000


# -- planted bugs: the enumeration detects each ------------------------------------------------------------------------


@pytest.mark.parametrize("omitted", ["sync", "sync_folder"])
def test_a_missing_sync_is_detected(omitted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = MemoryDisk._do

    def do(self: MemoryDisk, op: Op) -> None:
        if op.kind != omitted:
            real(self, op)

    monkeypatch.setattr(MemoryDisk, "_do", do)
    with pytest.raises(AssertionError):
        enumerate_crashes("one more", samples=10)


def test_deleting_before_the_new_one_is_durable_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    real = retention.commit

    def early(disk: Any, temporary: Path, final: Path, manifest: bytes) -> Path | None:
        if disk.stat(step_dir(FOLDER, 2)) is not None:
            disk.rename(step_dir(FOLDER, 2), FOLDER / ".step_00000002.deleted")
        return real(disk, temporary, final, manifest)

    monkeypatch.setattr("engine.checkpoint.save.commit", early)
    with pytest.raises(AssertionError):
        enumerate_crashes("keep", samples=2)


# -- retention, and disks that return errors ---------------------------------------------------------------------------


def test_retention() -> None:
    disk = MemoryDisk()
    disk.make_folder(Path("/run"))
    for step in range(1, 12):
        save(disk, step, keep=2, keep_every=4)
    assert disk.list(FOLDER) == [f"step_{step:08d}" for step in (4, 8, 10, 11)]


def test_resuming_earlier_renames_later_steps_and_never_deletes_the_new_one() -> None:
    disk = MemoryDisk()
    disk.make_folder(Path("/run"))
    for step in (1, 5, 6):
        save(disk, step, run=1)
    notes = save(disk, 2, keep=2)
    assert latest(disk) == 2 and disk.list(FOLDER) == [
        "abandoned_step_00000005",
        "abandoned_step_00000006",
        "step_00000001",
        "step_00000002",
    ]
    assert len(notes) == 2 and "step 6 is from before this run resumed at an earlier step" in notes[0]


def test_nothing_is_deleted_when_the_new_one_reads_back_differently() -> None:
    disk = MemoryDisk()
    disk.make_folder(Path("/run"))
    save(disk, 1)

    def flip(op: Op) -> None:
        if op.kind == "sync":  # on its way to the disk
            file = disk.tree[op.path]
            assert file is not None
            file.data[-1] ^= 1

    disk.before = flip
    with raises(CheckpointError, "checkpoint.reads-back-differently", "rank00000.safetensors"):
        save(disk, 2, keep=1)
    assert disk.list(FOLDER) == ["step_00000001"] and run_of(disk, 1) == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_an_error_at_any_operation(code: int) -> None:
    """The error shows path, bytes needed and free; the previous checkpoint loads, and the next save cleans up."""
    at, fired, rejected, left = 0, 0, 0, 0

    def fail(op: Op) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(code, os.strerror(code), op.path)

    while True:
        at += 1
        disk = MemoryDisk()
        disk.make_folder(Path("/run"))
        save(disk, 1)
        save(disk, 2)
        left, disk.before, disk.free = at, fail, 12345
        notes: tuple[str, ...] = ()
        try:
            notes = save(disk, 3, keep=1)
        except CheckpointError as error:
            rejected += 1
            assert os.strerror(code) in str(error) and "12,345 bytes free" in str(error)
            assert "bytes needed here" in str(error) and str(FOLDER) in str(error)
            assert latest(disk) in (2, 3) and run_of(disk, latest(disk) or 0) == 0
        if left > 0:
            break
        fired += 1
        disk.before = lambda op: None
        if notes:
            assert "could not be cleaned up" in notes[0] and latest(disk) == 3
        save(disk, 3, keep=1)
        assert disk.list(FOLDER) == ["step_00000003"] and read_manifest(step_dir(FOLDER, 3), disk).step == 3
    print(f"errors injected: {fired} fired, {rejected} saves failed, the others only failed to clean up")
    assert fired > 15 and rejected > 10
