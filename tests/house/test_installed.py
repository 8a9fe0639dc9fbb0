"""A wheel as pip builds it in isolation, without torch, installed and used outside the tree."""

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
# An editable install beside the tests finds in the tree the submodules that the installed package lacks.
NO_EDITABLE = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
"""


@pytest.mark.heavy
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_wheel_built_without_torch_works_anywhere_and_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/torch.py").write_text("raise ImportError('no torch here')")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / "tree").mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree")
    shutil.copytree(ROOT / "csrc", tmp_path / "tree/csrc")
    shutil.copytree(
        ROOT / "engine", tmp_path / "tree/engine", ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    )

    def run(*command: str, path: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path / path), "OMP_NUM_THREADS": "1"}
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=tmp_path / "elsewhere",
            env=environment,
            capture_output=True,
            encoding="utf-8",
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    pip = ("pip", "-q", "--disable-pip-version-check")
    options = ("--no-build-isolation", "--no-deps", "--no-index")
    run(*pip, "wheel", *options, "-w", str(tmp_path / "dist"), str(tmp_path / "tree"), path="hidden")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(wheel), path="hidden")
    (tmp_path / "site/sitecustomize.py").write_text(NO_EDITABLE)
    assert {p.name.split(".")[0] for p in (tmp_path / "site/engine").glob("*.so")} == {"_index", "_shared"}
    said = "not built: engine._ops (torch could not be imported when this was installed (no torch here))"
    assert said in run("engine", "--version", path="site") and said in run("engine", "--help", path="site")
    assert re.search(r"engine\._ops is not built .*--force-reinstall", run("engine", "doctor", path="site"))
    prepare = f"prepare --input {ROOT / 'docs'} --include *.md --tokenizer tok --train-vocab-size 512 --output c"
    run("engine", *prepare.split(), "--valid-fraction", "0.2", path="site")
    told = run("engine", *TRAIN.split(), "--train.seq-len", "32", "--run.dir", "run", path="site")
    assert "torch's own operators run instead" in told and "--force-reinstall" in told
    assert (tmp_path / "elsewhere/run/metrics.jsonl").read_text(encoding="utf-8").count('"loss"') == 3
