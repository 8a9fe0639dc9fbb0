"""Wheels installed and used outside the source tree: built by pip in isolation, without torch, and by `build`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

TRAIN = "train --model.preset micro --data.train c-train --data.valid c-valid --data.tokenizer tok --train.steps 3"
# An editable install in the tests' environment would find submodules that the installed package lacks.
NO_EDITABLE = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
"""


class Installed:
    """A package built and installed outside the source tree, and used from a separate folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.site = folder / "site"
        for name in ("hidden", "elsewhere"):
            (folder / name).mkdir()
        (folder / "hidden/torch.py").write_text("raise ImportError('no torch here')")

    def run(self, *command: str, path: str = "") -> str:
        """Output of `python -m COMMAND` with this folder's `path` in PYTHONPATH; it must succeed."""
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.folder / "elsewhere",
            env=os.environ | {"PYTHONPATH": str(self.folder / path) if path else "", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            encoding="utf-8",
            timeout=1200,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def pip(self, *command: str) -> None:
        self.run("pip", "-q", "--disable-pip-version-check", *command, "--no-deps", "--no-index", path="hidden")

    def install(self) -> None:
        """Install the only wheel of `dist` to `site`."""
        (wheel,) = (self.folder / "dist").glob("*.whl")
        self.pip("install", "--target", str(self.site), str(wheel))
        (self.site / "sitecustomize.py").write_text(NO_EDITABLE)

    def extensions(self) -> set[str]:
        return {p.name.split(".")[0] for p in (self.site / "engine").glob("*.so")}

    def prepare_and_train(self) -> str:
        """Output of a short training on the docs, run with this package only."""
        prepare = f"prepare --input {ROOT / 'docs'} --include *.md --tokenizer tok --train-vocab-size 512 --output c"
        self.run("engine", *prepare.split(), "--valid-fraction", "0.2", path="site")
        printed = self.run("engine", *TRAIN.split(), "--train.seq-len", "32", "--run.dir", "run", path="site")
        assert (self.folder / "elsewhere/run/metrics.jsonl").read_text(encoding="utf-8").count('"loss"') == 3
        return printed


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_wheel_built_without_torch_works_anywhere_and_says_what_it_lacks(tmp_path: Path) -> None:
    installed = Installed(tmp_path)
    (tmp_path / "tree").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "tree")
    shutil.copytree(ROOT / "csrc", tmp_path / "tree/csrc")
    shutil.copytree(
        ROOT / "engine", tmp_path / "tree/engine", ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    )
    installed.pip("wheel", "--no-build-isolation", "-w", str(tmp_path / "dist"), str(tmp_path / "tree"))
    installed.install()
    assert installed.extensions() == {"_index", "_shared"}
    expected = "not built: engine._ops (torch could not be imported when this was installed (no torch here))"
    for option in ("--version", "--help"):
        assert expected in installed.run("engine", option, path="site")
    assert re.search(r"engine\._ops is not built .*--force-reinstall", installed.run("engine", "doctor", path="site"))
    printed = installed.prepare_and_train()
    assert "torch's operators run instead" in printed and "--force-reinstall" in printed


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_wheel_of_the_source_distribution_has_everything_and_works_anywhere(tmp_path: Path) -> None:
    """`python -m build` builds the wheel from the sdist, so the sdist is complete; then all extensions work."""
    pytest.importorskip("build")
    known = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    if known.returncode:
        pytest.skip("not a git checkout: the files of the repository are not known")
    names = [name for name in known.stdout.split("\0") if name and (ROOT / name).is_file()]
    for name in names:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    installed = Installed(tmp_path)
    installed.run("build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(tmp_path / "tree"))
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    shutil.rmtree(tmp_path / "tree")
    installed.install()
    there = {str(p.relative_to(installed.site)) for p in (installed.site / "engine").rglob("*") if p.is_file()}
    assert {name for name in names if name.startswith("engine/")} <= there
    assert installed.extensions() == {"_index", "_ops", "_shared"}
    doctor = installed.run("engine", "doctor", path="site")
    assert doctor.endswith("nothing is broken\n") and "is not built" not in doctor
    assert "warning" not in installed.prepare_and_train()
