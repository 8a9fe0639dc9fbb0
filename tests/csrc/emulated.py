"""The CUDA kernels of csrc on the CPU emulator (tests/csrc/cuda_emulator): compilation, guarded memory, calls."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.csrc.sources import CSRC, KEEP, compile_units, link
from tests.support.paths import ROOT

EMULATOR = ROOT / "tests/csrc/cuda_emulator"
# signed overflow, invalid shifts, misaligned 16-byte accesses and the like end the process with a message on stderr
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
CHECKED = ["-fsanitize=alignment,signed-integer-overflow,shift,bounds", "-fno-sanitize-recover=all"]
ALL_CHECKED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def compile_emulated(csrc: Path = CSRC, flags: Sequence[str] = CHECKED, keep: Path = KEEP) -> Path:
    """Build a library of the kernels in `csrc` and the emulator; kept in `keep` under a hash of its objects."""
    units = [*sorted(csrc.rglob("*.cu")), *sorted(EMULATOR.glob("*.c*"))]
    compiling = [*FLAGS, *flags, f"-I{EMULATOR / 'include'}", "-x", "c++"]
    objects = compile_units(units, compiling, csrc, keep, EMULATOR.glob("include/*.h"))
    library = keep / f"kernels-{hashlib.sha256(' '.join(objects).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        link(objects, [*flags, "-shared"], keep / f"{os.getpid()}.so").rename(library)
    return library


class Kernels:
    """Calls the library's functions with tensors (None: null), numbers and lists, and raises their errors."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))

    def seed(self, seed: int, processors: int = 3) -> None:
        """Set the seed of the order of threads and blocks, and the number of multiprocessors."""
        self.library.emulator_seed(ctypes.c_uint64(seed), processors)

    def __call__(self, name: str, *arguments: Tensor | int | float | Sequence[int] | Sequence[float] | None) -> None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        kept = []  # arrays must live until the call returns
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
    """Allocates tensors between guard values, to detect writes outside of a kernel's results or into its inputs."""

    GUARD = 64  # values on either side

    def __init__(self) -> None:
        # (buffer with guards, start of the values between them, expected content)
        self.buffers: list[tuple[Tensor, int, Tensor]] = []

    def _buffer(self, shape: Sequence[int], dtype: torch.dtype, off: int) -> tuple[Tensor, Tensor]:
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 2 * self.GUARD,), 77, dtype=dtype)
        begin = self.GUARD + off  # torch aligns its memory to 64 bytes
        self.buffers.append((buffer, begin, buffer.clone()))
        return buffer, buffer[begin : begin + count].view(*shape)

    def give(self, values: Tensor, off: int = 0) -> Tensor:
        """An input: a copy that starts `off` values after a multiple of 16 bytes. No kernel may write to it."""
        buffer, inner = self._buffer(values.shape, values.dtype, off)
        inner.copy_(values)
        self.buffers[-1][2].copy_(buffer)
        return inner

    def take(self, shape: Sequence[int], dtype: torch.dtype, off: int = 0) -> Tensor:
        """An output, filled with NaN."""
        buffer, inner = self._buffer(shape, dtype, off)
        inner.fill_(torch.nan)
        self.buffers[-1][2].copy_(buffer)
        return inner

    def lend(self, values: Tensor, off: int = 0) -> Tensor:
        """An in-place argument: a copy that a kernel reads and writes."""
        return self.take(values.shape, values.dtype, off).copy_(values)

    def check(self, *results: Tensor) -> None:
        """Assert that nothing except the results has changed since the last check."""
        starts = {x.data_ptr() for x in results}
        for buffer, begin, expected in self.buffers:
            values = slice(begin, begin + len(buffer) - 2 * self.GUARD)
            if buffer[begin:].data_ptr() in starts:
                expected[values] = buffer[values]
            bits = (x.view(torch.int16 if x.element_size() == 2 else torch.int32) for x in (buffer, expected))
            assert torch.equal(*bits), "a kernel wrote outside its results"
