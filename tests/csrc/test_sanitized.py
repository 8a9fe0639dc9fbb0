"""csrc built with the address and undefined-behaviour sanitizers.

csrc/data runs its usual Python tests; the CPU kernels of the operators run in a separate driver (ops_driver.cpp),
without Python and torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.csrc.sources import CSRC, KERNELS, compile_units, link
from tests.support.paths import ROOT

FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]
SUITE = [
    "tests/data/samples/test_order.py",
    "tests/data/samples/test_blend.py",
    "tests/data/samples/test_fuzz.py",
    "tests/data/samples/test_indexed.py",
    "tests/data/prepare/test_pack.py",
]
# Tests of forks and time limits are meaningless under a sanitizer. Leak detection is off: Python keeps memory to the
# end.
TEST_FILTER = "not heavy and not fork and not layout and not at_once and not fallback"

pytestmark = [pytest.mark.timeout(900), pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A copy of the package with the sanitized extension, and the environment to run it in."""
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("sanitized")
    shutil.copytree(ROOT / "engine", folder / "engine", ignore=shutil.ignore_patterns("_index*", "__pycache__"))
    for name in ("tests", "pyproject.toml", "README.md", "setup.py", "tools", "csrc"):
        (folder / name).symlink_to(ROOT / name)
    target = folder / "engine" / f"_index{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    command = [
        "g++",
        *FLAGS,
        "-std=c++17",
        "-fPIC",
        "-shared",
        *includes,
        *map(str, sorted((CSRC / "data").glob("*.cpp"))),
        "-o",
        str(target),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")  # without the last, throw is not intercepted
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    return folder, environment


def run_sanitized(sanitized: tuple[Path, dict[str, str]], *words: str) -> subprocess.CompletedProcess[str]:
    folder, environment = sanitized
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=800, check=False
    )


@pytest.mark.heavy
def test_order_blends_and_fuzz_are_clean(sanitized: tuple[Path, dict[str, str]]) -> None:
    done = run_sanitized(
        sanitized, "-m", "pytest", "-q", "-x", "-k", TEST_FILTER, "-m", "not heavy", "--timeout", "600", *SUITE
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout or "100%" in done.stdout


@pytest.mark.heavy
def test_it_is_the_sanitized_build_that_runs(sanitized: tuple[Path, dict[str, str]]) -> None:
    """A clean run is meaningless if another build was loaded: the loaded one has the sanitizer's symbols."""
    done = run_sanitized(sanitized, "-c", "import engine._index as m; print(m.__file__)")
    assert done.stdout.startswith(str(sanitized[0])), done.stderr
    assert b"__asan_init" in Path(done.stdout.strip()).read_bytes()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CPU kernels and their driver. Without clones, which the loader selects before the sanitizer is ready."""
    flags = [*FLAGS, "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-DNO_CLONES", "-w"]
    objects = compile_units([*KERNELS, ROOT / "tests/csrc/ops_driver.cpp"], flags)
    return link(objects, flags, tmp_path_factory.mktemp("kernels") / "driver")


@pytest.mark.parametrize("rounds", [15, pytest.param(2000, marks=pytest.mark.heavy)])
def test_kernels_are_clean(driver: Path, rounds: int) -> None:
    """Random shapes, zero rows, strided heads, documents. Fresh memory is NaN, so reads of unwritten values show."""
    options = {"ASAN_OPTIONS": "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000"}
    done = subprocess.run([driver, str(rounds)], env=os.environ | options, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"{rounds} rounds")
