"""Runs mutations: each in a separate copy of the repository and a forked process, judged by the outcome of its tests.

The parent process has imported everything except the engine, so a mutation takes only the time of its tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from .patch import ROOT, Mutation

TIMEOUT_S = 400.0
PRELOADED = "torch torch.distributed torch.utils.flop_counter torch.utils.tensorboard sympy numpy hypothesis.strategies"
PRELOADED += " pydantic tyro safetensors tokenizers matplotlib.figure"
# errors of a mutation itself, which do not count as caught by a test
OTHER_ERRORS = re.compile(
    r"^(?:E +)?(?:NameError|ImportError|SyntaxError|AttributeError|UnboundLocalError)\b", re.MULTILINE
)


@dataclass(frozen=True)
class Outcome:
    """The result of a mutation. caught: a test failed by an assertion; by: that test, or the other outcome."""

    name: str
    caught: bool
    by: str
    seconds: float


def built() -> bool:
    """Whether extensions are built."""
    return any((ROOT / "engine").rglob("*.so"))


@cache
def _modules_of_tests() -> dict[str, list[str]]:
    """Name of every test function -> the modules that define it, as paths in the repository."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE):
            found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return found


def node_id(test: str) -> str:
    """pytest's id of "test_function[case]" or "test_module::test_function[case]", in any folder.

    LookupError if there is none, or more than one.
    """
    module, _, call = test.rpartition("::")
    function = call.partition("[")[0]
    paths = [path for path in _modules_of_tests().get(function, ()) if Path(path).stem == (module or Path(path).stem)]
    if len(paths) != 1:
        raise LookupError(f"test {test}: found in {' and '.join(paths) or 'no module of tests/'}, not in one")
    return f"{paths[0]}::{call}"


def copy_repository(to: Path, extensions: bool) -> None:
    """Copy the files that the tests need; extensions: include the built ones."""
    ignored = shutil.ignore_patterns("__pycache__", *(() if extensions else ("*.so",)))
    for folder in ("engine", "tests"):
        shutil.copytree(ROOT / folder, to / folder, ignore=ignored)
    shutil.copy2(ROOT / "pyproject.toml", to)


def enter(root: Path) -> None:
    """In a forked process: import engine and tests from the copy at `root` from now on, and write output to its log."""
    os.chdir(root)
    log = os.open(root / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.path[:] = [str(root)] + [entry for entry in sys.path if ROOT not in (Path(entry), Path(entry).parent)]
    # an editable install would find submodules that the copy lacks, such as omitted extensions, in the original
    sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:  # of the original
        del sys.modules[name]
    os.environ["PYTHONPATH"] = str(root)
    engine = importlib.import_module("engine")
    assert Path(engine.__file__ or "").parent == root / "engine", "the copy is not what is tested"
    for name in ("_index", "_ops", "_shared"):
        found = importlib.util.find_spec(f"engine.{name}")
        assert found is None or Path(found.origin or "").parent == root / "engine", f"{name} is not of the copy"


def run_tests(root: Path, node_ids: Iterable[str]) -> None:
    """In a forked process: run pytest in the copy of the repository at `root`, and exit with its exit code."""
    enter(root)
    code = pytest.main(["-x", "--tb=short", "-p", "no:xdist", *node_ids])
    sys.stdout.flush()
    os._exit(code)


def judge(code: int | None, output: str) -> tuple[bool, str]:
    """(caught, the test that failed by an assertion or else the outcome)."""
    if code is None:
        return False, f"HANG of {TIMEOUT_S:.0f} s without a report from the harness"
    if code == 0:
        return False, "SURVIVED"
    failed = re.search(r"^FAILED tests/(\S+?::\S+(?: [^-]*\])?)", output, re.MULTILINE)
    if code != 1 or failed is None:
        return False, f"BROKEN: pytest exit code {code}: {output.strip()[-500:]}"
    other_error = OTHER_ERRORS.search(output)
    return (False, f"BROKEN: {other_error.group()} in {failed.group(1)}") if other_error else (True, failed.group(1))


@dataclass
class Attempt:
    """A running mutation (None: the unchanged code) in its own copy of the repository."""

    mutation: Mutation | None
    tests: Iterable[str]
    extensions: bool

    def start(self) -> None:
        """Copy, mutate, fork. LookupError if the mutation does not fit or a test does not exist."""
        node_ids = [node_id(test) for test in self.tests]
        self.begin = time.monotonic()
        self.folder = tempfile.TemporaryDirectory(prefix="mutation_")
        root = Path(self.folder.name).resolve()
        copy_repository(root, self.extensions)
        if self.mutation is not None:
            self.mutation.apply(root)
        fork = multiprocessing.get_context("fork")
        self.process: BaseProcess = fork.Process(target=run_tests, args=(root, node_ids))
        self.process.start()

    def overdue(self) -> bool:
        return time.monotonic() - self.begin > TIMEOUT_S

    def finish(self) -> tuple[int | None, str]:
        """pytest's exit code (None: it hung and was killed) and output."""
        code = self.process.exitcode
        if code is None:
            self.process.kill()
        self.process.join()
        output = (Path(self.folder.name) / "log").read_text(errors="replace")
        self.folder.cleanup()
        return code, output


def attempt(mutations: Iterable[Mutation], jobs: int = 2, extensions: bool = True) -> Iterator[Outcome]:
    """Run the mutations, `jobs` at a time, each on a fresh copy; yields outcomes as they finish.

    extensions: run with the built extensions, except mutations of the torch path.
    """
    waiting = [Attempt(m, m.tests, extensions and m.path != "torch") for m in mutations]
    running: list[Attempt] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            new = waiting.pop(0)
            assert new.mutation is not None
            try:
                new.start()
                running.append(new)
            except LookupError as error:
                yield Outcome(new.mutation.name, False, f"BROKEN: {error.args[0]}", 0.0)
        wait([a.process.sentinel for a in running], 1.0)
        for a in [a for a in running if a.process.exitcode is not None or a.overdue()]:
            running.remove(a)
            assert a.mutation is not None
            seconds = time.monotonic() - a.begin
            yield Outcome(a.mutation.name, *judge(*a.finish()), seconds)


def healthy(mutations: Iterable[Mutation], extensions: bool) -> str:
    """Run the tests of all mutations on the unchanged code: "" if they pass, else pytest's output."""
    for with_them in (True, False):
        those = [m.tests for m in mutations if (extensions and m.path != "torch") == with_them]
        if not those:
            continue
        one = Attempt(None, dict.fromkeys(itertools.chain(*those)), with_them)
        try:
            one.start()
        except LookupError as error:
            return str(error.args[0])
        one.process.join(TIMEOUT_S)
        code, output = one.finish()
        if code != 0:
            return output or "hung"
    return ""


def preload() -> None:
    """Import slow modules once; never the engine or a test."""
    for name in PRELOADED.split():
        importlib.import_module(name)
