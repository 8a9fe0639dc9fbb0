"""The folder in which a command works until its output is complete, and from which it resumes after a kill.

`settings.json` identifies the work: partial results are reused only for the same settings. `publish.json`, for commands
that write one, states that all output is complete and lists the renames to the final names; after a kill, the renames
are repeated until all are done. A file lock, which the kernel releases when its holder dies, keeps a second command
out. No output has its final name before it is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Self

from engine.errors import DataError
from engine.util.files import locked, read_json, sync_folder, write_synced, writing

LOCK, SETTINGS, PUBLISH_PLAN = "lock", "settings.json", "publish.json"
RERUN = "Give the same command again."


class WorkFolder:
    """The work folder of one command, created if missing and locked until `close`. Use as a context manager.

    owned: glob patterns of the names that the command may have left there without settings.json.
    Raises DataError if the folder has no settings.json but other files, if another command works in it, or if the disk
    cannot be written.
    """

    def __init__(self, folder: Path, verb: str, owned: Collection[str] = ("*",)):
        self.folder = folder
        self.bytes_needed: Callable[[], int] = lambda: 0  # estimate for the rest, printed if the disk is full
        self._started = False
        self._open = contextlib.ExitStack()
        with self.disk_errors():
            if folder.exists() and not (folder / SETTINGS).exists():
                unexpected = [
                    path for path in folder.iterdir() if not any(fnmatch(path.name, p) for p in (LOCK, *owned))
                ]
                if unexpected:
                    text = f"{folder} is needed as the work folder but holds other files. Choose another output."
                    raise DataError("data.work-folder-of-others", text)
            folder.mkdir(parents=True, exist_ok=True)
            holder = self._open.enter_context(locked(folder / LOCK))
        if holder:
            self._open.close()
            text = f"{folder}: another `engine {verb}` is writing here ({holder}). Wait until it ends, or stop it."
            raise DataError("data.work-folder-locked", text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._started and self._is_empty():
            self.discard()
        self.close()

    def close(self) -> None:
        """Release the lock. May be called twice."""
        self._open.close()

    def discard(self) -> None:
        """Remove the folder and release the lock."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def disk_errors(self, path: Path | None = None) -> contextlib.AbstractContextManager[None]:
        """Turn a full disk or a missing permission into a DataError that says how to resume."""
        return writing(path or self.folder, self.resume_hint, self.release_space)

    def resume_hint(self) -> str:
        """How to resume once there is space."""
        return RERUN

    def release_space(self) -> int:
        """Free the space of unfinished results; returns the bytes needed to finish."""
        return self.bytes_needed()

    def _is_empty(self) -> bool:
        return all(path.name in (LOCK, SETTINGS) for path in self.folder.glob("*"))

    # ---- settings of the work ----

    def settings(self) -> dict[str, Any] | None:
        """Settings with which the work here was started, None for a new folder."""
        try:
            return read_work_json(self.folder / SETTINGS)
        except DataError:
            if self._is_empty():  # killed while it wrote the settings
                return None
            raise

    def publish_plan(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Content of publish.json if a kill interrupted the publishing of the work with these settings, else None."""
        plan = read_work_json(self.folder / PUBLISH_PLAN)
        return plan if plan is not None and self.settings() in (None, settings) else None

    def resume(
        self,
        settings: dict[str, Any],
        overwrite: bool,
        compatible: Sequence[dict[str, Any]] = (),
        worth_keeping: bool = True,
    ) -> bool:
        """Whether the folder holds work with these settings to resume; half-written files are removed.

        compatible: other settings whose work is valid for these too. If False, the caller has to `start`. Raises
        DataError for work with other settings, unless it is not `worth_keeping` or `overwrite` is set.
        """
        before = self.settings()
        if before is None:
            return False
        if before != settings and before not in compatible:
            if not worth_keeping or overwrite:
                return False
            lines = "\n".join(_differences(before, settings))
            raise DataError(
                "data.work-of-another-call",
                f"{self.folder} holds the unfinished work of another command:\n{lines}\nGive the same options and "
                f"inputs to resume it, or --overwrite (or delete the folder) to start again.",
            )
        with self.disk_errors():
            _remove(path for path in self.folder.iterdir() if path.name.endswith(".tmp"))
        self._started = True
        if before != settings:
            self.write_json(SETTINGS, settings)
        return True

    def start(self, settings: dict[str, Any]) -> None:
        """Empty the folder and write the settings."""
        with self.disk_errors():
            for name in (PUBLISH_PLAN, SETTINGS):  # first, so that a kill leaves no settings without work
                (self.folder / name).unlink(missing_ok=True)
            _remove(path for path in self.folder.iterdir() if path.name != LOCK)
        self._started = True
        self.write_json(SETTINGS, settings)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a small file atomically and durably."""
        with self.disk_errors(self.folder / name):
            write_synced(self.folder / f"{name}.tmp", json.dumps(value, indent=1).encode() + b"\n")
            os.replace(self.folder / f"{name}.tmp", self.folder / name)
            sync_folder(self.folder)

    # ---- publishing ----

    def publish(self, stale: Sequence[Path], moves: Sequence[tuple[Path, Path]]) -> None:
        """Rename complete files to their final names and remove the folder; may be repeated after a kill.

        stale: old outputs to delete. Old targets are deleted first, the last one first, so that a crash never leaves an
        old index or sidecar next to a new .bin.
        """
        folder, waiting = self.folder, [(source, target) for source, target in moves if source.exists()]
        try:
            for target in [*stale, *(target for _, target in reversed(waiting))]:
                target.unlink(missing_ok=True)
            for source, target in waiting:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
            for parent in sorted({target.parent for _, target in moves}):
                sync_folder(parent)
            _remove(path for path in folder.iterdir() if path.name not in (PUBLISH_PLAN, SETTINGS, LOCK))
            for name in (SETTINGS, PUBLISH_PLAN, LOCK):
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()
        except OSError as err:
            text = f"{err.filename or folder}: cannot be published: {err.strerror or err}."
            raise DataError("data.cannot-publish", f"{text} {RERUN[:-1]}; no data is lost.") from err


def reject_existing(paths: Sequence[Path], overwrite: bool) -> None:
    """Raise DataError if outputs exist, unless `overwrite`."""
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise DataError(
            "data.output-exists",
            f"{', '.join(existing)}: already exists, so this work is done. "
            f"Choose another output, delete the old files, or give --overwrite.",
        )


def json_round_trip(value: dict[str, Any]) -> dict[str, Any]:
    """The value as it is after JSON (tuples become lists), so that it can be compared with one read from a file."""
    return json.loads(json.dumps(value))


def read_work_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file of a work folder; None if the file is missing or no object."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as err:
        text = f"{path}: not readable ({err}). Delete the folder {path.parent} to start again."
        raise DataError("data.work-not-readable", text) from err
    return value if isinstance(value, dict) else None


def _remove(paths: Iterator[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> Iterator[str]:
    """One line for each difference. A list of inputs holds strings, or [name, bytes, stamp]."""
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{where}{key}: ")
        elif key in ("inputs", "files") and isinstance(before, list) and isinstance(now, list):
            removed, added = [f for f in before if f not in now], [f for f in now if f not in before]
            yield from (f"  input removed: {_describe_input(entry)}" for entry in removed[:5])
            yield from (f"  input added: {_describe_input(entry)}" for entry in added[:5])
            if not removed and not added and before != now:
                yield "  inputs in another order"
        elif before != now:
            yield f"  {where}{key}: was {before!r}, now {now!r}"


def _describe_input(entry: str | list[Any]) -> str:
    if isinstance(entry, str):
        return entry
    name, size, stamp = entry
    return f"{name}: {size:,} bytes (stamp {stamp})"
