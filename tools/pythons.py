"""Run the tests in other environments: each installed Python from 3.11 on (`make test-pythons`), or the oldest torch
that pyproject.toml allows (`make test-torch`).

For each, the working tree is copied to build/, and `make test` runs there in a separate environment with the pins of
constraints.txt (for the old torch: without torch's pin, lint and types). The interpreters found are printed first, the
results last. Interpreters are searched as pythonX.Y in PATH, and in the folders of pyenv and uv.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.11", "3.12", "3.13", "3.14")  # for which there are wheels of torch
OLD_SETUPTOOLS = "81"  # the newest that torch 2.11 allows
FOLDERS = (".pyenv/versions/{}.*/bin", ".local/share/uv/python/cpython-{}.*/bin")


def find(version: str) -> Path | None:
    """The interpreter of a version: the first in PATH that runs, else the newest below a manager's folder."""
    found = [Path(where)] if (where := shutil.which(f"python{version}")) else []
    for pattern in FOLDERS:
        folders = sorted(Path.home().glob(pattern.format(version)), key=lambda p: [int(x) for x in _digits(p)])
        found += [folder / f"python{version}" for folder in reversed(folders)]
    wanted = f"import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != {version!r})"
    for path in found:  # a version manager's shim in PATH may fail, and Debian's python3 may lack venv
        if path.exists() and not subprocess.run([path, "-c", wanted], capture_output=True, check=False).returncode:
            return path
    return None


def _digits(folder: Path) -> list[str]:
    return "".join(c if c.isdigit() else " " for c in folder.parent.name).split()[:3]


def _listed(folder: Path, *options: str) -> list[str]:
    done = subprocess.run(
        ["git", "ls-files", "-z", *options], cwd=folder, capture_output=True, encoding="utf-8", check=True
    )
    return [name for name in done.stdout.split("\0") if name]


def copy(target: Path) -> None:
    """Copy the files of the working tree that git tracks or does not ignore to a new repository in `target`."""
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["git", "init", "-q"], cwd=target, check=True)
    for old in _listed(target, "--cached"):  # build outputs stay
        (target / old).unlink(missing_ok=True)
    for name in _listed(ROOT, "--cached", "--others", "--exclude-standard"):
        if (ROOT / name).is_file():  # it may be deleted and not yet committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    me = ["-c", "user.name=test-pythons", "-c", "user.email=test-pythons@localhost"]
    for command in (["add", "-A"], [*me, "commit", "-q", "--allow-empty", "-m", "a copy"]):
        subprocess.run(["git", *command], cwd=target, check=True)


def attempt(title: str, target: str, folder: Path, python: Path | str) -> tuple[bool, str]:
    """Run `make TARGET` in a copy with this interpreter; returns (passed, summary line)."""
    begin = time.monotonic()
    print(f"\n== {title}: make {target} in {folder}", flush=True)
    command = ["make", target, f"PYTHON={python}", f"PIP_ARGS={os.environ.get('PIP_ARGS', '')}"]
    code = subprocess.run(command, cwd=folder, check=False).returncode
    summary = "passed" if code == 0 else f"FAILED (make ended with exit code {code})"
    return code == 0, f"{title}: make {target} {summary} in {(time.monotonic() - begin) / 60:.1f} min"


def oldest_torch(build: Path) -> int:
    """The quick suite in a copy with the first release of torch that pyproject.toml allows."""
    found = re.search(r'"torch>=(\d+\.\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert found, "pyproject.toml asks for no torch"
    title, folder = f"torch {found[1]}", build / f"torch-{found[1]}"
    copy(folder)
    pins = folder / "constraints.txt"
    text = pins.read_text(encoding="utf-8")
    for package, version in {"torch": found[1], "setuptools": OLD_SETUPTOOLS}.items():
        text = re.sub(rf"^{package}==.*$", f"{package}=={version}.*", text, flags=re.M)
    pins.write_text(text, encoding="utf-8")
    passed, summary = attempt(title, "venv", folder, sys.executable)
    if passed:
        passed, summary = attempt(title, "quick", folder, sys.executable)
    else:
        python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        summary += f"\n{title} could not be installed: is there a wheel of it for {python} where pip looks? (PIP_ARGS)"
    print("", summary, sep="\n")
    return int(not passed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join(VERSIONS)}; by default all")
    parser.add_argument(
        "--target", default="test", help="make target in each copy: test (default), demo, test-all, ..."
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build", help="folder of the copies (default: build)")
    parser.add_argument(
        "--oldest-torch",
        action="store_true",
        help="use this Python with the oldest supported torch instead of other Pythons",
    )
    options = parser.parse_args()
    if options.oldest_torch:
        return oldest_torch(options.folder)
    if unknown := set(options.versions) - set(VERSIONS):
        parser.error(f"{', '.join(sorted(unknown))}: only {', '.join(VERSIONS)} are known")
    wanted = options.versions or list(VERSIONS)
    found = {version: find(version) for version in wanted}
    for version, path in found.items():
        print(f"Python {version}: {path or 'not found'}", flush=True)
    results, failed = [], not any(found.values())
    for version, path in found.items():
        if path is None:
            results.append(f"Python {version}: not tested, because it is not installed")
            failed = failed or bool(options.versions)  # it was asked for by name
            continue
        target = options.folder / "pythons" / version
        copy(target)
        passed, summary = attempt(f"Python {version}", options.target, target, path)
        failed = failed or not passed
        results.append(summary)
    print("", *results, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
