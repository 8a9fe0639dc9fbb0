"""The findings of `engine doctor`: versions, machine, devices, communication and kernels, and whether they work.

Missing optional packages are reported, not counted as errors; a failing self-test is an error.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.checkpoint.lineage import code_versions
from engine.cli import selftest
from engine.data.samples import native_index
from engine.distributed import shared_memory
from engine.distributed.launch import backends
from engine.distributed.pair import try_pair
from engine.ops import attention, native
from engine.util.build_notes import how_to_build, why_not_built

# distribution -> (module to import, a submodule that other packages of the same name do not have)
OPTIONAL: dict[str, tuple[str, str]] = {
    "apex": ("apex", "normalization"),  # PyPI has another apex, which is not NVIDIA's
    "flash-attn": ("flash_attn", ""),
    "flash-attn-3": ("flash_attn_interface", ""),
    "transformers": ("transformers", ""),
    "pyarrow": ("pyarrow", ""),
    "sentencepiece": ("sentencepiece", ""),
    "tiktoken": ("tiktoken", ""),
    "datatrove": ("datatrove", ""),
    "cryptography": ("cryptography", ""),
    "tensorboard": ("tensorboard", ""),
    "matplotlib": ("matplotlib", ""),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report: a topic, the text about it, and whether it is an error."""

    topic: str
    text: str
    broken: bool = False


def examine(timeout_s: float) -> Iterator[Finding]:
    """Yield all findings, each as soon as it is known. timeout_s: time limit of the two-process tests, in seconds."""
    yield from _versions()
    yield from _machine()
    yield from _gpus()
    yield from _communication(timeout_s)
    yield from _extensions()
    yield from _kernels()
    yield from _packages()


def _versions() -> Iterator[Finding]:
    versions = code_versions()
    yield Finding("engine", f"{versions['engine']}, code {versions['code']}")
    yield Finding("python", f"{versions['python']}, torch {versions['torch']}, numpy {np.__version__}")
    yield Finding("platform", platform.platform())


def _machine() -> Iterator[Finding]:
    info = dict(_pairs("/proc/cpuinfo"))
    flags = info.get("flags", "").split()
    widths = [f"{name} {'yes' if flag in flags else 'no'}" for name, flag in (("AVX2", "avx2"), ("AVX-512", "avx512f"))]
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("CPU", f"{info.get('model name', platform.machine())}; {', '.join(widths)}; torch uses {capability}")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(
        "cores", f"{usable} for this process, of {os.cpu_count()}; torch uses {torch.get_num_threads()} threads"
    )
    memory = {name: int(text.split()[0]) / 2**20 for name, text in _pairs("/proc/meminfo") if text.endswith("kB")}
    if "MemAvailable" in memory:
        limit = _memory_limit_gib()
        within = "" if limit is None else f"; the cgroup of this process may use {limit:.1f} GiB"
        yield Finding("memory", f"{memory['MemAvailable']:.1f} GiB free of {memory['MemTotal']:.1f} GiB{within}")


def _pairs(file: str) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of each `name : value` line; nothing if the file does not exist (not Linux)."""
    path = Path(file)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        name, colon, value = line.partition(":")
        if colon:
            yield name.strip(), value.strip()


def _memory_limit_gib() -> float | None:
    """Memory limit of the container in GiB (cgroup 2, else 1); None without a limit."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(file)
        if path.exists() and (text := path.read_text(encoding="utf-8").strip()).isdecimal() and int(text) < 1 << 60:
            return int(text) / 2**30
    return None


def _gpus() -> Iterator[Finding]:
    if torch.version.cuda is None:
        yield Finding("GPUs", "none: this torch is built without CUDA")
        return
    built = f"torch is built for CUDA {torch.version.cuda}"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        yield Finding("GPUs", f"none: {built}, but: {str(error).partition(chr(10))[0]}")
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if backends()["nccl"] else "not built in"
    yield Finding("GPUs", f"{torch.cuda.device_count()}; {built}, NCCL {nccl}")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.1f} GiB, compute capability {device.major}.{device.minor}"
        yield Finding(f"GPU {index}", f"{device.name}, {memory}")


def _communication(timeout_s: float) -> Iterator[Finding]:
    built = backends()
    yield Finding("backends", ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in built.items()))
    if not built["gloo"]:
        yield Finding(
            "gloo", "this torch is built without it, so training on several CPU processes is not possible", broken=True
        )
    elif why := try_pair("gloo", timeout_s):
        yield Finding("gloo", f"two processes on this machine could not sum a number: {why}", broken=True)
    else:
        yield Finding("gloo", "two processes on this machine have summed a number")
        yield _shared_memory(timeout_s)


def _shared_memory(timeout_s: float) -> Finding:
    module, why = shared_memory.load()
    if module is None:
        return Finding("shared memory", f"{why}, so gloo is used instead; {how_to_build()}")
    why = try_pair("shared", timeout_s)
    done = "two processes on this machine have summed a number"
    return Finding("shared memory", f"not available here, so gloo is used instead: {why}" if why else done)


def _extensions() -> Iterator[Finding]:
    found = {
        "engine._index, which gives the same order as numpy": native_index.load(),
        "engine._shared": shared_memory.load(),
        f"engine._ops for torch {torch.__version__}": native.load(),
    }
    for what, (extension, why) in found.items():
        yield Finding("extension", what if extension is not None else f"{why}; {how_to_build()}")
    library = native.load()[0]
    if torch.version.cuda is not None and library is not None:
        built = library.cuda_capabilities()
        yield Finding(
            "extension",
            f"CUDA kernels for compute capability {built}"
            if built
            else f"no CUDA kernels ({why_not_built('cuda') or 'the reason is not recorded'}); {how_to_build()}",
        )


def _kernels() -> Iterator[Finding]:
    devices = [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]
    for device in devices:
        yield Finding("kernels", f"fp32 on {device.type}: {native.describe_kernels(device, torch.float32)}")
        yield _attention(device)
        for check in selftest.check_ops(device):
            kernel = "custom kernel" if check.custom else "torch"
            tolerance = f"{check.tolerance:.0e}" if check.tolerance else "0: all bits"
            error = f"max error {check.difference:.1e}, tolerance {tolerance}"
            text = f"{check.name}: {kernel}; {check.error or error}"
            yield Finding(f"op on {device.type}", text + " WRONG" * check.broken, broken=check.broken)


def _attention(device: torch.device) -> Finding:
    """The attention implementation that `auto` selects, and why faster ones are not available."""
    name, dtype = ("bf16", torch.bfloat16) if device.type == "cuda" else ("fp32", torch.float32)
    with native.forced(kernels=native.load()[0] is not None):  # else it would warn about a missing extension again
        cases = (attention.attention_case(device, dtype, 128, documents=mask) for mask in (False, True))
        plain, masked = (attention.select_implementation("auto", case) for case in cases)
    text = f"{name} on {device.type}: {plain}; with document masking: {masked}"
    return Finding(
        "attention", "; ".join([text, *(attention.missing_packages().values() if device.type == "cuda" else ())])
    )


def _packages() -> Iterator[Finding]:
    versions = {name: _version(name, *where) for name, where in OPTIONAL.items()}
    found = [f"{name} {version}" for name, version in versions.items() if version]
    missing = [name for name, version in versions.items() if not version]
    yield Finding("optional", ", ".join(found) or "none")
    yield Finding("not installed", ", ".join(missing) or "none")


def _version(distribution: str, module: str, submodule: str) -> str:
    """Version of an installed package; empty if it is missing. Does not import it, which may take seconds."""
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # it is in sys.modules without one
        return ""
    if spec is None:
        return ""
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if submodule and not any((folder / submodule).is_dir() for folder in folders):
        return ""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"
