"""`checkpoint.resume auto`: if the newest checkpoint is damaged in any way, the run resumes from the previous one."""

from __future__ import annotations

import errno
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.checkpoint.format import step_dir, steps_descending
from engine.checkpoint.storage import Disk
from engine.distributed.context import ParallelContext
from engine.errors import DamageError, EngineError
from engine.train.resume import resume_run, save_state
from engine.train.state import TrainState, setup
from engine.train.step import train_step
from tests.support.cases import config, layout_of, random_batches, weights_of
from tests.support.errors import raises
from tests.support.harness import run_ranks

METADATA = {"prefix": "x", "num_documents": 1, "num_tokens": 1, "tokenizer_digest": None}


def flip(path: Path, place: int = -100) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


FILES = "rank00000.safetensors", "rank00001.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit in a tensor of rank 0": (lambda f: flip(f / FILES[0]), f"{FILES[0]}: damaged: digest"),
    "bit in a tensor of rank 1": (lambda f: flip(f / FILES[1]), f"rank 1: .*{FILES[1]}: damaged: digest"),
    "bit in a header": (lambda f: flip(f / FILES[1], 20), FILES[1]),
    "file cut": (lambda f: cut(f / FILES[0]), "the manifest lists"),
    "file missing": (lambda f: (f / FILES[1]).unlink(), f"{FILES[1]}: missing"),
    "manifest torn": (lambda f: cut(f / "manifest.json"), "manifest"),
    "bit in the manifest": (lambda f: flip(f / "manifest.json"), "damaged manifest"),
    "manifest missing": (lambda f: (f / "manifest.json").unlink(), r"no manifest\.json"),
    "an unexpected file": (lambda f: (f / "rank00002.safetensors").write_bytes(b"x"), "does not belong"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each kind of damage, a run folder with steps 1 to 3 whose step 3 is damaged."""
    folder = tmp_path_factory.mktemp("runs")
    whole = folder / "whole"
    cfg = config(2, parallel_tensor=2)

    def job(ctx: ParallelContext) -> None:
        state = setup(cfg, ctx)
        for step in range(3):
            train_step(state, random_batches(cfg, ctx, step))
            save_state(state, whole / "checkpoints", METADATA)

    run_ranks(layout_of(cfg), job)
    for name, (damage, _) in DAMAGES.items():
        shutil.copytree(whole, folder / name)
        damage(step_dir(folder / name / "checkpoints", 3))
    return folder


def resumed(run: Path, ctx: ParallelContext, resume: str = "auto") -> tuple[str, list[str], TrainState]:
    """Resume a run; returns (checkpoint folder, warnings about skipped checkpoints, state)."""
    cfg = config(2, parallel_tensor=2, run_dir=run, checkpoint_resume=resume, checkpoint_keep=2)
    state = setup(cfg, ctx)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        folder = resume_run(state, METADATA)
    return folder, [str(w.message) for w in warned if "skipped: " in str(w.message)], state


def same(a: TrainState, b: TrainState) -> bool:
    return a.step == b.step and all(np.array_equal(x[3], y[3]) for x, y in zip(weights_of(a), weights_of(b)))


def test_the_previous_checkpoint_is_used_and_the_damage_reported(runs: Path) -> None:
    cfg = config(2, parallel_tensor=2)

    def job(ctx: ParallelContext) -> list[str]:
        _, _, wanted = resumed(runs / "whole", ctx, str(step_dir(runs / "whole/checkpoints", 2)))
        messages = []
        for name in DAMAGES:
            for resume in ("auto", "latest"):
                folder, warned, state = resumed(runs / name, ctx, resume)
                assert folder == str(step_dir(runs / name / "checkpoints", 2)), name
                assert same(state, wanted), name
                if ctx.rank == 0:
                    assert len(warned) == 1 and "step_00000003" in warned[0], (name, warned)
            messages += warned
            with pytest.raises(EngineError) as rejected:  # selected by its path
                resumed(runs / name, ctx, str(step_dir(runs / name / "checkpoints", 3)))
            messages.append(str(rejected.value))
        return messages

    messages, _ = run_ranks(layout_of(cfg), job)
    assert len(messages) == 2 * len(DAMAGES)
    for (name, (_, words)), skipped, rejected in zip(DAMAGES.items(), messages[::2], messages[1::2]):
        assert skipped.startswith("skipped: "), name
        for text in (skipped, rejected):
            assert re.search(words, text), (name, text)


def test_the_damaged_step_is_saved_again(runs: Path, tmp_path: Path) -> None:
    """The damaged step is saved again; damaged later steps are renamed; if all are damaged, that is an error."""
    again, aside, nothing = tmp_path / "again", tmp_path / "aside", tmp_path / "nothing"
    for run in (again, aside, nothing):
        shutil.copytree(runs / "whole", run)
    flip(step_dir(again / "checkpoints", 3) / FILES[0])
    for step in (2, 3):
        flip(step_dir(aside / "checkpoints", step) / FILES[1])
    for step in (1, 2, 3):
        flip(step_dir(nothing / "checkpoints", step) / FILES[0])
    cfg = config(2, parallel_tensor=2)

    def job(ctx: ParallelContext) -> tuple[int, str]:
        for run, step in ((again, 2), (aside, 1)):
            _, warned, state = resumed(run, ctx)
            assert state.step == step and (ctx.rank or len(warned) == 3 - step)
            if run == aside:
                state.step -= 1  # the next save is of step 1, so both damaged ones are later
            train_step(state, random_batches(cfg, ctx, 2))
            save_state(state, run / "checkpoints", METADATA)
        _, warned, state = resumed(again, ctx)
        with pytest.raises(EngineError) as rejected:
            resumed(nothing, ctx)
        assert not isinstance(rejected.value, DamageError)
        return state.step, str(rejected.value)

    for step, message in run_ranks(layout_of(cfg), job):
        assert step == 3 and "holds checkpoints, but none that is complete" in message
    assert steps_descending(again / "checkpoints") == [3, 2]  # keep 2
    names = sorted(p.name for p in (aside / "checkpoints").iterdir())
    assert names == ["abandoned_step_00000002", "abandoned_step_00000003", "step_00000001"]


def test_a_broken_manifest_never_restarts_the_run(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(step_dir(runs / "whole/checkpoints", 3), step_dir(run / "checkpoints", 3))
    cut(step_dir(run / "checkpoints", 3) / "manifest.json")

    def job(ctx: ParallelContext) -> None:
        with raises(EngineError, "train.no-whole-checkpoint", run):
            resumed(run, ctx)

    run_ranks(layout_of(config(2, parallel_tensor=2)), job)


def test_errors_of_the_process_are_not_damage(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many open files are not damage: falling back to an older checkpoint would discard a good one."""
    cfg = config(1)
    open_ = Disk.open

    def fail(self: Disk, path: Path, *, uncached: bool = False) -> Any:
        if "step_00000003" in str(path) and path.suffix == ".safetensors" and not uncached:
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return open_(self, path, uncached=uncached)

    def job(ctx: ParallelContext) -> str:
        monkeypatch.setattr(Disk, "open", fail)
        state = setup(config(1, run_dir=runs / "whole", checkpoint_resume="auto"), ctx)
        with pytest.raises(OSError, match="Too many open files") as caught:
            resume_run(state, METADATA)
        return str(caught.value)

    assert "step_00000003" in run_ranks(layout_of(cfg), job)[0]
