"""A really full disk, a file size limit, missing permission: the message, and that the work resumes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.data.tokenize.recipe import Recipe
from engine.data.tokenize.tokenizer import Tokenizer
from tests.support.texts import VOCABULARY
from tests.support.verbs import train_tokenizer

# Every call is a separate process. Small shards, so that a stopped run has finished some.
PREPARE = """
import sys
from pathlib import Path
from engine import errors
from engine.data.prepare import flow
from engine.data.prepare.options import PrepareOptions
from engine.data.prepare.run import prepare
from engine.data.read import document_source
flow.SHARD_BYTES = document_source._BATCH_BYTES = document_source._BLOCK_BYTES = 1 << 16
try:
    prepare(PrepareOptions((sys.argv[1],), sys.argv[2], Path(sys.argv[3])), note=print)
except errors.DataError as err:
    sys.exit(f"error: {err}")
"""
CLEAN = """
import sys
from engine import errors
from engine.data.clean.options import CleanOptions
from engine.data.clean.run import clean
try:
    clean(CleanOptions((sys.argv[1],), sys.argv[2] + ".jsonl", tasks=4))
except errors.DataError as err:
    sys.exit(f"error: {err}")
"""
SIZES_KB = (64, 300, 700, 1100, 1600, 2200, 3500, 8000)


def may_mount() -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with in/ (2 MB in four files) and a tokenizer."""
    folder, draw = tmp_path_factory.mktemp("given"), random.Random(2)
    (folder / "in").mkdir()
    for number in range(4):
        texts = [" ".join(draw.choices(VOCABULARY, k=draw.randrange(5, 200))) for _ in range(1200)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "in" / f"{number}.jsonl").write_text(lines)
    train_tokenizer([str(folder / "in")], folder / "tok", Recipe(400), max_bytes=200_000)
    assert Tokenizer.load(folder / "tok").vocab_size <= 400
    return folder


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the data files, which have to be equal; not of the report, which contains times."""
    names = ("out-train.bin", "out-train.idx", "out-train.json", "out.jsonl", "out-dropped.jsonl")
    files = [folder / name for name in names if (folder / name).exists()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.skipif(sys.platform != "linux" or not may_mount(), reason="needs the right to mount a tmpfs (unshare -m)")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "program", [pytest.param(PREPARE, id="prepare", marks=pytest.mark.heavy), pytest.param(CLEAN, id="clean")]
)
def test_a_full_disk_ends_with_a_message_and_resumes_with_more_space(program: str, given: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "disk").mkdir()
    call = [sys.executable, "-c", program, str(given / "in")]
    done = subprocess.run([*call, str(tmp_path / "whole" / "out"), str(given / "tok")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # In a separate mount namespace, which disappears with its disk; outputs are copied out at the end.
    script = f"""
        cd {tmp_path}; mount -t tmpfs -o size={SIZES_KB[0]}k none disk
        for size in {" ".join(map(str, SIZES_KB))}; do
            mount -o remount,size=${{size}}k disk
            "$@" {tmp_path}/disk/out {given}/tok > log.$size 2>&1 && break
            (ls disk; find disk -name '*.tmp') > names.$size
        done
        cp -r disk result
    """
    done = subprocess.run(["unshare", "-m", "bash", "-c", script, "-", *call], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logs = [(tmp_path / f"log.{size}").read_text() for size in SIZES_KB if (tmp_path / f"log.{size}").exists()]
    assert len(logs) > 4, "the disk was never full"
    for text in logs[:-1]:
        assert "error: " in text and "/disk/out" in text, text
        assert " more bytes are needed, " in text and " are free. Free space. Give the same command again" in text
    for size in SIZES_KB[: len(logs) - 1]:
        names = (tmp_path / f"names.{size}").read_text().split()
        assert set(names) <= {"out.parts", "out.jsonl.work"}  # no half-written file has a final name or is left
    assert digests(tmp_path / "result") == digests(tmp_path / "whole") != {}
    if program is PREPARE:
        assert any("documents in " in text and " shards are done" in text for text in logs)  # not from the start


@pytest.mark.parametrize("program", [PREPARE, CLEAN], ids=["prepare", "clean"])
def test_a_limit_on_file_sizes(program: str, given: Path, tmp_path: Path) -> None:
    call = [sys.executable, "-c", program, str(given / "in"), str(tmp_path / "out"), str(given / "tok")]
    done = subprocess.run(["bash", "-c", 'ulimit -f 100; "$@"', "-", *call], capture_output=True, text=True)
    assert done.returncode == 1 and "the limit on the size of a file is reached (ulimit -f)" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and str(tmp_path / "out") in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"out.parts", "out.jsonl.work"}
    assert subprocess.run(call, capture_output=True).returncode == 0


@pytest.mark.parametrize("program", [PREPARE, CLEAN], ids=["prepare", "clean"])
def test_a_folder_without_permission(program: str, given: Path, for_all: Path) -> None:
    locked = for_all / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    shutil.copytree(given, for_all / "given")
    (for_all / "given").chmod(0o755)
    call = [sys.executable, "-c", program, *map(str, (for_all / "given/in", locked / "sub/out", for_all / "given/tok"))]
    if os.geteuid() == 0:  # root ignores permissions: run as an unprivileged user
        if subprocess.run(["setpriv", "--version"], capture_output=True).returncode:
            pytest.skip("runs as root, and there is no setpriv")
        call = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *call]
        if subprocess.run(
            [*call[:4], sys.executable, "-c", "import engine.data.clean.run"], capture_output=True
        ).returncode:
            pytest.skip("the user nobody cannot read this checkout")
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 1 and "cannot be written: Permission denied. Choose another" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and f"{locked}/sub" in done.stderr
