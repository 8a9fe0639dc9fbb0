"""The CPU kernels of keyed draws have the same bits for every processor that they are compiled for.

A compiler that contracts a product and a sum to an FMA would change them, so the same test must find that fault.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from engine.ops import draws, native
from tests.csrc.sources import CSRC, run
from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
NVCC = shutil.which("nvcc")
FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-DNO_CLONES"]
FLAGS += ["-w", "-I", str(CSRC)]
ENTRY = """#include "kernels/kernels.h"
extern "C" void normals(const int64_t* starts, int64_t rows, int64_t n, uint64_t key, uint64_t stream, float* out) {
    trident::draw(starts, rows, n, {key, stream}, trident::NORMAL, 0, out, 1);
}
"""
# kind of processor -> the features of this one that it needs
PROCESSORS = {"x86-64": "", "x86-64-v3": "fma", "x86-64-v4": "avx512dq"}


def normals(source: str, processor: str, folder: Path) -> bool:
    """Whether the kernel of this source, compiled for a processor, has the bits of the reference."""
    if PROCESSORS[processor] not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor is no {processor}")
    (folder / "draws.cpp").write_text(source + ENTRY)
    library = folder / "draws.so"
    run(["g++", *FLAGS, f"-march={processor}", str(folder / "draws.cpp"), "-o", str(library)])
    starts, n, key = torch.tensor([5, 10_000_000]), 100_000, draws.Key.of(1, "processors")
    out = torch.empty(2, n)
    words = [ctypes.c_uint64(x % 2**64) for x in (key.key, key.stream)]
    counts = [ctypes.c_int64(x) for x in (2, n)]
    ctypes.CDLL(str(library)).normals(
        ctypes.c_void_p(starts.data_ptr()), *counts, *words, ctypes.c_void_p(out.data_ptr())
    )
    with native.forced(kernels=False):
        return torch.equal(out, draws.normal(key, draws.Places(starts, n)))


@pytest.mark.parametrize("processor", PROCESSORS)
def test_processors_agree(processor: str, tmp_path: Path) -> None:
    assert normals((CSRC / "kernels/cpu/draws.cpp").read_text(), processor, tmp_path)


@pytest.mark.heavy
def test_a_contraction_is_found(tmp_path: Path) -> None:
    source = (CSRC / "kernels/cpu/draws.cpp").read_text()
    pragma = '#pragma GCC optimize("fp-contract=off")'
    assert pragma in source
    assert not normals(source.replace(pragma, ""), "x86-64-v3", tmp_path)


@pytest.mark.heavy
@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
def test_nvcc_contracts_nothing(tmp_path: Path) -> None:
    source, ptx = ROOT / "csrc/kernels/cuda/draws.cu", tmp_path / "draws.ptx"
    command = [str(NVCC), "-std=c++17", "-O3", "-arch=sm_90", f"-I{CSRC}", "-ptx", str(source), "-o", str(ptx)]
    subprocess.run(command, check=True)
    text = ptx.read_text()
    assert "mul.rn.f32" in text and "sqrt.rn.f32" in text
    assert "fma.rn.f32" not in text and "approx" not in text
