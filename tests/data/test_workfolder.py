"""The work folder of clean, prepare and merge: resumed, rejected, restarted and published after a kill at any point."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from engine.data.workfolder import LOCK, PUBLISH_PLAN, SETTINGS, WorkFolder, reject_existing
from engine.errors import DataError
from tests.support.errors import raises

OURS: dict[str, Any] = {"version": 1, "inputs": ["a: 3 bytes"], "rules": {"pii": "mask", "width": "keep"}}


def begun(folder: Path) -> Path:
    """Killed work with settings OURS: one complete part, and one torn part."""
    with WorkFolder(folder, "clean") as work:
        work.start(OURS)
        (folder / "part").write_text("whole")
        (folder / "part.tmp").mkdir()
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_same_work_is_resumed_without_torn_parts(tmp_path: Path) -> None:
    folder = begun(tmp_path / "work")
    with WorkFolder(folder, "clean") as work:
        assert work.resume(OURS, overwrite=False)
        assert names(folder) == {LOCK, SETTINGS, "part"}
        assert work.resume({**OURS, "version": 2}, overwrite=False, compatible=[OURS])
        assert work.settings() == {**OURS, "version": 2}


def test_other_work_is_rejected_with_the_difference(tmp_path: Path) -> None:
    folder, other = begun(tmp_path / "work"), {**OURS, "inputs": ["b"], "rules": {"pii": "off", "width": "keep"}}
    with raises(
        DataError, "data.work-of-another-call", folder, "rules: pii: was 'mask', now 'off'", "added: b"
    ) as raised:
        with WorkFolder(folder, "clean") as work:
            work.resume(other, overwrite=False)
    assert "width" not in str(raised.value) and "part" in names(folder)  # the work is kept
    with WorkFolder(folder, "clean") as work:
        assert not work.resume(other, overwrite=True) and not work.resume(other, overwrite=False, worth_keeping=False)
        work.start(other)
        assert names(folder) == {LOCK, SETTINGS}


@pytest.mark.parametrize("at", [1, 2, 3])
def test_settings_never_remain_with_half_of_the_work(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begun(tmp_path / "work")
    (folder / PUBLISH_PLAN).write_text("{}")
    left, real = [at], os.unlink

    def killed(*args: Any, **kwargs: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        real(*args, **kwargs)

    with WorkFolder(folder, "clean") as work, monkeypatch.context() as patch:
        patch.setattr(os, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            work.start({})
        assert work.settings() is None or "part" in names(folder)
        assert (folder / SETTINGS).exists() or not (folder / PUBLISH_PLAN).exists()


def test_torn_settings_are_ignored_without_work_and_an_error_with_work(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / SETTINGS).write_text('{"version"')
    with WorkFolder(folder, "clean") as work:
        assert work.settings() is None
        (folder / "part").mkdir()
        with raises(DataError, "data.work-not-readable", folder / SETTINGS):
            work.resume(OURS, overwrite=True)


def test_other_commands_and_files_are_left_alone(tmp_path: Path) -> None:
    folder = begun(tmp_path / "work")
    with WorkFolder(folder, "clean"), raises(DataError, "data.work-folder-locked", folder, os.getpid()):
        WorkFolder(folder, "prepare")
    (folder / "thesis.tex").write_text("years")
    WorkFolder(folder, "clean", owned=("part*",)).close()  # with settings it is a work folder
    (folder / SETTINGS).unlink()
    with raises(DataError, "data.work-folder-of-others", folder):
        WorkFolder(folder, "clean", owned=("part*",))
    WorkFolder(folder, "clean", owned=("part*", "*.tex")).close()


def test_a_failure_before_any_work_leaves_no_folder(tmp_path: Path) -> None:
    for written in ("", "part"):
        with pytest.raises(KeyboardInterrupt), WorkFolder(tmp_path / "work", "clean") as work:
            work.start(OURS)
            if written:
                (tmp_path / "work" / written).write_text("")
            raise KeyboardInterrupt
        assert (tmp_path / "work").exists() == bool(written)


def test_publishing_may_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begun(tmp_path / "work")
    moves = [(folder / "part", tmp_path / "deep/out"), (folder / "more", tmp_path / "report")]
    (folder / "more").write_text("")
    (tmp_path / "stale").write_text("old")
    (tmp_path / "report").write_text("old")
    real, left = os.replace, [2]

    def killed(*args: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        real(*args)

    with WorkFolder(folder, "clean") as work:
        work.write_json(PUBLISH_PLAN, {"moves": 2})
        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            work.publish([tmp_path / "stale"], moves)
    assert names(tmp_path) == {"work", "deep"} and names(folder) >= {SETTINGS, PUBLISH_PLAN, "more"}
    with WorkFolder(folder, "clean") as work:
        assert work.publish_plan(OURS) == {"moves": 2} and work.publish_plan({}) is None
        work.publish([tmp_path / "stale"], moves)
    assert names(tmp_path) == {"deep", "report"} and (tmp_path / "deep/out").read_text() == "whole"


def test_existing_outputs_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("")
    with raises(DataError, "data.output-exists", tmp_path / "b"):
        reject_existing([tmp_path / "a", tmp_path / "b"], overwrite=False)
    reject_existing([tmp_path / "a", tmp_path / "b"], overwrite=True)
