"""The short version of `make demo`: its commands, files and console lines."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

DEMO = ROOT / "examples/quickstart/demo.py"


@pytest.mark.timeout(900)
def test_the_demo(
    tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(DEMO.parent))
    demo = importlib.import_module("demo")
    monkeypatch.setattr(demo, "BIN", warm)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--short", "--folder", str(tmp_path / "demo")])
    code, (out, err) = demo.main(), capfd.readouterr()
    assert code == 0, out[-4000:] + err[-4000:]
    for text in (
        "$ engine prepare",
        "tensor 2 x pipeline 2",
        "'code': 75",
        "pipeline 2 x data 2",
        "bits/byte",
        "same logits",
    ):
        assert text in out
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
    assert steps == list(range(1, len(steps) + 1)), "the resumed run must continue where the first one stopped"


def test_a_second_demo_removes_only_the_outputs_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    monkeypatch.syspath_prepend(str(DEMO.parent))
    demo = importlib.import_module("demo")
    assert demo.prepare_folder(folder) and capsys.readouterr().out == ""
    for name in ("data/a.bin", "run/metrics.jsonl", "loss.png", "notes.txt", "mine/a.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    assert demo.prepare_folder(folder)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "is from an earlier demo: removing" in out
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        demo.MARK,
        "notes.txt",
        "mine/a.bin",
    }
    (folder / demo.MARK).unlink()
    monkeypatch.setattr(sys, "argv", ["demo.py", "--short", "--folder", str(folder)])
    assert demo.main() == 1 and "not from a demo" in capsys.readouterr().out
    assert (folder / "mine/a.bin").exists()
