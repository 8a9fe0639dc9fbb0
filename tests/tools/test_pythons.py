"""`make test-pythons` with fake interpreters: those it finds, the files it copies, and its report."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import ROOT


@pytest.fixture
def pythons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The tool in a small tree, with two interpreters in PATH, one of which fails to run, and one in the home."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool = importlib.import_module("pythons")
    monkeypatch.setattr(tool, "ROOT", tmp_path / "tree")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for name, text in {
        "tree/Makefile": "test:\n\t@$(PYTHON) --version && test ! -e fail\n",
        "tree/.gitignore": "built/\n",
        "tree/a/b.py": "1\n",
        "bin/python3.11": "#!/bin/sh\necho 3.11\n",
        "bin/python3.12": "#!/bin/sh\nexit 127\n",
        "home/.pyenv/versions/3.13.2/bin/python3.13": "#!/bin/sh\nexit 1\n",
        "home/.pyenv/versions/3.13.10/bin/python3.13": "#!/bin/sh\necho 3.13.10\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    subprocess.run(["git", "init", "-q", str(tmp_path / "tree")], check=True)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(tool, "VERSIONS", ("3.11", "3.12", "3.13"))
    return tool


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pythons.py", "--folder", str(tool.ROOT / "built"), *arguments])
    return tool.main()


def test_those_found_are_tried_and_the_rest_is_told(
    pythons: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    found = {version: pythons.find(version) for version in pythons.VERSIONS}
    assert found["3.12"] is None and found["3.13"].parent.parent.name == "3.13.10"
    assert run(pythons, monkeypatch) == 0
    out = capfd.readouterr().out
    assert "Python 3.11: make test passed" in out and "Python 3.13: make test passed" in out
    assert "Python 3.12: not tested, because it is not installed" in out
    copied = pythons.ROOT / "built/pythons/3.11"
    (copied / "kept.so").touch()
    (copied / ".git/info/exclude").write_text("kept.so\n")
    (pythons.ROOT / "a/b.py").rename(pythons.ROOT / "a/c.py")
    (pythons.ROOT / "fail").touch()
    assert run(pythons, monkeypatch, "3.11") == 1, "make failed"
    assert "Python 3.11: make test FAILED (make ended with exit code 2)" in capfd.readouterr().out
    assert (copied / "kept.so").exists() and sorted(p.name for p in (copied / "a").iterdir()) == ["c.py"]
    assert run(pythons, monkeypatch, "3.12") == 1, "asked for by name and not there"


def test_the_oldest_torch_that_is_allowed(
    pythons: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Tests run in a copy pinned to it; if it cannot be installed, this is reported and no test runs."""
    (pythons.ROOT / "Makefile").write_text("venv:\n\t@test ! -e fail\nquick:\n\t@grep tools -B2 constraints.txt\n")
    (pythons.ROOT / "pyproject.toml").write_text('dependencies = [\n  "torch>=2.3",\n  "torchdata>=1",\n]\n')
    (pythons.ROOT / "constraints.txt").write_text("numpy==2.4\ntorch==2.9.0\ntorchdata==2\nsetuptools==84.2.1\n")
    assert run(pythons, monkeypatch, "--oldest-torch") == 0
    out = capfd.readouterr().out
    assert "torch==2.3.*\ntorchdata==2\nsetuptools==81.*\n" in out and "torch 2.3: make quick passed" in out
    (pythons.ROOT / "fail").touch()
    assert run(pythons, monkeypatch, "--oldest-torch") == 1
    out = capfd.readouterr().out
    assert "torch 2.3 could not be installed: is there a wheel of it for Python 3" in out and "make quick" not in out
    assert (pythons.ROOT / "constraints.txt").read_text().startswith("numpy==2.4\ntorch==2.9.0\n")
