"""The CUDA kernels of csrc on the CPU (tests/csrc/cuda_emulator): compiling them, memory for them, calling them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from tests.support.paths import ROOT

EMULATOR = ROOT / "tests/csrc/cuda_emulator"
# signed overflow, shifts, misaligned 16-byte accesses and the like end the process with a message on stderr
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
CHECKED = ["-fsanitize=alignment,signed-integer-overflow,shift,bounds", "-fno-sanitize-recover=all"]
ALL_CHECKED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
KEEP = ROOT / "build/cuda_emulated"
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def compile_emulated(csrc: Path = ROOT / "csrc", flags: Sequence[str] = CHECKED, keep: Path = KEEP) -> Path:
    """A library of the kernels in `csrc` and the emulator; kept in `keep` under a name made from its sources."""
    units = [*sorted(csrc.rglob("*.cu")), *sorted(EMULATOR.glob("*.c*"))]
    texts = [p.read_bytes() for p in (*units, *sorted(csrc.rglob("*.h")), *sorted(EMULATOR.glob("include/*.h")))]
    key = hashlib.sha256(b"\0".join([*texts, " ".join([*FLAGS, *flags]).encode()])).hexdigest()[:16]
    folder = keep / key
    library = folder / "kernels.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    mine = str(os.getpid())  # two processes may build the same at once

    def compiled(unit: Path) -> str:
        target = folder / f"{unit.name}.{mine}.o"
        includes = [f"-I{EMULATOR / 'include'}", f"-I{csrc}"]
        run(["g++", *FLAGS, *flags, *includes, "-x", "c++", "-c", str(unit), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, units))
    draft = folder / f"{mine}.so"
    run(["g++", *flags, "-shared", *objects, "-o", str(draft)])
    draft.rename(library)
    for path in objects:
        Path(path).unlink()
    return library


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:3000]}"


class Kernels:
    """The library's functions, called with tensors (null for None), numbers and lists; an error of theirs is raised."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))

    def seed(self, seed: int, processors: int = 3) -> None:
        """Fixes the order of threads and blocks from here on."""
        self.library.emulator_seed(ctypes.c_uint64(seed), processors)

    def __call__(self, name: str, *arguments: Tensor | int | float | Sequence[int] | Sequence[float] | None) -> None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        kept = []  # arrays must live until the call is over
        for x in arguments:
            if isinstance(x, Tensor):
                kept.append(ctypes.c_void_p(x.data_ptr()))
            elif isinstance(x, bool):
                kept.append(ctypes.c_bool(x))
            elif isinstance(x, int):
                kept.append(ctypes.c_int64(x))
            elif isinstance(x, float):
                kept.append(ctypes.c_double(x))
            elif x is None:
                kept.append(ctypes.c_void_p(None))
            else:
                kind = ctypes.c_double if isinstance(x[0], float) else ctypes.c_int64
                kept.append((kind * len(x))(*x))
        if error := function(*kept):
            raise RuntimeError(error.decode())


class Memory:
    """Tensors with guards around them: what a kernel writes beside its results, or into its inputs, is found."""

    GUARD = 64  # values on either side

    def __init__(self) -> None:
        self.rooms: list[tuple[Tensor, int, Tensor]] = []  # with the guards; values between them; as it should be

    def _room(self, shape: Sequence[int], dtype: torch.dtype, off: int) -> tuple[Tensor, Tensor]:
        count = torch.Size(shape).numel()
        room = torch.full((count + 2 * self.GUARD,), 77, dtype=dtype)
        begin = self.GUARD + off  # torch's memory begins at multiples of 64 bytes
        self.rooms.append((room, begin, room.clone()))
        return room, room[begin : begin + count].view(*shape)

    def give(self, values: Tensor, off: int = 0) -> Tensor:
        """A copy that begins `off` values after a multiple of 16 bytes; no kernel may write to it."""
        room, inner = self._room(values.shape, values.dtype, off)
        inner.copy_(values)
        self.rooms[-1][2].copy_(room)
        return inner

    def take(self, shape: Sequence[int], dtype: torch.dtype, off: int = 0) -> Tensor:
        """Room for a result; holds NaN."""
        room, inner = self._room(shape, dtype, off)
        inner.fill_(torch.nan)
        self.rooms[-1][2].copy_(room)
        return inner

    def lend(self, values: Tensor, off: int = 0) -> Tensor:
        """A copy that a kernel is to write to."""
        return self.take(values.shape, values.dtype, off).copy_(values)

    def check(self, *results: Tensor) -> None:
        """Nothing but the results has changed since the last check."""
        starts = {x.data_ptr() for x in results}
        for room, begin, expected in self.rooms:
            values = slice(begin, begin + len(room) - 2 * self.GUARD)
            if room[begin:].data_ptr() in starts:
                expected[values] = room[values]
            bits = (x.view(torch.int16 if x.element_size() == 2 else torch.int32) for x in (room, expected))
            assert torch.equal(*bits), "a kernel wrote beside its results"
