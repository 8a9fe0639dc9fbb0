"""tools/bench/gpu.py at tiny sizes on the CPU: all its logic runs, and its files can be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SECTIONS = ["limits", "step", "attention", "ops", "profile", "curve"]


@pytest.mark.heavy
def test_tiny_on_a_cpu(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--tiny", "--no-build", "--out", str(tmp_path / "gpu.json"), "--sections", *SECTIONS]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    script = str(ROOT / "tools/bench/gpu.py")
    done = subprocess.run([sys.executable, script, *words], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("best: step, sequence ")
    written = json.loads((tmp_path / "gpu.json").read_text())
    found = written["details"]
    assert written["machine"]["torch"] and written["command"].endswith("curve") and written["date"]
    units = {row["unit"] for row in written["rows"]}
    assert units == {"tokens/s", "us"} and all(row["ours"] and row["limits"] for row in written["rows"])
    failed = [row for section in SECTIONS for row in found[section] if "failed" in row or "skipped" in row]
    assert not failed
    assert [row["layers"] for row in found["step"]] == [3] * 4 and all(row["share"] > 0 for row in found["step"])
    assert {row["what"].split(",")[0] for row in found["attention"] if "refused" not in row} >= {"sdpa"}
    assert all(row["losses"] for row in found["curve"]) and found["seconds"].keys() == set(SECTIONS)
    kinds = found["profile"][0]
    assert kinds["matmuls"] > 0 and kinds["attention"] > 0
