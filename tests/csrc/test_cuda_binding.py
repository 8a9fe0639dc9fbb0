"""The binding of the CUDA kernels to torch, tested without a GPU.

The operators are built WITH_CUDA on the emulator, which sends CPU tensors to the CUDA kernels, and the operators' own
tests run on this build. In addition, nvcc compiles every kernel file for the supported GPUs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.csrc.emulated import FLAGS, ROOT
from tests.csrc.sources import KERNELS, run

NVCC = shutil.which("nvcc")
# Flags of setup.py for the CPU kernels: sums that are not vectorised round more than the operators' tests allow.
AS_BUILT = ["-O3", "-fno-math-errno", "-fno-trapping-math"]


@pytest.mark.heavy
@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", sorted(p.name for p in (ROOT / "csrc/kernels/cuda").glob("*.cu")))
def test_nvcc_compiles(source: str, arch: str, tmp_path: Path) -> None:
    """Every warning is an error."""
    command = [str(NVCC), "-std=c++17", "-O3", "-Werror", "all-warnings", f"-arch={arch}", f"-I{ROOT / 'csrc'}", "-c"]
    run([*command, str(ROOT / "csrc/kernels/cuda" / source), "-o", str(tmp_path / "kernels.o")])


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
def test_packs_take_one_instruction(tmp_path: Path) -> None:
    """In the PTX, every access of a kernel on packs of 8 bf16 is 16 bytes wide (nvcc has split stores of structs)."""
    source, ptx = str(ROOT / "csrc/kernels/cuda/model.cu"), tmp_path / "model.ptx"
    run([str(NVCC), "-std=c++17", "-O3", "-arch=sm_90", f"-I{ROOT / 'csrc'}", "-ptx", source, "-o", str(ptx)])
    bodies = re.findall(r"\.entry \S*(?:turn|gate_\w+?)INS_4bf16ELi8E(.*?)^}", ptx.read_text(), re.M | re.S)
    assert len(bodies) == 2 + 2 * 3  # RoPE forward and backward; three gates, forward and backward
    for body in bodies:
        accesses = re.findall(r"\b(?:ld|st)\.global\.\S+", body)
        assert len(accesses) >= 3 and all(".v4.u32" in access for access in accesses), accesses


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package whose engine._ops has the emulated CUDA kernels instead of the CPU kernels."""
    folder = tmp_path_factory.mktemp("emulated")
    shutil.copytree(ROOT / "engine", folder / "engine", ignore=shutil.ignore_patterns("_ops*", "__pycache__"))
    for name in ("tests", "pyproject.toml", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    csrc, emulator = ROOT / "csrc", ROOT / "tests/csrc/cuda_emulator"
    home = Path(torch.__file__).parent
    units = [*(p for p in csrc.glob("ops/*.cpp") if p.name != "stream.cpp"), *KERNELS, *csrc.rglob("*.cu")]
    units += [emulator / "torch/stream.cpp", emulator / "emulator.cpp"]
    includes = [f"-I{emulator / 'include'}", f"-I{csrc}", f"-I{home / 'include'}"]
    macros = ['-DWITH_CUDA="8.0"', f'-DBUILT_FOR="{torch.__version__}"']

    def compile_unit(unit: Path) -> str:
        target = str(folder / f"{unit.parent.name}_{unit.name}.o")
        flags = [*FLAGS, *AS_BUILT] if unit in KERNELS else FLAGS
        run(["g++", *flags, "-fopenmp", *macros, *includes, "-x", "c++", "-c", str(unit), "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_unit, units))
    target = folder / "engine" / f"_ops{sysconfig.get_config_var('EXT_SUFFIX')}"
    libraries = [f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
    run(["g++", "-shared", "-fopenmp", *objects, *libraries, "-o", str(target)])
    return folder


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_operators_on_emulated_cuda(emulated: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(emulated), "OMP_NUM_THREADS": "1"}
    say = "from engine.ops import native; print(native.load()[0].cuda_capabilities())"
    done = subprocess.run(
        [sys.executable, "-c", say], cwd=emulated, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "8.0\n", done.stderr
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--timeout", "600", "-m", "not heavy"]
    command += ["tests/ops/test_native.py", "tests/ops/test_boundaries.py"]
    done = subprocess.run(command, cwd=emulated, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
