"""Damaged, truncated and foreign checkpoints are rejected with the file named; no committed checkpoint is lost."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

import engine.checkpoint.save as save_module
from engine.checkpoint.format import find_checkpoint, find_damage, read_manifest
from engine.config.schema import Config
from engine.distributed.context import ParallelContext
from engine.errors import CheckpointError, EngineError
from engine.train.resume import find_resume, resume, save_state
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import config, layout_of, random_batches
from tests.support.checkpoints import METADATA, TWO, as_step, complete_steps, reseal, save_one
from tests.support.errors import raises
from tests.support.harness import run_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_one(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def load(folder: Path, cfg: Config = TWO, data: dict[str, Any] = METADATA) -> None:
    def job(ctx: ParallelContext) -> tuple[str, str] | None:
        try:
            resume(setup(cfg, ctx), folder, data)
        except EngineError as error:
            return error.code, str(error)
        return None

    errors = run_ranks(layout_of(cfg), job)
    assert all(errors) or not any(errors), "one rank failed and another did not"
    if errors[0]:
        raise CheckpointError(*errors[0])


def test_a_good_one_loads(copy: Path) -> None:
    load(copy)
    assert not list(find_damage(copy, read_manifest(copy)))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", [0, 8, 500, -1])
def test_a_flipped_bit_is_found_and_the_file_named(copy: Path, rank: int, place: int) -> None:
    file = copy / f"rank{rank:05d}.safetensors"
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)
    with raises(CheckpointError, "checkpoint.digest-differs", file):
        load(copy)


def test_torn_missing_and_foreign_files_are_rejected(copy: Path) -> None:
    file = copy / "rank00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with raises(CheckpointError, "checkpoint.file-not-as-listed", file, len(whole) - 1, len(whole)):
        load(copy)
    file.unlink()
    with raises(CheckpointError, "checkpoint.file-not-as-listed", file, len(whole)):
        load(copy)
    file.write_bytes((copy / "rank00000.safetensors").read_bytes()[: len(whole)].ljust(len(whole), b"\0"))
    with raises(CheckpointError, "checkpoint.digest-differs", file):
        load(copy)


@pytest.mark.parametrize(
    ("edit", "code", "values"),
    [
        (lambda m: m.update(schema_version=99), "schema-unknown", (99, 3)),
        (
            lambda m: m.update(files={"../rank00000.safetensors": m["files"]["rank00000.safetensors"]}),
            "file-name-not-plain",
            ("../rank00000.safetensors",),
        ),
        (lambda m: m.pop("step"), "manifest-damaged", ("step",)),
        (lambda m: m.update(surprise=1), "manifest-damaged", ("surprise",)),
        (lambda m: m["tensors"]["model"].pop("norm.weight"), "tensor-missing", ("norm.weight",)),
        (lambda m: m["tensors"]["model"]["embed.weight"]["slices"].pop(), "values-missing", ("embed.weight",)),
        (
            lambda m: m["tensors"]["model"]["norm.weight"]["slices"][0].update(file="x.safetensors"),
            "file-not-listed",
            ("norm.weight", "x.safetensors"),
        ),
        (
            lambda m: m["tensors"]["model"]["norm.weight"].update(dtype="F32"),
            "tensor-not-as-listed",
            ("norm.weight", [32], "F64"),
        ),
        (
            lambda m: m["tensors"]["model"]["norm.weight"]["slices"][0].update(digests=[]),
            "manifest-damaged",
            ("0 digests for 1",),
        ),
        (
            lambda m: m["tensors"]["model"]["norm.weight"].update(
                slices=2 * m["tensors"]["model"]["norm.weight"]["slices"]
            ),
            "values-missing",
            ("norm.weight", 64, 32),
        ),
        (lambda m: m.update(step=2), "folder-of-another-step", (2, "step_00000001")),
        (
            lambda m: m["tensors"]["model"]["norm.weight"]["slices"][0].update(shape=[31]),
            "values-missing",
            ("norm.weight", 31, 32),
        ),
        (
            lambda m: m["tensors"]["model"]["norm.weight"].update(shape=[33]),
            "shape-differs",
            ("norm.weight", [33], [32]),
        ),
    ],
)
def test_an_edited_manifest_is_rejected(copy: Path, edit: Any, code: str, values: tuple[Any, ...]) -> None:
    """With a recomputed digest, as by an attacker: the manifest must also fit itself, the files and the model."""
    reseal(copy, edit)
    with raises(CheckpointError, f"checkpoint.{code}", *values):
        load(copy)


def test_another_model_data_or_seed_is_rejected_with_a_diff(copy: Path) -> None:
    with raises(CheckpointError, "checkpoint.of-another-run", "model.ffn_size", 48, 64, "train.seed", 1234, 7):
        load(copy, config(2, parallel_tensor=2, model_ffn_size=64, train_seed=7))
    with raises(CheckpointError, "checkpoint.of-another-run", '--checkpoint.allow "data.num_tokens"'):
        load(copy, data=METADATA | {"num_tokens": 2})


def test_latest_is_the_newest_complete_one(saved: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        as_step(saved, root, step)
    (root / "step_00000003/manifest.json").unlink()  # killed before the manifest
    (root / ".step_00000004.tmp").mkdir()
    assert complete_steps(root) == [1, 2]
    with pytest.warns(UserWarning, match=r"skipped: .*step_00000003: no manifest\.json"):
        assert find_checkpoint(tmp_path) == root / "step_00000002" == find_checkpoint(root)
    with raises(CheckpointError, "checkpoint.incomplete", root / "step_00000003"):
        find_checkpoint(root / "step_00000003")
    with raises(CheckpointError, "checkpoint.not-found", tmp_path / "elsewhere"):
        find_checkpoint(tmp_path / "elsewhere")


def test_resume_choices(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run/checkpoints" / saved.name)

    def choose(resume: str, run: str = "run") -> str:
        return find_resume(config(run_dir=tmp_path / run, checkpoint_resume=resume))

    assert choose("auto") == choose("latest") == choose(str(tmp_path / "run"), "new")
    assert choose("auto", "new") == choose("never", "new") == ""
    with raises(CheckpointError, "checkpoint.not-found", tmp_path / "new"):
        choose("latest", "new")
    with raises(CheckpointError, "train.run-folder-taken"):
        choose("never")


def test_a_failed_save_is_an_error_on_all_ranks_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1's disk is full at step 2: no rank reports a save, step 1 is intact, and a later save works."""
    write = save_module.write_safetensors

    def job(ctx: ParallelContext) -> list[str]:
        state = setup(TWO, ctx)
        messages = []
        for step in range(3):
            train_step(state, random_batches(TWO, ctx, step))

            def full(file: Path, *rest: Any, **options: Any) -> Any:
                file.write_bytes(b"half a file")
                raise OSError(errno.ENOSPC, "No space left on device", str(file))

            save_module.write_safetensors = full if (step, ctx.rank) == (1, 1) else write
            try:
                save_state(state, tmp_path, METADATA)
                messages.append("")
            except EngineError as error:
                messages.append(str(error))
        return messages

    for messages in run_ranks(layout_of(TWO), job):
        assert messages[0] == messages[2] == ""
        assert "No space left on device" in messages[1] and "rank00001.safetensors" in messages[1]
        assert "bytes free" in messages[1] and "earlier checkpoints are unchanged" in messages[1]
    assert complete_steps(tmp_path) == [1, 3]
    load(tmp_path / "step_00000001")


def test_keep_deletes_the_oldest_after_the_newest_is_there(tmp_path: Path) -> None:
    save_one(tmp_path, config(2, parallel_tensor=2, checkpoint_keep=2), steps=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]
    load(tmp_path / "step_00000004", config(2, parallel_tensor=2))
