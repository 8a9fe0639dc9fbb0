"""The shared-memory transport under the thread, address and undefined-behaviour sanitizers.

A driver without Python (shared_driver.cpp) runs the ranks as threads. To prove that the thread sanitizer checks the
protocol, each of its memory orderings is weakened in turn, which must cause a data race.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.csrc.sources import compile_units, link
from tests.support.paths import ROOT

UNITS = [ROOT / f"csrc/shared/{x}.cpp" for x in ("channel", "segment", "reduce")]
UNITS += [ROOT / "tests/csrc/shared_driver.cpp"]
# No clones: the loader selects them before the sanitizer is ready. -Wno-tsan: the thread sanitizer ignores fences,
# which here order only the sleeping of ranks.
FLAGS = ["-std=c++20", "-O1", "-DNO_CLONES", "-fno-omit-frame-pointer", "-w", "-Wno-tsan"]
THREAD = [*FLAGS, "-fsanitize=thread"]
ADDRESS = [*FLAGS, "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]

WEAKER = [  # (file, a memory ordering that a reader or a writer needs)
    ("segment.h", "published.store(++next_, std::memory_order_release)"),
    ("segment.h", "done->load(std::memory_order_acquire)"),
    ("channel.h", "lane.published.load(std::memory_order_acquire)"),
    ("channel.cpp", "lane.published.load(std::memory_order_acquire)"),
    ("channel.cpp", "done.store(done_.number, std::memory_order_release)"),
    ("channel.cpp", "done.store(++i.next, std::memory_order_release)"),
    ("channel.cpp", "summed.store(taken_.number, std::memory_order_release)"),
    ("channel.cpp", "summed.load(std::memory_order_acquire)"),
]


@pytest.fixture(scope="module")
def tsan_prefix(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command prefix with which the thread sanitizer runs on this machine."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "empty.cpp").write_text("int main() {}\n")
    program = link(compile_units([folder / "empty.cpp"], THREAD, folder, folder), THREAD, folder / "empty")
    for prefix in ([], ["setarch", "-R"]):  # it fails under the address randomization of some kernels
        if prefix and shutil.which(prefix[0]) is None:
            continue
        done = subprocess.run([*prefix, str(program)], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return prefix
    pytest.skip(f"the thread sanitizer does not run here: {done.stderr.strip()[:200]}")


@pytest.fixture(scope="module")
def tsan_objects(tsan_prefix: list[str]) -> list[str]:
    """The driver's objects for the thread sanitizer; the first is that of channel.cpp."""
    return compile_units(UNITS, [*THREAD, "-g1"])


def run(program: Path, rounds: int, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    options = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"}
    command = [*prefix, str(program), str(rounds)]
    return subprocess.run(command, env=os.environ | options, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.parametrize("rounds", [6, pytest.param(60, marks=pytest.mark.heavy)])
def test_ranks_do_not_race(tsan_objects: list[str], tsan_prefix: list[str], tmp_path: Path, rounds: int) -> None:
    done = run(link(tsan_objects, THREAD, tmp_path / "driver"), rounds, tsan_prefix)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{rounds} rounds\n", "")


@pytest.fixture(scope="module")
def asan_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link(compile_units(UNITS, ADDRESS), ADDRESS, tmp_path_factory.mktemp("address") / "driver")


@pytest.mark.parametrize("rounds", [15, pytest.param(200, marks=pytest.mark.heavy)])
def test_no_access_outside_a_tensor(asan_driver: Path, rounds: int) -> None:
    """The address sanitizer also finds accesses to freed tensors, and leaks."""
    done = run(asan_driver, rounds)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{rounds} rounds\n", "")


@pytest.mark.parametrize(
    ("file", "ordered"), [pytest.param(*w, marks=[pytest.mark.heavy] * (i > 0)) for i, w in enumerate(WEAKER)]
)
def test_a_weaker_memory_order_is_a_race(
    tsan_objects: list[str], tsan_prefix: list[str], tmp_path: Path, file: str, ordered: str
) -> None:
    csrc = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    text = (csrc / "shared" / file).read_text()
    assert text.count(ordered) == 1
    relaxed = ordered.replace("_release", "_relaxed").replace("_acquire", "_relaxed")
    (csrc / "shared" / file).write_text(text.replace(ordered, relaxed))
    objects = compile_units([csrc / "shared/channel.cpp"], THREAD, csrc, tmp_path) + tsan_objects[1:]
    done = run(link(objects, THREAD, tmp_path / "driver"), 20, tsan_prefix)
    assert done.returncode and "ThreadSanitizer: data race" in done.stderr, done.stderr[-2000:]
