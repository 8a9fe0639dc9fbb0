"""Builds the optional C++ extensions whose requirements are installed; without them the reference code runs.

engine._index (csrc/data): sample order and batch gather; pybind11, no torch. engine._shared (csrc/shared): collectives
over shared memory; pybind11, no torch, Linux only. engine._ops (csrc/ops, csrc/kernels): operators registered with
torch, no Python; needs torch at build time, hence `--no-build-isolation`. Its CUDA kernels (csrc/kernels/cuda) are
built if torch has CUDA and nvcc of the same CUDA release is found (CUDA_HOME, PATH), for the compute capabilities of
TORCH_CUDA_ARCH_LIST, by default 8.0 and 9.0. Extensions that could not be built are printed with the reason, which
engine/_build.json keeps for `engine doctor`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FAILED: dict[str, str] = {}  # name of an extension that was not built -> reason
CAPABILITIES = "8.0 9.0+PTX"
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))


def ops() -> Extension | None:
    """The torch operators, or None if torch cannot be imported."""
    try:
        import torch
    except ImportError as error:
        FAILED["engine._ops"] = f"torch could not be imported when this was installed ({error})"
        return None
    root = Path(torch.__file__).parent
    flags = ["-O3", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-g0"]
    flags += ["-Wno-maybe-uninitialized"]  # a false alarm in gcc 12's avx512fintrin.h
    return Extension(
        "engine._ops",
        [*sorted(glob("csrc/ops/*.cpp")), *sorted(glob("csrc/kernels/cpu/*.cpp"))],
        depends=[*HEADERS, *sorted(glob("csrc/kernels/cuda/*.cu"))],
        include_dirs=["csrc", str(root / "include")],
        library_dirs=[str(root / "lib")],
        libraries=["torch_cpu", "c10"],
        define_macros=[("BUILT_FOR", f'"{torch.__version__}"')],
        extra_compile_args=[*flags, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"],
        extra_link_args=["-fopenmp"],
        language="c++",
        optional=True,
    )


def plain(name: str, folder: str, std: int, flags: tuple[str, ...] = ()) -> Extension | None:
    """A pybind11 extension that does not need torch, or None if pybind11 is missing."""
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError as error:
        FAILED[name] = f"pybind11 could not be imported when this was installed ({error})"
        return None
    extension = Pybind11Extension(
        name,
        sorted(glob(f"{folder}/*.cpp")),
        cxx_std=std,
        depends=HEADERS,
        include_dirs=["csrc"],
        extra_compile_args=["-O3", *flags],
    )
    extension.optional = True
    return extension


def find_nvcc(cuda: str) -> str:
    """Path of an nvcc with the major release of `cuda`, which is torch's. RuntimeError gives the reason if none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = (
        shutil.which("nvcc", path=f"{home}/bin")
        if home
        else shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    )
    if nvcc is None:
        raise RuntimeError(f"nvcc not found in {home + '/bin' if home else 'PATH or /usr/local/cuda/bin'}")
    version = subprocess.run([nvcc, "--version"], capture_output=True, encoding="utf-8", check=True).stdout
    release = re.search(r"release (\d+)\.", version)
    if release is None or release[1] != cuda.split(".")[0]:
        raise RuntimeError(f"{nvcc} is of CUDA {release[1] if release else '?'}, torch is built for {cuda}")
    return nvcc


def find_cudart(nvcc: str, torch_folder: Path) -> str:
    """Path of the CUDA runtime that torch loads, else of the toolkit's."""
    toolkit = Path(nvcc).resolve().parent.parent
    folders = [
        *sorted(torch_folder.parent.glob("nvidia/*/lib")),
        torch_folder / "lib",
        toolkit / "lib64",
        toolkit / "lib",
    ]
    for folder in folders:
        for path in sorted(folder.glob("libcudart.so*")):
            return str(path)
    raise RuntimeError(f"libcudart.so was not found in {', '.join(map(str, folders))}")


def gencode(capabilities: str) -> list[str]:
    """nvcc's options for compute capabilities such as "8.0 9.0+PTX"."""
    flags = []
    for word in capabilities.replace(";", " ").split():
        number, plus, _ = word.partition("+PTX")
        name = number.replace(".", "")
        flags.append(f"-gencode=arch=compute_{name},code={f'[sm_{name},compute_{name}]' if plus else f'sm_{name}'}")
    return flags


def add_cuda(extension: Extension, folder: Path) -> None:
    """Compile the CUDA kernels into `folder` and add them to engine._ops; nothing if torch has no CUDA."""
    import torch

    if torch.version.cuda is None:
        return
    capabilities = os.environ.get("TORCH_CUDA_ARCH_LIST") or CAPABILITIES
    try:
        nvcc = find_nvcc(torch.version.cuda)
        cudart = find_cudart(nvcc, Path(torch.__file__).parent)
        flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc", *gencode(capabilities)]

        def compiled(source: str) -> str:
            target = str(folder / f"{Path(source).stem}.o")
            command = [nvcc, *flags, "-c", source, "-o", target]
            print(" ".join(command))
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                check=False,
            )
            if done.returncode:
                print(done.stdout, file=sys.stderr)
                raise RuntimeError(first_errors(done.stdout) or f"{nvcc} ended with exit code {done.returncode}")
            return target

        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compiled, sorted(glob("csrc/kernels/cuda/*.cu"))))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        FAILED["cuda"] = str(error)
        return
    extension.extra_objects += [*objects, cudart]
    extension.define_macros.append(("WITH_CUDA", f'"{capabilities}"'))


def first_errors(log: str) -> str:
    """The first two lines of the compiler's log that report an error."""
    return "; ".join([line.strip() for line in log.splitlines() if re.search(r"\berror\b", line, re.I)][:2])


def short_reason(error: BaseException) -> str:
    """Reason of a build error whose log has no error line."""
    while error.__context__ is not None and not isinstance(error, subprocess.CalledProcessError):
        error = error.__context__
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error.cmd[0]} ended with exit code {error.returncode}"
    return str(error)[:200]


class Build(build_ext):
    """build_ext that records why an extension was not built, and removes older builds of it."""

    settings = ""  # of engine._ops: it is rebuilt for another torch version or for new CUDA settings

    def run(self) -> None:
        # during the build setuptools does not know that extensions will be copied into the source tree
        self.homes = {e.name: Path(self.get_ext_fullpath(e.name)) for e in self.extensions}
        self.notes = Path(self.get_ext_fullpath("engine._ops")).parent / "_build.json"
        super().run()
        for name, reason in FAILED.items():
            print(f"warning: {name} was not built: {reason}", file=sys.stderr)
        self.notes.parent.mkdir(parents=True, exist_ok=True)
        self.notes.write_text(json.dumps({"settings": self.settings, **FAILED}, indent=1) + "\n", encoding="utf-8")

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "engine._ops":
            add_cuda(ext, Path(self.build_temp) / "cuda")
            self.settings = str(ext.define_macros)
            known = self.notes.exists() and json.dumps(self.settings) in self.notes.read_text(encoding="utf-8")
            self.force = self.force or not known
        with tempfile.TemporaryFile() as log:
            stderr = os.dup(2)
            os.dup2(log.fileno(), 2)
            error = None
            try:
                super().build_extension(ext)
            except Exception as raised:  # compilers raise many types; setuptools decides which are fatal
                error = raised
            finally:
                os.dup2(stderr, 2)
                os.close(stderr)
            log.seek(0)
            output = log.read().decode(errors="replace")
        sys.stderr.write(output)
        if error is not None:
            FAILED[ext.name] = first_errors(output) or short_reason(error)
            for path in (self.homes[ext.name], Path(self.get_ext_fullpath(ext.name))):
                path.unlink(missing_ok=True)
            raise error


index = plain("engine._index", "csrc/data", std=17)
fast = ("-fno-math-errno", "-fno-trapping-math", "-g0")
shared = plain("engine._shared", "csrc/shared", std=20, flags=fast)
setup(ext_modules=[*filter(None, [index, shared, ops()])], cmdclass={"build_ext": Build})
