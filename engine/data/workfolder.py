"""The folder in which a verb works until its output is complete, and from which the same command goes on after a kill.

`settings.json` says what the work is: only what the same settings made is used again. `publish.json`, where a verb
writes one, says that all of it is complete, and what is renamed to where; renaming is repeated until nothing is left.
A lock that the kernel drops when its holder dies keeps a second command out. Nothing else has a final name before.
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
    """The open folder, made if need be and locked until `close`. Use as a context manager.

    `owned`: patterns of the names that a verb may have left there without settings; a folder with others is refused.
    Raises DataError for such a folder, for one that another command works in, and for a disk that cannot be written.
    """

    def __init__(self, folder: Path, verb: str, owned: Collection[str] = ("*",)):
        self.folder = folder
        self.bytes_needed: Callable[[], int] = lambda: 0  # an estimate to the end, for the message of a full disk
        self._started = False
        self._open = contextlib.ExitStack()
        with self.disk_errors():
            if folder.exists() and not (folder / SETTINGS).exists():
                unexpected = [
                    path for path in folder.iterdir() if not any(fnmatch(path.name, p) for p in (LOCK, *owned))
                ]
                if unexpected:
                    text = f"{folder} is needed for the work and holds other files. Choose another output."
                    raise DataError("data.work-folder-of-others", text)
            folder.mkdir(parents=True, exist_ok=True)
            holder = self._open.enter_context(locked(folder / LOCK))
        if holder:
            self._open.close()
            text = f"{folder}: another `engine {verb}` is writing here ({holder}). Wait for it, or end it."
            raise DataError("data.work-folder-locked", text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._started and self._is_empty():
            self.discard()
        self.close()

    def close(self) -> None:
        """Let others work here. Harmless twice."""
        self._open.close()

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def disk_errors(self, path: Path | None = None) -> contextlib.AbstractContextManager[None]:
        """Turns a full disk or a missing permission into a DataError that says how to go on."""
        return writing(path or self.folder, self.resume_hint, self.release_space)

    def resume_hint(self) -> str:
        """What to do once there is room."""
        return RERUN

    def release_space(self) -> int:
        """Bytes that are needed to go on."""
        return self.bytes_needed()

    def _is_empty(self) -> bool:
        return all(path.name in (LOCK, SETTINGS) for path in self.folder.glob("*"))

    # ---- what the work is ----

    def settings(self) -> dict[str, Any] | None:
        """What the work here was begun with, None for a new folder."""
        try:
            return read_work_json(self.folder / SETTINGS)
        except DataError:
            if self._is_empty():  # killed at the first line
                return None
            raise

    def publish_plan(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """What publish.json holds: a kill came while the work with these settings was published."""
        plan = read_work_json(self.folder / PUBLISH_PLAN)
        return plan if plan is not None and self.settings() in (None, settings) else None

    def resume(
        self,
        settings: dict[str, Any],
        overwrite: bool,
        compatible: Sequence[dict[str, Any]] = (),
        worth_keeping: bool = True,
    ) -> bool:
        """Whether there is work with these settings to go on with; what a kill left half-written of it is removed.

        `compatible`: other settings whose work is valid for these too. False: the caller has to `start`. Raises
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
                f"{self.folder} holds the unfinished work of another call:\n{lines}\nGive the same options and inputs "
                f"to go on with it, or --overwrite (or delete the folder) to start anew.",
            )
        with self.disk_errors():
            _remove(path for path in self.folder.iterdir() if path.name.endswith(".tmp"))
        self._started = True
        if before != settings:
            self.write_json(SETTINGS, settings)
        return True

    def start(self, settings: dict[str, Any]) -> None:
        """Start with nothing."""
        with self.disk_errors():
            for name in (PUBLISH_PLAN, SETTINGS):  # first, so that no kill leaves them beside half of the rest
                (self.folder / name).unlink(missing_ok=True)
            _remove(path for path in self.folder.iterdir() if path.name != LOCK)
        self._started = True
        self.write_json(SETTINGS, settings)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """A small file, there as a whole or not at all."""
        with self.disk_errors(self.folder / name):
            write_synced(self.folder / f"{name}.tmp", json.dumps(value, indent=1).encode() + b"\n")
            os.replace(self.folder / f"{name}.tmp", self.folder / name)
            sync_folder(self.folder)

    # ---- the end ----

    def publish(self, stale: Sequence[Path], moves: Sequence[tuple[Path, Path]]) -> None:
        """Rename what is complete to where it belongs, and remove the folder; harmless to repeat after a kill.

        Targets are removed from the end first, so that no crash leaves an old index or sidecar beside a new .bin.
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
            raise DataError("data.cannot-publish", f"{text} {RERUN[:-1]}; nothing is lost.") from err


def reject_existing(paths: Sequence[Path], overwrite: bool) -> None:
    """Refuse to replace outputs that are there."""
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise DataError(
            "data.output-exists",
            f"{', '.join(existing)}: already there, so this is done. "
            f"Choose another name, delete them, or give --overwrite.",
        )


def json_round_trip(facts: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, to be compared."""
    return json.loads(json.dumps(facts))


def read_work_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, None if there is none."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as err:
        text = f"{path}: not readable ({err}). Delete the folder {path.parent} to start anew."
        raise DataError("data.work-not-readable", text) from err
    return value if isinstance(value, dict) else None


def _remove(paths: Iterator[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> Iterator[str]:
    """What is not the same, a line each. Lists of inputs hold a text each, or name, bytes and stamp."""
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{where}{key}: ")
        elif key in ("inputs", "files") and isinstance(before, list) and isinstance(now, list):
            removed, added = [f for f in before if f not in now], [f for f in now if f not in before]
            yield from (f"  input then {_input(fact)}" for fact in removed[:5])
            yield from (f"  input now {_input(fact)}" for fact in added[:5])
            if not removed and not added and before != now:
                yield "  inputs in another order"
        elif before != now:
            yield f"  {where}{key}: then {before!r}, now {now!r}"


def _input(fact: str | list[Any]) -> str:
    if isinstance(fact, str):
        return fact
    name, size, stamp = fact
    return f"{name}: {size:,} bytes (stamp {stamp})"
