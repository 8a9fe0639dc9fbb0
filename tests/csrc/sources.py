"""The C++ sources that these tests build with special flags, and the objects, which are kept under build/."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.paths import ROOT

CSRC = ROOT / "csrc"
KERNELS = sorted((CSRC / "kernels/cpu").glob("*.cpp"))
KEEP = ROOT / "build/objects_of_tests"


def compile_units(
    units: Sequence[Path], flags: Sequence[str], csrc: Path = CSRC, keep: Path = KEEP, headers: Iterable[Path] = ()
) -> list[str]:
    """The units' objects, in order; kept under a hash of unit, headers, flags and compiler. headers: others."""
    compiler = run(["g++", "--version"])
    texts = [path.read_bytes() for path in (*sorted(csrc.rglob("*.h")), *sorted(headers))]
    common = hashlib.sha256(b"\0".join([compiler.encode(), " ".join(flags).encode(), *texts]))
    keep.mkdir(parents=True, exist_ok=True)

    def compiled(unit: Path) -> str:
        key = common.copy()
        key.update(b"\0" + unit.read_bytes())
        target = keep / f"{unit.name}-{key.hexdigest()[:16]}.o"
        if not target.exists():
            draft = target.with_suffix(f".{os.getpid()}.o")  # two processes may compile the same unit at the same time
            run(["g++", *flags, f"-I{csrc}", "-c", str(unit), "-o", str(draft)])
            draft.rename(target)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, units))


def link(objects: Sequence[str], flags: Sequence[str], target: Path) -> Path:
    """The program or library of the objects."""
    run(["g++", *flags, *objects, "-o", str(target)])
    return target


def run(command: list[str]) -> str:
    """Standard output of a command that succeeds."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:3000]}"
    return done.stdout
