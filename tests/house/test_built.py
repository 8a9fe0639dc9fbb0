"""Building: a failed extension records the reason and breaks nothing else. Runs setup.py with broken compilers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import engine
from engine.cli import diagnosis
from engine.cli import main as cli
from engine.data.samples import native_index
from engine.ops import native
from engine.util import build_notes
from tests.support.paths import ROOT


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The inputs of setup.py and older builds of the extensions; one file is not C++, the others compile quickly."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "csrc/ops/cpu_only.cpp").write_text("int unfinished(\n")
    for package in ("data", "shared"):
        for file in (tmp_path / "csrc" / package).glob("*.cpp"):
            file.write_text("static int nothing;\n")
    for file in (tmp_path / "csrc/kernels/cpu").glob("*.cpp"):
        file.write_text("static int nothing;\n")
    for kernels in (tmp_path / "csrc").rglob("*.cu"):  # with a CUDA torch and a real nvcc they take minutes to compile
        kernels.write_text("static int nothing;\n")
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/__init__.py").touch()
    for name in ("_ops", "_index", "_shared"):
        (tmp_path / f"engine/{name}{suffix()}").touch()
    return tmp_path


def suffix() -> str:
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def build(tree: Path, **environment: str) -> tuple[dict[str, str], str, list[str]]:
    """Run setup.py; returns (recorded reasons, stderr, built extensions)."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=tree, env=os.environ | environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    there = sorted(p.name.split(".")[0] for p in (tree / "engine").glob("*.so"))
    notes = json.loads((tree / "engine/_build.json").read_text())
    notes.pop("settings")
    return notes, done.stderr, there


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_compiler_error_is_kept(tree: Path) -> None:
    notes, printed, there = build(tree)
    notes.pop("cuda", None)  # a torch with CUDA and no nvcc that fits it
    assert list(notes) == ["engine._ops"] and there == ["_index", "_shared"]
    assert notes["engine._ops"].startswith("csrc/ops/cpu_only.cpp:") and "error:" in notes["engine._ops"]
    assert f"warning: engine._ops was not built: {notes['engine._ops']}" in printed


def test_no_compiler(tree: Path) -> None:
    notes, _, there = build(tree, CC="false", CXX="false")
    notes.pop("cuda", None)  # a torch with CUDA and no nvcc that fits it
    assert sorted(notes) == ["engine._index", "engine._ops", "engine._shared"] and there == []
    # setuptools 81, the newest that torch 2.11 allows, prints the command with its path
    assert all(re.fullmatch(r"(/.*/)?false ended with exit code 1", why) for why in notes.values())


def test_no_torch(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/torch.py").write_text("raise ImportError('no torch here')")
    notes, _, _ = build(tree, PYTHONPATH=str(tmp_path / "hidden"), CC="false", CXX="false")
    assert notes["engine._ops"] == "torch could not be imported when this was installed (no torch here)"


TORCH = """
class version: cuda = "13.0"
__version__ = "2.11.0+cu130"
def compiled_with_cxx11_abi(): return True
"""
NVCC = """#!/bin/sh
[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V" && exit
echo 'csrc/kernels/cuda/model.cu(3): error: this nvcc knows no C++'
exit 2
"""


@pytest.mark.parametrize(
    ("release", "why"),
    [
        (None, r"nvcc not found in .*/cuda/bin"),
        ("12.4", r".*/cuda/bin/nvcc is of CUDA 12, torch is built for 13.0"),
        ("13.1", r"csrc/kernels/cuda/model.cu\(3\): error: this nvcc knows no C\+\+"),
    ],
)
def test_without_cuda_kernels_the_reason_is_printed(tree: Path, release: str | None, why: str) -> None:
    """A stub of a CUDA torch with only the names that setup.py uses, and an nvcc that does not fit."""
    for name in ("hidden", "cuda/bin", "cuda/lib64"):
        (tree / name).mkdir(parents=True)
    (tree / "hidden/torch.py").write_text(TORCH)
    (tree / "cuda/lib64/libcudart.so").touch()
    if release:
        (tree / "cuda/bin/nvcc").write_text(NVCC.format(release=release))
        (tree / "cuda/bin/nvcc").chmod(0o755)
    path = {"PYTHONPATH": str(tree / "hidden"), "CUDA_HOME": str(tree / "cuda")}
    notes, printed, _ = build(tree, **path, CC="false", CXX="false")
    assert re.fullmatch(why, notes["cuda"]) and f"warning: cuda was not built: {notes['cuda']}" in printed
    assert "engine._ops" in notes  # it was also tried without CUDA


def test_doctor_and_warnings_name_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = tmp_path / "_build.json"
    notes.write_text(json.dumps({"engine._ops": "csrc/ops/cpu_only.cpp:1: error: no", "engine._index": "no compiler"}))
    monkeypatch.setattr(build_notes, "_NOTES", notes)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "engine._index", None)
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    reported = [finding.text for finding in diagnosis._extensions()]
    assert reported[0].startswith("engine._index is not built (no compiler); build it: pip install")
    assert reported[-1].startswith(
        "engine._ops is not built (csrc/ops/cpu_only.cpp:1: error: no); build it: pip install"
    )
    assert native_index.load()[0] is None
    monkeypatch.setattr(native, "_library", native._library.__wrapped__)
    printed = "not built .csrc/ops/cpu_only.cpp:1: error: no.: torch's operators run instead"
    with pytest.warns(UserWarning, match=printed):
        assert native._library() is None


class Gpu:
    """The attributes of a GPU tensor that the choice of kernels reads."""

    device, dtype = torch.device("cuda", 0), torch.float32


def test_a_gpu_without_kernels_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extension without CUDA kernels, then one for other GPUs, then one for this GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cases = {
        "": r"without CUDA kernels \(nvcc not found in PATH\)",
        "8.0": "for compute capability 8.0, this GPU has 9.0",
    }
    monkeypatch.setattr(native, "why_not_built", lambda name: "nvcc not found in PATH")
    for built_for, printed in (cases | {"8.0 9.0+PTX": ""}).items():
        library = SimpleNamespace(cuda_capabilities=lambda words=built_for: words)
        monkeypatch.setattr(native, "load", lambda library=library: (library, "engine._ops"))
        native.why_no_cuda.cache_clear()
        native._cuda_library.cache_clear()
        if printed:
            with pytest.warns(UserWarning, match=printed):
                assert native.kernels(Gpu()) is None
        assert native.kernels(Gpu()) is (None if printed else library)  # and no second warning
        assert native.kernels(Gpu(), torch.ones(1)) is None
    native.why_no_cuda.cache_clear()
    native._cuda_library.cache_clear()


@pytest.mark.parametrize("text", ["", "[]", '{"engine._ops": 3}', "{", '{"other": "x"}'])
def test_malformed_build_notes_are_ignored(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_notes, "_NOTES", tmp_path / "_build.json")
    assert build_notes.why_not_built("engine._ops") == ""
    (tmp_path / "_build.json").write_text(text)
    assert build_notes.why_not_built("engine._ops") == ""


@pytest.mark.parametrize(
    ("capability", "words", "runs"),
    [
        ((9, 0), "8.0 9.0+PTX", True),
        ((8, 6), "8.0;9.0", True),
        ((12, 0), "8.0 9.0+PTX", True),
        ((12, 0), "8.0 9.0", False),
        ((7, 5), "8.0 9.0+PTX", False),
        ((8, 0), "8.6", False),
        ((9, 0), "9.0a", True),
    ],
)
def test_which_gpus_the_kernels_run_on(capability: tuple[int, int], words: str, runs: bool) -> None:
    assert native.runs_on(capability, words) is runs


def test_the_source_distribution_is_whole(tmp_path: Path) -> None:
    """It contains all files that git tracks, csrc included, even if torch cannot be imported (as in pip's builds)."""
    known = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    if known.returncode:
        pytest.skip("not a git checkout: the files of the repository are not known")
    for name in (names := {name for name in known.stdout.split("\0") if name and (ROOT / name).exists()}):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).touch()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "engine/__init__.py"):
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    for junk in (
        "engine/_ops.so",
        "engine/_build.json",
        "tests/__pycache__/a.pyc",
        "build/lib/a.py",
        "demo/run/a.json",
    ):
        (tmp_path / "tree" / junk).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / junk).touch()
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/torch.py").write_text("raise ImportError('no torch here')")
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path / "dist")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "hidden")}
    done = subprocess.run(
        command, cwd=tmp_path / "tree", env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        inside = {member.name.partition("/")[2] for member in packed if member.isfile()}
    made = {name for name in inside if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert inside - made == names


def test_the_command_that_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a source tree, and for a package that pip installed from a folder, an archive, a repository or a wheel."""
    assert build_notes.how_to_build() == f"build it: pip install --no-build-isolation --no-deps -e {ROOT}".replace(
        str(ROOT), "." if Path.cwd() == ROOT else str(ROOT)
    )
    (tmp_path / "engine").mkdir()
    monkeypatch.setattr(build_notes, "_HERE", tmp_path / "engine")
    commit = {"vcs": "git", "commit_id": "abc"}
    cases: list[tuple[dict[str, object] | None, str]] = [
        ({"url": "file:///a%20b/trident", "dir_info": {}}, "--force-reinstall '/a b/trident'"),
        ({"url": "file:///a/trident-0.1.tar.gz"}, "--force-reinstall /a/trident-0.1.tar.gz"),
        ({"url": "https://x/y.git", "vcs_info": commit}, "--force-reinstall git+https://x/y.git@abc"),
        ({"url": "file:///a/trident-0.1-cp311.whl"}, "SOURCE (a folder or .tar.gz with this version's sources)"),
        (None, "SOURCE (a folder or .tar.gz with this version's sources)"),
    ]
    for record, end in cases:
        text = None if record is None else json.dumps(record)
        stand_in = SimpleNamespace(read_text=lambda name, text=text: text)
        monkeypatch.setattr(build_notes.importlib.metadata, "distribution", lambda name, found=stand_in: found)
        reported = build_notes.how_to_build()
        assert reported.startswith(
            "build it: pip install setuptools wheel pybind11 && pip install --no-build-isolation"
        )
        assert reported.endswith(end), reported


def test_version_and_help_name_what_is_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "_build.json"
    notes.write_text(json.dumps({"engine._ops": "torch could not be imported"}))
    monkeypatch.setattr(build_notes, "_NOTES", notes)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        build_notes.importlib.util, "find_spec", lambda name: None if name == "engine._ops" else found("engine")
    )
    printed = "not built: engine._ops (torch could not be imported): the fallbacks are slower; build it: pip install"
    for args in (["--version"], ["-V"], ["--help"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(args)
        out, err = capsys.readouterr()
        assert ended.value.code == 0 and printed in out + err
        assert args[0] == "--help" or out == f"engine {engine.__version__}\n"
    monkeypatch.setattr(build_notes.importlib.util, "find_spec", lambda name: found("engine"))
    assert build_notes.missing_extensions() == ""
