"""The C++ sources that are built here with other flags."""

from __future__ import annotations

from tests.support.paths import ROOT

CSRC = ROOT / "csrc"
KERNELS = sorted((CSRC / "kernels/cpu").glob("*.cpp"))
