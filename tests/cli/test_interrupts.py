"""Signals that end data commands: one line on how to resume, exit code 128 + n, and finished work is kept."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.data.tokenize.tokenizer import Tokenizer
from engine.errors import DataError
from engine.util.prefetch import map_ahead, read_ahead
from engine.util.signals import Stopped
from tests.support.errors import raises
from tests.support.texts import document, jsonl, needs_extra
from tests.support.verbs import prepare

BUSY = """
import hashlib, signal, sys, time
from engine.util import signals
signals._GRACE_S = 0.5
def native(): hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**8)  # minutes without a look at signals
def count():
    for i in range(200): time.sleep(0.01); stop.check() if i % 20 == 19 else None
def wait(where):
    with where: count()
    print("not reached")
def pause(seconds=60): print("ready", flush=True); time.sleep(seconds)
if sys.argv[1] == "ignored": signal.signal(signal.SIGHUP, signal.SIG_IGN)
with signals.interruptible("do it again") as stop:
    print("ready", flush=True)
    if sys.argv[1] == "python": time.sleep(60)
    if sys.argv[1] == "ignored": time.sleep(0.2)
    if sys.argv[1] == "panic":
        try: time.sleep(60)
        except signals.Stopped: raise type("PanicException", (BaseException,), {})  # as pyo3's
    if sys.argv[1] == "native": native()
    if sys.argv[1] == "import": sys.path.insert(0, sys.argv[2]); import slow
    if sys.argv[1] == "import": pause()
    if sys.argv[1] == "deferred": wait(stop.deferred())
    if sys.argv[1] == "sealing":
        with stop.deferred(), stop.committing(): time.sleep(0.9); print("sealed", flush=True)
    if sys.argv[1] == "hung":
        with stop.deferred(), stop.committing(): native()
"""
SMALL = """
import sys
from engine.cli.main import main
from engine.data.read import recognise
from engine.data.read import document_source
document_source._BATCH_BYTES = document_source._BLOCK_BYTES = recognise._BLOCK_BYTES = 1 << 16
main(sys.argv[1:])
"""
LINE = "interrupted ({}): do it again\n"


def start(command: list[str], **pipes: int) -> subprocess.Popen[str]:
    kinds = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **pipes}
    return subprocess.Popen([sys.executable, *command], text=True, start_new_session=True, **kinds)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("doing", "sent", "code", "output", "least_s"),
    [
        ("python", ["SIGINT"], 130, "", 0),
        ("python", ["SIGTERM"], 143, "", 0),
        ("python", ["SIGHUP"], 129, "", 0),
        ("ignored", ["SIGHUP"], 0, "", 0),  # as nohup has it
        ("panic", ["SIGINT"], 130, "", 0),
        ("native", ["SIGTERM"], 143, "", 0.4),
        ("native", ["SIGINT", "SIGTERM"], 143, "", 0),  # a second one ends at once
        ("deferred", ["SIGINT"], 130, "", 0),
        ("sealing", ["SIGTERM"], 143, "sealed\n", 0.7),  # longer than the grace
        ("hung", ["SIGTERM", "SIGINT"], 130, "", 0),
    ],
)
def test_a_signal_ends_it(doing: str, sent: list[str], code: int, output: str, least_s: float) -> None:
    process = start(["-c", BUSY, doing])
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.1)  # it is at work
    began = time.monotonic()
    for name in sent:
        process.send_signal(getattr(signal, name))
        time.sleep(0.05)
    out, errors = process.communicate(timeout=20)
    assert (process.returncode, out, errors) == (code, output, LINE.format(sent[0]) if code else "")
    assert time.monotonic() - began >= least_s


@pytest.mark.parametrize(
    ("program", "code", "line"),
    [
        ("engine/__main__.py inspect", 143, "nothing is written"),
        ("engine/__main__.py doctor", -15, ""),
        ("tools/preprocess_data.py --input a --tokenizer-model a --output-prefix a", 143, "nothing is written"),
    ],
)
def test_a_signal_that_came_while_modules_were_loaded(program: str, code: int, line: str) -> None:
    """It is handled when a handler is installed, or has its default effect."""
    early = (
        "import os, runpy, sys, engine.util.signals, signal as s; block = s.pthread_sigmask\n"
        "s.pthread_sigmask = lambda *a: (block(*a), a[0] == s.SIG_BLOCK and os.kill(os.getpid(), 15))\n"
        f"sys.argv = {program.split()}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    process = start(["-c", early])
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code and line in errors and errors.count("\n") == bool(line), errors


def test_a_worker_that_imports_the_command_hears_signals() -> None:
    """Like the workers of multiprocessing in an installed `engine`: a worker that blocks SIGTERM would never end."""
    asked = "import signal, engine.__main__; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    assert start(["-c", asked]).communicate(timeout=20) == ("set()\n", "")


def test_an_import_is_finished_before_the_end(tmp_path: Path) -> None:
    """Native modules such as orjson crash if an exception interrupts their initialisation."""
    (tmp_path / "slow.py").write_text("import os, time\nos.kill(os.getpid(), 15)\ntime.sleep(0.1)\nprint('imported')")
    out, errors = (process := start(["-c", BUSY, "import", str(tmp_path)])).communicate(timeout=20)
    assert (process.returncode, errors) == (143, LINE.format("SIGTERM"))
    assert out.startswith("ready\nimported\n")


def test_what_waits_for_items_is_stopped_and_waits_for_nothing_more() -> None:
    release, calls = threading.Event(), 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise Stopped

    def slow(source: list[int]) -> Iterator[int]:
        release.wait(60)
        yield from source

    began = time.monotonic()
    with pytest.raises(Stopped):
        next(read_ahead(slow([1]), 1, check))
    calls = 0
    with pytest.raises(Stopped):
        next(map_ahead(lambda item: release.wait(60), iter([1, 2, 3]), 1, check))
    assert time.monotonic() - began < 10
    release.set()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(iter([document(random.Random(1), 500)]), 400).save(folder)
    return folder


def lines(folder: Path, texts: list[str]) -> bytes:
    return Path(jsonl(folder / "in.jsonl", texts)).read_bytes()


def fed(command: list[str], data: bytes, grown: Path) -> subprocess.Popen[str]:
    """Start with `data` on standard input, which stays open; return when the file `grown` has content."""
    read_end, write_end = os.pipe()
    process = start(["-c", SMALL, *command], stdin=read_end)
    os.close(read_end)

    def feed() -> None:
        with open(os.dup(write_end), "wb") as pipe:
            pipe.write(data)

    threading.Thread(target=feed, daemon=True).start()
    ends_at = time.monotonic() + 60
    while not (grown.exists() and grown.stat().st_size):
        assert process.poll() is None and time.monotonic() < ends_at, (process.kill(), process.communicate())
        time.sleep(0.02)
    return process


def test_prepare_seals_what_it_has_and_goes_on_to_the_same_bytes(tokenizer: Path, tmp_path: Path) -> None:
    """Signal while the command waits for a pipe that has no more data."""
    draw = random.Random(2)
    data = lines(tmp_path, [document(draw, 200) for _ in range(400)])
    assert len(data) > 300_000
    command = ["prepare", "--input", "-", "--tokenizer", str(tokenizer), "--output", str(tmp_path / "o")]
    process = fed(command, data[:200_000], tmp_path / "o.parts" / "train.bin")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 143, errors
    assert "documents are kept in" in errors and "with the same input" in errors and errors.count("\n") == 1
    assert (tmp_path / "o.parts" / "00000001.json").exists()
    done = subprocess.run([sys.executable, "-m", "engine", *command], input=data, capture_output=True, timeout=60)
    assert done.returncode == 0 and b"resuming " in done.stdout, done.stderr
    prepare([tmp_path / "in.jsonl"], str(tmp_path / "whole"), tokenizer=tokenizer)
    for name in ("bin", "idx"):
        assert (tmp_path / f"o-train.{name}").read_bytes() == (tmp_path / f"whole-train.{name}").read_bytes()


def test_nothing_is_left_where_nothing_is_kept(tokenizer: Path, tmp_path: Path) -> None:
    command = ["prepare", "--input", "-", "--tokenizer", str(tokenizer), "--output", str(tmp_path / "o")]
    process = fed(command, b'{"text": "a"}\n', tmp_path / "o.parts" / "settings.json")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and "nothing is" in errors and errors.count("\n") == 1, errors
    assert list(tmp_path.iterdir()) == []


def test_an_error_before_shards_are_looked_at_does_not_lose_them(tokenizer: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text('{"text": "a b c"}\n{"text": 1, "other": "longer than a block"}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.data.prepare.flow.SHARD_S", 0.0)
        patch.setattr("engine.data.read.document_source._BATCH_DOCUMENTS", 1)
        patch.setattr("engine.data.read.document_source._BLOCK_BYTES", 16)
        with raises(DataError, "read.document-refused", "wrong type"):
            prepare([text], str(tmp_path / "o"), tokenizer=tokenizer)
    shard, lengths = tmp_path / "o.parts" / "00000001.json", tmp_path / "o.parts" / "train.lengths"
    assert shard.exists()
    lengths.rename(tmp_path / "away")
    lengths.mkdir()
    with pytest.raises(DataError):
        prepare([text], str(tmp_path / "o"), tokenizer=tokenizer)
    assert shard.exists()


def test_clean_keeps_its_finished_parts(tmp_path: Path) -> None:
    draw = random.Random(3)
    sizes = enumerate((200, 200, 2000))
    names = [jsonl(tmp_path / f"{i}.jsonl", [document(draw, 60) for _ in range(size)]) for i, size in sizes]
    process = start(["-m", "engine", "clean", "--input", *names, "--output", f"{tmp_path}/o.jsonl", "--tasks", "12"])
    work = tmp_path / "o.jsonl.work"
    while not list(work.glob("part-00002.*.tmp/kept.jsonl.zst")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 129, errors
    assert errors.startswith(f"interrupted (SIGHUP): 2 of 12 parts are kept in {work}; give the same command"), errors
    assert errors.count("\n") == 1 and not list(work.glob("*.tmp"))


@needs_extra
@pytest.mark.heavy
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("group", [False, True])
def test_workers_end_with_clean(name: str, group: bool, tmp_path: Path) -> None:
    """Workers end silently, whether the signal reaches them or not."""
    draw = random.Random(4)
    names = [jsonl(tmp_path / f"{i}.jsonl", [document(draw, 60) for _ in range(8000)]) for i in range(3)]
    command = ["clean", "--input", *names, "--output", str(tmp_path / "o.jsonl"), "--tasks", "3"]
    process = start(["-m", "engine", *command, "--executor", "local", "--workers", "2"], stdout=subprocess.DEVNULL)
    while len(list((tmp_path / "o.jsonl.work").glob("part-*.tmp"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    (os.killpg if group else os.kill)(process.pid, getattr(signal, name))
    _, errors = process.communicate(timeout=20)  # the end of the pipe: every process has ended
    assert process.returncode == 128 + getattr(signal, name), errors
    assert "Traceback" not in errors and "Warning" not in errors and errors.count("interrupted") == 1, errors
