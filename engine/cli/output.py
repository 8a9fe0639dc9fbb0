"""Standard output and error whose reader has gone, or whose disk is full.

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

Policy = Callable[
    [str, OSError], None
]  # (name of the stream, error): may raise; else the stream discards all later output


class OutputError(EngineError):
    """Standard output cannot be written, and not because its reader has gone."""


class ReaderGone(SystemExit):
    """Ends a command whose reader has gone. Not an Exception, so that no `except Exception` handles it."""


class OutputStream:
    """A text stream that reports its first write error to a policy and discards all later output."""

    def __init__(self, name: str, stream: TextIO, policy: Policy):
        self.name, self.stream, self.policy = name, stream, policy

    def write(self, text: str) -> int:
        """Write the text; on an error call the policy."""
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the buffer; on an error call the policy."""
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
    """Redirect the stream and its buffer to /dev/null, or the interpreter would report the failed flush on exit."""
    with suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)


def stop_command(name: str, error: OSError) -> None:
    """Policy of most commands: exit, silently if the reader has gone, with an error on a full disk."""
    if error.errno == errno.EPIPE:
        raise ReaderGone(EXIT_READER_GONE)
    raise OutputError("cli.output-not-writable", f"{name} cannot be written: {error.strerror}")


def warn_and_continue(name: str, error: OSError) -> None:
    """Policy of training: warn once on the other stream and continue."""
    other = sys.stderr if name == "standard output" else sys.stdout
    print(f"warning: {name} cannot be written ({error.strerror}); continuing without it", file=other, flush=True)


def survive_lost_output() -> None:
    """From now on this process continues if its output cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, OutputStream):
            stream.policy = warn_and_continue


@contextmanager
def watch_output() -> Iterator[None]:
    """Context in which both standard streams are OutputStreams that end the command; flushes them at the end."""
    before = sys.stdout, sys.stderr
    sys.stdout = OutputStream("standard output", before[0], stop_command)
    sys.stderr = OutputStream("standard error", before[1], stop_command)
    try:
        try:
            yield
        finally:  # also after `--help`, which raises SystemExit
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        sys.stdout, sys.stderr = before
