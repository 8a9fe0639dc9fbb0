"""`engine`, `torchrun` and `python` without two seconds of imports each: forked from a process that has imported torch.

A test puts `Warm.folder` first in PATH. The commands in it ask the server, this file run as a program, for a copy of
itself with the caller's arguments, folder, environment and standard streams. The copy then runs the real code:
`torch.distributed.run`, `engine.__main__`, a script. Signals are forwarded, the exit code or signal is returned, and a
command whose caller was killed is killed. So the command itself is tested, but not how its process starts.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from tests.support.paths import ROOT

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "python" and words[:1] == ["-u"]:
    words = words[1:]
if name == "python" and (not words or words[0].startswith("-") and words[0] != "-m"):
    os.execv({python!r}, [{python!r}, *words])
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
request = json.dumps([sys.argv[0], words, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(request).to_bytes(8, "little")], [0, 1, 2])
server.sendall(request)
pid = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "little")
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
code = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "little", signed=True)
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
THIRD_PARTY = (  # packages that commands import; engine modules are left to the copies: they record their process
    "matplotlib.pyplot",
    "tokenizers",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "torch.distributed.launcher.api",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
)


class Warm:
    """The server, as a context manager. folder: where the commands are."""

    def __enter__(self) -> Warm:
        self._temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self._temporary.name)
        path = str(self.folder / "socket")
        for name in ("engine", "torchrun", "python"):
            (self.folder / name).write_text(CLIENT.format(python=sys.executable, path=path))
            (self.folder / name).chmod(0o755)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, "-m", __name__, path]
        self._server = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **streams)
        assert self._server.stdout and self._server.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()  # the end of its standard input ends it
        self._temporary.cleanup()


def serve(path: str) -> tuple[str, list[str]]:
    """Answer requests until standard input ends. Returns in every forked copy: the command and its arguments."""
    listener, requests = socket.socket(socket.AF_UNIX), selectors.DefaultSelector()
    listener.bind(path)
    listener.listen(64)
    requests.register(listener, selectors.EVENT_READ)
    requests.register(0, selectors.EVENT_READ)
    print("ready", flush=True)
    running: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> process, its caller
    while True:
        for key, _ in requests.select():
            if key.fileobj == 0:
                os._exit(0)
            elif key.fileobj is listener:
                caller, _ = listener.accept()
                size, streams, *_ = socket.recv_fds(caller, 8, 3)
                command, words, folder, environment = json.loads(
                    caller.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL)
                )
                if not (pid := os.fork()):
                    for number, stream in enumerate(streams):
                        os.dup2(stream, number)
                    for own in (*streams, listener.fileno(), caller.fileno(), *running):
                        os.close(own)
                    for _, other in running.values():
                        other.close()
                    requests.close()
                    os.environ.clear()
                    os.environ.update(environment)
                    os.chdir(folder)
                    return command, words
                for stream in streams:
                    os.close(stream)
                caller.sendall(pid.to_bytes(8, "little"))
                watch = os.pidfd_open(pid)
                running[watch] = pid, caller
                requests.register(watch, selectors.EVENT_READ)
                requests.register(caller, selectors.EVENT_READ, watch)
            elif key.data is None:  # a process has ended
                pid, caller = running.pop(key.fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                requests.unregister(key.fd)
                os.close(key.fd)
                with suppress(KeyError):  # the caller has ended first
                    requests.unregister(caller)
                with suppress(OSError):
                    caller.sendall(code.to_bytes(8, "little", signed=True))
                caller.close()
            elif key.data in running and running[key.data][1] is key.fileobj:  # its caller has, and it has not
                requests.unregister(key.fileobj)
                os.kill(running[key.data][0], signal.SIGKILL)


def run(command: str, words: list[str]) -> None:
    """Run the command's code as `__main__`, as a separate process would."""
    name = Path(command).name
    if name == "torchrun":
        os.environ["PYTHON_EXEC"] = str(Path(command).with_name("python"))  # torchrun starts the ranks with it
    module = {"engine": "engine", "torchrun": "torch.distributed.run"}.get(name)
    if name == "python" and words[:1] == ["-m"]:
        module, words = words[1], words[1:]
    sys.argv = [command, *words] if name != "python" else words
    if module:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def end(work: Callable[..., None], *args: Any) -> NoReturn:
    """Run `work`, then end the process as the interpreter does, but keep the modules: freeing them copies all pages."""
    code = 0
    try:
        work(*args)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    for name in THIRD_PARTY:
        importlib.import_module(name)
    gc.freeze()  # a collection in a copy would touch, and so copy, all pages
    end(run, *serve(sys.argv[1]))
