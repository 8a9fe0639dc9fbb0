"""Builds the two optional extensions, each only where what it needs is there; without them references run.

engine._index (csrc/index.cpp): sample order and batch gather, pybind11, no torch. engine._ops (the rest of csrc):
operators registered with torch, no Python; needs torch when it is built, hence `--no-build-isolation`.
"""

import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup


def ops() -> Extension | None:
    """The torch operators, or None where torch is not importable."""
    try:
        import torch
    except ImportError:
        print(
            "warning: torch is not installed here, engine._ops is not built (torch's own ops take over)",
            file=sys.stderr,
        )
        return None
    root = Path(torch.__file__).parent
    flags = ["-O3", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-g0"]
    flags += ["-Wno-maybe-uninitialized"]  # a false alarm in gcc 12's own avx512fintrin.h
    return Extension(
        "engine._ops",
        [*sorted(glob("csrc/ops*.cpp")), *sorted(glob("csrc/*_cpu.cpp")), "csrc/gemm.cpp"],
        depends=sorted(glob("csrc/*.h")),
        include_dirs=[str(root / "include")],
        library_dirs=[str(root / "lib")],
        libraries=["torch_cpu", "c10"],
        define_macros=[("BUILT_FOR", f'"{torch.__version__}"')],
        extra_compile_args=[*flags, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"],
        extra_link_args=["-fopenmp"],
        language="c++",
        optional=True,
    )


try:
    from pybind11.setup_helpers import Pybind11Extension, build_ext
except ImportError:
    print("warning: pybind11 is not installed, no extension is built (numpy and torch take over)", file=sys.stderr)
    setup()
else:
    index = Pybind11Extension("engine._index", ["csrc/index.cpp"], cxx_std=17, extra_compile_args=["-O3"])
    index.optional = True
    setup(ext_modules=[index, *filter(None, [ops()])], cmdclass={"build_ext": build_ext})
