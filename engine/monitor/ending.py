"""RUN/exit.json: how a run ended. From its first moment on it is there and whole, on a full disk too."""

from __future__ import annotations

import json
import os
import warnings
from contextlib import suppress
from pathlib import Path

from engine.util.files import open_no_follow, replace_synced, sync_file

_ROOM = 4096  # bytes taken at the start, so that the last word needs none
_RUNNING = "running, or ended without a word (killed, power cut)"


class ExitRecord:
    """Of the run in a folder, whichever rank has the last word. step: the last one done, None before any is known.

    `begin` on one rank, once the folder is this run's; until `begun` nothing is written.
    """

    def __init__(self, run_dir: Path):
        self._file, self._spare = run_dir / "exit.json", run_dir / ".exit.json"
        self.step: int | None = None
        self.begun = False

    def begin(self) -> None:
        """Say that the run is under way. OSError where the folder cannot be written."""
        with suppress(FileNotFoundError):
            self._spare.unlink()
        replace_synced(self._file, self._record(None, _RUNNING))
        with open(self._spare, "wb", opener=open_no_follow) as file:
            file.write(b" " * _ROOM)
            sync_file(file)

    def write(self, code: int, reason: str) -> None:
        """The last word: the exit code, and why in one line."""
        if not self.begun:
            return
        data = self._record(code, reason)
        try:
            if self._spare.exists():
                with open(self._spare, "r+b", opener=open_no_follow) as file:
                    file.write(data)
                    file.truncate()
                    sync_file(file)
                os.replace(self._spare, self._file)
            else:
                replace_synced(self._file, data)
        except OSError as error:
            warnings.warn(f"{self._file} cannot be written ({error.strerror})", stacklevel=2)

    def _record(self, code: int | None, reason: str) -> bytes:
        return json.dumps({"code": code, "reason": reason[: _ROOM // 8], "step": self.step}).encode() + b"\n"
