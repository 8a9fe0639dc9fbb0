"""Signals that ask a run to save and stop. Standard library only, to be installed before torch is imported."""

from __future__ import annotations

import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

LAUNCHER = os.getppid()  # id of the parent process, read before the parent can have ended
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_SAME_REQUEST_S = 2.0
_SAME_KEYPRESS_S = 0.2
_GRACE_S = 3.0  # for the main thread to end in order; a native call may block it for minutes
_POLL_S = 0.2  # polling interval once a signal has arrived
_IMPORTED_S = 0.02  # interval of checks whether an import has ended
_SHOW_CURSOR = b"\x1b[?25h\n"  # a progress bar had hidden the cursor


class StopRequest:
    """SIGTERM, SIGUSR1, Ctrl-C (SIGINT) or SIGHUP requests a save and an orderly stop; a second one exits at once.

    The same signal again within two seconds is the same request: Slurm or a shell signals a whole process group, and
    torchrun or a script forwards the signal as well. Ctrl-C is not forwarded like this, and users press it again
    sooner, so for SIGINT the limit is 0.2 seconds. A SIGHUP that is ignored (nohup) stays ignored. Signals that arrived
    while they were blocked are handled now: examples/pretrain_7b.sh starts ranks with signals blocked, so that none is
    lost before Python runs.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self.listen()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def listen(self) -> None:
        """Install the handlers; call again after a library may have replaced one."""
        for number, before in self._before.items():
            if number != signal.SIGHUP or before != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._is_second(number):
            os._exit(128 + number)

    def _is_second(self, number: int) -> bool:
        """Record a signal. True if it is a second request, not a repetition of the first."""
        now = time.monotonic()
        same_s = _SAME_KEYPRESS_S if number == signal.SIGINT else _SAME_REQUEST_S
        if self._since:
            return self.signal != number or now - self._since >= same_s
        self.signal, self._since = signal.Signals(number), now
        return False

    def __bool__(self) -> bool:
        return self.signal is not None

    def release(self) -> None:
        """Restore the previous handlers, and send the signal that has arrived to them: there is nothing to save."""
        for number, before in self._before.items():
            signal.signal(number, before)
        if self.signal is not None:
            os.kill(os.getpid(), self.signal)


class Stopped(BaseException):
    """Raised on a signal to end a command. Not an Exception, so that no code in between handles it as its own error."""


class Interrupts(StopRequest):
    """The same signals for a command other than `train`: print one line on how to resume and exit with 128 + n.

    `Stopped` is raised in the main thread at any point; inside `deferred`, only by `check`; and never during an import,
    because native modules crash when an exception ends their initialisation. If the main thread is blocked (a native
    call, a pipe without a reader) for three seconds, a watcher thread ends the process, except inside `committing`. So
    does a second signal. resume_hint: returns which work is kept and which command to give; called from either thread.
    A process forked meanwhile handles signals as before. listen=False installs no handlers: the caller has its own.
    """

    def __init__(self, resume_hint: str = "", listen: bool = True) -> None:
        self.resume_hint: Callable[[], str] = lambda: resume_hint
        self.signal, self._since, self._before = None, 0.0, {}
        self._deferred = listen  # until `interruptible` is ready for Stopped
        self._committing = self._raised = self._reported = self._ended = False
        self._ends_at = math.inf
        if listen:
            self._heard, self._wakeup = os.pipe()
            os.set_blocking(self._wakeup, False)
            self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, daemon=True, name="signals").start()
            os.register_at_fork(after_in_child=self._forked)
            super().__init__()

    def check(self) -> None:
        """Raise Stopped if a signal has arrived."""
        if self.signal is not None:
            raise Stopped

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the block, Stopped is raised only by `check`: the code between two calls is never interrupted."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.check()

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Inside the block, results are made durable, so the time limit for a blocked main thread is suspended."""
        self._committing = True
        try:
            yield
        finally:
            self._ends_at = max(self._ends_at, time.monotonic() + _GRACE_S)
            self._committing = False

    def leave(self, forced_by: int | None = None) -> NoReturn:
        """Print once how to resume, and exit the process even if other threads are running."""
        first = self.signal or signal.SIGINT
        if not self._reported:
            self._reported = True
            line = f"interrupted ({first.name}): {self.resume_hint()}\n".encode()
            if select.select([], [2], [], 0)[1]:  # else the exit would block until stderr is read
                with suppress(OSError):
                    os.write(2, (_SHOW_CURSOR if forced_by and os.isatty(2) else b"") + line)
        os._exit(128 + (forced_by or first))

    def release(self) -> None:
        """Restore the previous handlers: the command has ended normally."""
        self._ended = True
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._wakeup, bytes(1))  # ends the thread
        os.close(self._wakeup)
        if signal.SIGALRM in self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None and number in STOP_SIGNALS:  # the watcher thread has not recorded it yet
            self.signal = signal.Signals(number)
        if self._deferred or self._raised:
            return
        if _importing(frame):
            self._before.setdefault(signal.SIGALRM, signal.signal(signal.SIGALRM, self._note))  # retry by a timer
            signal.setitimer(signal.ITIMER_REAL, _IMPORTED_S)
            return
        self._raised = True  # once: the clean-up that follows must not be interrupted
        raise Stopped

    def _watch(self) -> None:
        """Count the signals, and end the process if the main thread does not."""
        while not self._ended:
            if select.select([self._heard], [], [], _POLL_S if self.signal else None)[0]:
                for number in filter(STOP_SIGNALS.__contains__, os.read(self._heard, 64)):
                    if self._is_second(number):
                        self.leave(number)
                    self._ends_at = min(self._ends_at, self._since + _GRACE_S)
            elif time.monotonic() > self._ends_at and not (self._committing or self._ended):
                self.leave(self.signal)
        os.close(self._heard)

    def _forked(self) -> None:
        """Restore the previous handlers in a forked process."""
        if not self._ended:
            signal.set_wakeup_fd(-1)
            for number, before in self._before.items():
                signal.signal(number, before)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported where `frame` is."""
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


@contextmanager
def interruptible(resume_hint: str) -> Iterator[Interrupts]:
    """Inside the block, signals end this process as in Interrupts. resume_hint: the printed line, until it is replaced.

    A native library may turn Stopped into its own error (Rust's is no Exception): after a signal it is not reported.
    """
    stop = Interrupts(resume_hint)
    try:
        stop._deferred = False
        stop.check()
        yield stop
    except BaseException:
        if not stop:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        stop.leave()
    finally:
        stop.release()
