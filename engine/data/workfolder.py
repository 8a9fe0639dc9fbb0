"""The folder in which `engine clean` works: OUTPUT.work, from which the same command goes on.

`settings.json` says what the work is; only parts of the same work are used again. A lock that the kernel drops when its
holder dies keeps a second command out. Parts that a kill left half-written are removed when the work goes on, as they
would fill the disk otherwise.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.errors import DataError
from engine.util.files import write_fault, write_synced

PART_GLOB = "part-?????"
_AGAIN = "Give the same command again: the parts that are complete are kept."


@contextlib.contextmanager
def disk(path: Path, bytes_needed: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Turns a full disk or a missing permission into a DataError that says how to go on."""
    try:
        yield
    except OSError as err:
        raise DataError(write_fault(err, path, bytes_needed(), _AGAIN)) from err


@contextlib.contextmanager
def work_folder(folder: Path, facts: dict[str, Any], overwrite: bool, keep: bool = True) -> Iterator[None]:
    """Make `folder`, or go on in the one that the same work (`facts`) left; locked until the end.

    `keep` False: parts are made anew, as nothing tells whether the input is the same. A failure before the first part
    leaves no folder behind.
    """
    with disk(folder):
        ours = not folder.exists() or (folder / "settings.json").exists()
        if not ours and any(path.name != "lock" for path in folder.iterdir()):
            raise DataError(f"{folder} is needed for the work and holds other files. Choose another output.")
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "wb")  # noqa: SIM115  (closed below)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            raise DataError(f"{folder}: another `engine clean` is writing here. Wait for it, or end it.") from err
        try:
            with disk(folder):
                _begin(folder, facts, overwrite, keep)
            yield
        except BaseException:
            if not any(path for path in folder.glob("*") if path.name not in ("lock", "settings.json")):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def go_on(folder: Path, tasks: int, missing: int, from_stdin: bool) -> str:
    """What a signal leaves in `folder`, of whose `tasks` parts some are `missing`, and what to do."""
    again = "give the same command again"
    if from_stdin:
        return f"nothing is kept of standard input; {again}"
    if missing == tasks == 1:
        return f"nothing is kept yet; {again} (with --tasks N, of N parts of the input each is kept when it is done)"
    if missing == tasks:
        return f"nothing is kept yet; {again}"
    return f"{tasks - missing} of {tasks} parts are kept in {folder}; {again} and it goes on with the rest"


def _begin(folder: Path, facts: dict[str, Any], overwrite: bool, keep: bool) -> None:
    settings = folder / "settings.json"
    facts = json.loads(json.dumps(facts))
    try:
        before = json.loads(settings.read_bytes())
    except (FileNotFoundError, ValueError):
        before = None
    # What was made without meeting an error is right for --on-error skip too.
    same = before is not None and (before == facts or {**before, "on error": "skip"} == facts)
    if not same and before is not None and any(folder.glob(PART_GLOB)) and not overwrite:
        differences = "\n".join(_differences(before, facts))
        raise DataError(
            f"{folder} holds the unfinished work of another call:\n{differences}\nGive the same options and inputs to "
            f"go on with it, or --overwrite (or delete the folder) to start anew."
        )
    for path in folder.iterdir():
        torn = path.name.endswith(".tmp")
        if path.name != "lock" and (torn or not keep or not same):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if before != facts or not settings.exists():
        write_synced(settings, json.dumps(facts, indent=1).encode())


def _differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> Iterator[str]:
    """What is not the same, a line each."""
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{where}{key}: ")
        elif key == "inputs" and isinstance(before, list) and isinstance(now, list):
            gone, come = [f for f in before if f not in now], [f for f in now if f not in before]
            yield from (f"  input then {fact}" for fact in gone[:5])
            yield from (f"  input now {fact}" for fact in come[:5])
            if not gone and not come and before != now:
                yield "  inputs in another order"
        elif before != now:
            yield f"  {where}{key}: then {before!r}, now {now!r}"
