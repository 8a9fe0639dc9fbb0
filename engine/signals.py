"""Signals that ask a run to save and stop. Only the standard library: they are heard before torch is imported."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

LAUNCHER = os.getppid()  # who started this process, noted before it can have ended
_ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_SAME_REQUEST_S = 2.0
_SAME_KEYPRESS_S = 0.2


class StopRequest:
    """SIGTERM, SIGUSR1, Ctrl-C (SIGINT) or SIGHUP asks for a save and an orderly stop; a second one stops at once.

    The same signal again within two seconds is the same request: Slurm or a shell signals a whole process group, and
    torchrun or a script passes on what it got as well. Nobody waits so long with a second Ctrl-C, nor does it come that
    way, so there it is a fifth of a second. A SIGHUP that is ignored, as nohup has it, stays ignored. What came while
    the signals were blocked (examples/pretrain_7b.sh starts ranks so: none is lost before Python runs) is heard now.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._before = {number: signal.getsignal(number) for number in _ASKING}
        for number, before in self._before.items():
            if number != signal.SIGHUP or before != signal.SIG_IGN:
                signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKING)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        same_s = _SAME_KEYPRESS_S if number == signal.SIGINT else _SAME_REQUEST_S
        if self.signal == number and now - self._since < same_s:
            return
        if self.signal is not None:
            os._exit(128 + number)
        self.signal, self._since = signal.Signals(number), now

    def __bool__(self) -> bool:
        return self.signal is not None

    def release(self) -> None:
        """Let signals do what they did before, what has come included: there will be nothing to save."""
        for number, before in self._before.items():
            signal.signal(number, before)
        if self.signal is not None:
            os.kill(os.getpid(), self.signal)
