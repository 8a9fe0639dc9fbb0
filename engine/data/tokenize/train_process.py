"""Trains a tokenizer in a process of its own, so that this one can tell how far it is and end it at any moment.

The libraries that train return to Python only when they are done. The other process gets a line of JSON (the recipe)
and the texts, each as 8 bytes of length and UTF-8, then the length END, and answers with one JSON object; how far it is
stands on its standard error. It ends when this one does, and its memory is given back.
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
_SEND_BYTES = 1 << 18  # at once
_POLL_S = 0.2
_START = "import sys; sys.path.insert(0, sys.argv[1]); from engine.data.tokenize.train_process import main; main()"
_STAGES = {"Tokenize words": "spelling words", "Count pairs": "counting pairs", "Compute merges": "merging"}
_LOGGED = (  # of sentencepiece, in the order in which they come
    (re.compile(r"Loaded all \d+ sentences"), "sorting words"),
    (re.compile(r"Extracting seed|Making suffix array"), "finding pieces"),
    (re.compile(r"Initialized \d+ seed"), "weighing pieces (EM)"),
    (re.compile(r"EM sub_iter=\d+ size=(\d+)"), "weighing pieces (EM)"),
)
_LOG_LINE = re.compile(r"^([IWEF]\d{4} |WARNING: All log|[a-z_]+ \{|[ }]|[a-z_]+_spec)")


class TrainProcess:
    """The other process, from here. `seconds`: of each step, in order; `send` texts, then `finish`."""

    def __init__(self, recipe: Recipe, progress: Callable[[StepEvent], None] | None):
        self._recipe, self._progress = recipe, progress
        root = str(Path(__file__).resolve().parents[3])
        # A file, no pipe: a line for each of 100,000 merges, and each would wake this process, and let that one wait.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed by __exit__)
        self._process = subprocess.Popen(
            [sys.executable, "-X", "utf8", "-c", _START, root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is this process's to hear
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
                with contextlib.suppress(OSError):  # what it buffers has no reader
                    file.close()

    def send(self, texts: Iterable[str]) -> None:
        """Pass the texts on, as fast as they are taken."""
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
        """Wait for the tokenizer: text of its tokenizer.json, and the files beside it. Raises DataError."""
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
        made = json.loads(self._answer)
        return made["definition"], {name: text.encode() for name, text in made["companions"].items()}

    def _failure(self) -> DataError:
        code = self._process.wait()
        self._read_progress()
        if code < 0:
            why = f"its process was ended by signal {-code}"
            hint = " Memory may have run out: --max-bytes trains on a part of the texts." if code == -9 else ""
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
        """What it has said since: steps; anything else is kept for an error."""
        heard = os.pread(self._log.fileno(), 1 << 24, self._log_position)
        self._log_position += len(heard)
        *lines, self._rest = (self._rest + heard).split(b"\n")
        for raw in lines:
            line = raw.decode(errors="replace").rstrip()
            if line.startswith('{"stage"'):
                said = json.loads(line)
                self._begin(_STAGES.get(said["stage"], said["stage"]), said["current"], said["total"])
            elif known := next(((step, found) for one, step in _LOGGED if (found := one.search(line))), None):
                self._begin(known[0], *self._em_rounds(known[1]))
            elif line and not _LOG_LINE.match(line):
                self._output_lines = [*self._output_lines[-20:], line]

    def _em_rounds(self, found: re.Match[str]) -> tuple[int, int]:
        """Of sentencepiece's EM: how many rounds are done, and about how many there will be. Each keeps 3/4."""
        if not found.groups():
            return 0, 0
        left = max(0, math.ceil(math.log(int(found[1]) / (1.1 * self._recipe.vocab_size), 4 / 3)))
        return self._done + 1, self._done + 1 + 2 * left


def main() -> None:
    """The other process."""
    from engine.data.tokenize.algorithms import train

    stdin = open(0, "rb", buffering=1 << 20)  # noqa: SIM115  (until the process ends)
    given = json.loads(stdin.readline())
    options: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    recipe = Recipe(**options)

    def texts() -> Iterator[str]:
        while (size := int.from_bytes(_exactly(stdin, 8), "little")) != _END:
            yield _exactly(stdin, size).decode()
        threading.Thread(target=lambda: stdin.read(1) or os._exit(1), daemon=True).start()  # nobody waits any more

    try:
        definition, companions = train(texts(), recipe, tell=True)
    except DataError as err:
        print("error: " + str(err).replace("\n", "\x1f"), file=sys.stderr)
        os._exit(1)
    made = {"definition": definition, "companions": {name: data.decode() for name, data in companions.items()}}
    sys.stdout.buffer.write(json.dumps(made).encode())
    sys.stdout.flush()
    os._exit(0)  # a thread waits for standard input


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        os._exit(1)  # who sent the texts has ended
    return data
