"""What ranks do in the memory that they share, under the thread, address and undefined-behaviour sanitizers.

A driver without Python (shared_driver.cpp) runs the ranks as threads. That the thread sanitizer sees the protocol is
proved by weakening it: without any one of its orderings there is a data race.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.paths import ROOT

UNITS = [ROOT / f"csrc/shared/{x}.cpp" for x in ("channel", "segment", "reduce")]
UNITS += [ROOT / "tests/csrc/shared_driver.cpp"]
# Without clones: the loader picks too early. Fences, which this sanitizer does not know, order here only who sleeps.
FLAGS = ["-std=c++20", "-O1", "-DNO_CLONES", "-fno-omit-frame-pointer", "-w", "-Wno-tsan"]
THREAD = [*FLAGS, "-fsanitize=thread"]
ADDRESS = [*FLAGS, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]

WEAKER = [  # where, and an ordering that a reader or a writer relies on; one of each direction first
    ("segment.h", "published.store(++next_, std::memory_order_release)"),
    ("segment.h", "done->load(std::memory_order_acquire)"),
    ("channel.h", "lane.published.load(std::memory_order_acquire)"),
    ("channel.cpp", "lane.published.load(std::memory_order_acquire)"),
    ("channel.cpp", "done.store(done_.number, std::memory_order_release)"),
    ("channel.cpp", "done.store(++i.next, std::memory_order_release)"),
    ("channel.cpp", "summed.store(taken_.number, std::memory_order_release)"),
    ("channel.cpp", "summed.load(std::memory_order_acquire)"),
]


def compiled(units: Sequence[Path], flags: Sequence[str], csrc: Path, folder: Path) -> list[str]:
    def build(unit: Path) -> str:
        target = str(folder / f"{unit.stem}.o")
        subprocess.run(["g++", *flags, f"-I{csrc}", "-c", str(unit), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(build, units))


def linked(objects: Sequence[str], flags: Sequence[str], target: Path) -> Path:
    subprocess.run(["g++", *flags, *objects, "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A prefix for commands with which the thread sanitizer runs here."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "empty.cpp").write_text("int main() {}\n")
    program = linked(compiled([folder / "empty.cpp"], THREAD, folder, folder), THREAD, folder / "empty")
    for prefix in ([], ["setarch", "-R"]):  # it knows fewer layouts of memory than some kernels draw from
        if prefix and shutil.which(prefix[0]) is None:
            continue
        done = subprocess.run([*prefix, str(program)], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return prefix
    pytest.skip(f"the thread sanitizer does not run here: {done.stderr.strip()[:200]}")


@pytest.fixture(scope="module")
def threaded(alone: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The objects of the driver for the thread sanitizer, the channel first."""
    return compiled(UNITS, [*THREAD, "-g"], ROOT / "csrc", tmp_path_factory.mktemp("thread"))


def run(program: Path, rounds: int, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    options = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"}
    command = [*prefix, str(program), str(rounds)]
    return subprocess.run(command, env=os.environ | options, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.parametrize("rounds", [6, pytest.param(60, marks=pytest.mark.heavy)])
def test_ranks_do_not_race(threaded: list[str], alone: list[str], tmp_path: Path, rounds: int) -> None:
    done = run(linked(threaded, THREAD, tmp_path / "driver"), rounds, alone)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{rounds} rounds\n", "")


@pytest.fixture(scope="module")
def addressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("address")
    return linked(compiled(UNITS, ADDRESS, ROOT / "csrc", folder), ADDRESS, folder / "driver")


@pytest.mark.parametrize("rounds", [15, pytest.param(200, marks=pytest.mark.heavy)])
def test_nothing_is_read_or_written_beside_a_tensor(addressed: Path, rounds: int) -> None:
    """Nor one that is gone; nor is anything leaked."""
    done = run(addressed, rounds)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{rounds} rounds\n", "")


@pytest.mark.parametrize(
    ("file", "ordered"), [pytest.param(*w, marks=[pytest.mark.heavy] * (i > 1)) for i, w in enumerate(WEAKER)]
)
def test_a_weaker_order_is_a_race(
    threaded: list[str], alone: list[str], tmp_path: Path, file: str, ordered: str
) -> None:
    csrc = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    text = (csrc / "shared" / file).read_text()
    assert text.count(ordered) == 1
    relaxed = ordered.replace("_release", "_relaxed").replace("_acquire", "_relaxed")
    (csrc / "shared" / file).write_text(text.replace(ordered, relaxed))
    objects = compiled([csrc / "shared/channel.cpp"], THREAD, csrc, tmp_path) + threaded[1:]
    done = run(linked(objects, THREAD, tmp_path / "driver"), 20, alone)
    assert done.returncode and "ThreadSanitizer: data race" in done.stderr, done.stderr[-2000:]
