"""RUN/exit.json: how a run ended. The file exists and is valid from the start of the run, even on a full disk."""

from __future__ import annotations

import json
import os
import warnings
from contextlib import suppress
from pathlib import Path

from engine.util.files import open_no_follow, replace_synced, sync_file

_RESERVED_BYTES = 4096  # reserved at the start, so that the final record needs no space
_RUNNING = "running, or ended without a final record (killed, power cut)"


class ExitRecord:
    """Writes the exit record of a run; any rank may write the final one. step: the last step done, None if unknown.

    One rank calls `begin` after the run folder is locked. Nothing is written until `begun` is set.
    """

    def __init__(self, run_dir: Path):
        self._file, self._spare = run_dir / "exit.json", run_dir / ".exit.json"
        self.step: int | None = None
        self.begun = False

    def begin(self) -> None:
        """Record that the run is in progress. OSError if the folder cannot be written."""
        with suppress(FileNotFoundError):
            self._spare.unlink()
        replace_synced(self._file, self._record(None, _RUNNING))
        with open(self._spare, "wb", opener=open_no_follow) as file:
            file.write(b" " * _RESERVED_BYTES)
            sync_file(file)

    def write(self, code: int, reason: str) -> None:
        """Write the final record: the exit code, and the reason in one line."""
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
        record = {"code": code, "reason": reason[: _RESERVED_BYTES // 8], "step": self.step}
        return json.dumps(record).encode() + b"\n"
