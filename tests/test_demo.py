"""`make demo` in a shortened form, with everything that it shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parent.parent / "examples/quickstart/demo.py"


@pytest.mark.timeout(900)
def test_the_demo(tmp_path: Path) -> None:
    command = [sys.executable, str(DEMO), "--short", "--folder", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for text in (
        "$ engine prepare",
        "tensor 2 x pipeline 2",
        "'code': 75",
        "pipeline 2 x data 2",
        "bits/byte",
        "same logits",
    ):
        assert text in done.stdout
    for file in (
        "data/stdlib-train.bin",
        "hf/config.json",
        "hf/model.safetensors.index.json",
        "run/config.toml",
        "loss.png",
    ):
        assert (tmp_path / "demo" / file).exists()
    lines = [json.loads(line) for line in (tmp_path / "demo/run/metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)), "the resumed run goes on where the first one stopped"
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "is there already" in again.stdout
