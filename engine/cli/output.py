"""Standard output and error when nobody reads them any more, or the disk under them is full.

A command exits silently with 141 when the reader of its output has gone (`engine inspect run | head`): the shell
reports the same code for a command that SIGPIPE ended. A command that must survive this calls `survive_lost_output`.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from engine.errors import EXIT_READER_GONE, EngineError

Policy = Callable[[str, OSError], None]  # given the name of the stream; may raise. When it returns, the stream is deaf


class OutputError(EngineError):
    """Standard output cannot be written, for another reason than that its reader has gone."""


class ReaderGone(SystemExit):
    """Ends a verb whose reader has gone. Not an Exception: no code in between takes it for a failure of its own."""


class OutputStream:
    """A text stream whose failure to write is told to a policy once; from then on it swallows what is written."""

    def __init__(self, name: str, stream: TextIO, policy: Policy):
        self.name, self.stream, self.policy = name, stream, policy

    def write(self, text: str) -> int:
        """Write, or hear from the policy that nobody reads."""
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Pass on what is buffered, likewise."""
        self._try(self.stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            redirect_to_devnull(self.stream)
            self.policy(self.name, error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def redirect_to_devnull(stream: TextIO) -> None:
    """Lead the stream, and what it has buffered, to nowhere: or the interpreter would complain of it at its end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def stop_command(name: str, error: OSError) -> None:
    """The policy of a verb: end. In silence when the reader has gone, with an error on a full disk."""
    if error.errno == errno.EPIPE:
        raise ReaderGone(EXIT_READER_GONE)
    raise OutputError("cli.output-not-writable", f"{name} cannot be written: {error.strerror}")


def warn_and_continue(name: str, error: OSError) -> None:
    """The policy of training: say it once where somebody may still read, and go on."""
    other = sys.stderr if name == "standard output" else sys.stdout
    print(f"warning: {name} cannot be written ({error.strerror}); going on without it", file=other, flush=True)


def survive_lost_output() -> None:
    """From now on this process goes on when its output cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, OutputStream):
            stream.policy = warn_and_continue


@contextmanager
def watch_output() -> Iterator[None]:
    """Within, both standard streams are OutputStreams that end the verb; at the end what they buffer is passed on."""
    before = sys.stdout, sys.stderr
    sys.stdout = OutputStream("standard output", before[0], stop_command)
    sys.stderr = OutputStream("standard error", before[1], stop_command)
    try:
        try:
            yield
        finally:  # `--help` leaves by an exception too
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        sys.stdout, sys.stderr = before
