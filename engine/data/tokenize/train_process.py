"""Trains a tokenizer in a subprocess, so that the parent can report progress and stop it at any moment.

The training libraries return to Python only at the end. The subprocess reads a line of JSON (the recipe) and the texts,
each as 8 bytes of length and UTF-8, then the length END, and answers with one JSON object. It writes its progress to
standard error. It exits when the parent exits, and its memory is released.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from engine.data.read.progress import StepEvent
from engine.data.tokenize.recipe import Recipe
from engine.errors import DataError, truncate

_END = 2**64 - 1
_SEND_BYTES = 1 << 18  # sent at once
_POLL_S = 0.2
_START = "import sys; sys.path.insert(0, sys.argv[1]); from engine.data.tokenize.train_process import main; main()"
_STAGES = {"Tokenize words": "spelling words", "Count pairs": "counting pairs", "Compute merges": "merging"}
_LOGGED = (  # log lines of sentencepiece, in their order
    (re.compile(r"Loaded all \d+ sentences"), "sorting words"),
    (re.compile(r"Extracting seed|Making suffix array"), "finding pieces"),
    (re.compile(r"Initialized \d+ seed"), "weighing pieces (EM)"),
    (re.compile(r"EM sub_iter=\d+ size=(\d+)"), "weighing pieces (EM)"),
)
_LOG_LINE = re.compile(r"^([IWEF]\d{4} |WARNING: All log|[a-z_]+ \{|[ }]|[a-z_]+_spec)")


class TrainProcess:
    """The subprocess, seen from the parent: `send` texts, then `finish`. `seconds`: duration of each step, in order."""

    def __init__(self, recipe: Recipe, progress: Callable[[StepEvent], None] | None):
        self._recipe, self._progress = recipe, progress
        root = str(Path(__file__).resolve().parents[3])
        # A file, not a pipe: each of 100,000 lines (one per merge) would wake this process and delay the other.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed by __exit__)
        self._process = subprocess.Popen(
            [sys.executable, "-X", "utf8", "-c", _START, root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # only the parent handles Ctrl-C
        )
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        self._answer, self._output_lines, self._log_position, self._rest = b"", list[str](), 0, b""
        self._step, self._done, self._total = "reading", 0, 0
        self._began = self._step_began = time.monotonic()
        self.seconds: dict[str, float] = {}
        self._reader = threading.Thread(target=self._read_answer, daemon=True)
        self._reader.start()
        self._buffer = bytearray(json.dumps(asdict(recipe)).encode() + b"\n")

    def __enter__(self) -> TrainProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for file in (self._process.stdin, self._process.stdout, self._log):
            if file is not None:
                with contextlib.suppress(OSError):  # buffered data has no reader any more
                    file.close()

    def send(self, texts: Iterable[str]) -> None:
        """Send the texts, as fast as the subprocess reads them."""
        for text in texts:
            data = text.encode()
            self._buffer += len(data).to_bytes(8, "little") + data
            if len(self._buffer) >= _SEND_BYTES:
                self._flush()

    def _flush(self) -> None:
        try:
            self._stdin.write(self._buffer)
            self._stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        self._buffer.clear()

    def finish(self) -> tuple[str, dict[str, bytes]]:
        """Wait for the result: (text of tokenizer.json, companion files). Raises DataError if training failed."""
        self._buffer += _END.to_bytes(8, "little")
        self._flush()
        self._begin("counting words")
        while self._reader.is_alive():
            self._reader.join(_POLL_S)
            self._read_progress()
            if self._progress is not None:
                elapsed = time.monotonic() - self._step_began
                self._progress(StepEvent(self._step, self._done, self._total, elapsed))
        if self._process.wait() or not self._answer:
            raise self._failure()
        self._begin("")
        result = json.loads(self._answer)
        return result["definition"], {name: text.encode() for name, text in result["companions"].items()}

    def _failure(self) -> DataError:
        code = self._process.wait()
        self._read_progress()
        if code < 0:
            why = f"its process was killed by signal {-code}"
            hint = " Memory may have run out: --max-bytes trains on part of the texts." if code == -9 else ""
            return DataError("tokenize.training-failed", f"the training of the tokenizer failed: {why}.{hint}")
        if self._output_lines and self._output_lines[-1].startswith("error: "):
            return DataError(
                "tokenize.training-failed", self._output_lines[-1].removeprefix("error: ").replace("\x1f", "\n")
            )
        return DataError(
            "tokenize.training-failed",
            f"the training of the tokenizer failed: {truncate(' | '.join(self._output_lines[-5:]), 1000)}",
        )

    def _begin(self, step: str, done: int = 0, total: int = 0) -> None:
        now = time.monotonic()
        if step != self._step:
            self.seconds[self._step] = self.seconds.get(self._step, 0.0) + now - self._step_began
            self._step_began = now
        self._step, self._done, self._total = step, done, total

    def _read_answer(self) -> None:
        assert self._process.stdout is not None
        self._answer = self._process.stdout.read()

    def _read_progress(self) -> None:
        """Read its new log lines: update the current step, keep other lines for an error message."""
        data = os.pread(self._log.fileno(), 1 << 24, self._log_position)
        self._log_position += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for raw in lines:
            line = raw.decode(errors="replace").rstrip()
            if line.startswith('{"stage"'):
                event = json.loads(line)
                self._begin(_STAGES.get(event["stage"], event["stage"]), event["current"], event["total"])
            elif known := next(((step, found) for one, step in _LOGGED if (found := one.search(line))), None):
                self._begin(known[0], *self._em_rounds(known[1]))
            elif line and not _LOG_LINE.match(line):
                self._output_lines = [*self._output_lines[-20:], line]

    def _em_rounds(self, found: re.Match[str]) -> tuple[int, int]:
        """(EM rounds of sentencepiece done, estimated total). Each round keeps 3/4 of the pieces."""
        if not found.groups():
            return 0, 0
        left = max(0, math.ceil(math.log(int(found[1]) / (1.1 * self._recipe.vocab_size), 4 / 3)))
        return self._done + 1, self._done + 1 + 2 * left


def main() -> None:
    """Entry point of the subprocess."""
    from engine.data.tokenize.algorithms import train

    stdin = open(0, "rb", buffering=1 << 20)  # noqa: SIM115  (open until the process exits)
    given = json.loads(stdin.readline())
    options: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    recipe = Recipe(**options)

    def texts() -> Iterator[str]:
        while (size := int.from_bytes(_exactly(stdin, 8), "little")) != _END:
            yield _exactly(stdin, size).decode()
        threading.Thread(target=lambda: stdin.read(1) or os._exit(1), daemon=True).start()  # the parent has exited

    try:
        definition, companions = train(texts(), recipe, report_progress=True)
    except DataError as err:
        print("error: " + str(err).replace("\n", "\x1f"), file=sys.stderr)
        os._exit(1)
    result = {"definition": definition, "companions": {name: data.decode() for name, data in companions.items()}}
    sys.stdout.buffer.write(json.dumps(result).encode())
    sys.stdout.flush()
    os._exit(0)  # without waiting for the thread that reads standard input


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        os._exit(1)  # the parent has exited
    return data
