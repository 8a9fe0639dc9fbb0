"""The C++ sources that these tests build with special flags."""

from __future__ import annotations

from tests.support.paths import ROOT

CSRC = ROOT / "csrc"
KERNELS = sorted((CSRC / "kernels/cpu").glob("*.cpp"))
