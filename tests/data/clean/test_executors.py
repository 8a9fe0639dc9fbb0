"""engine clean on datatrove's executors: the same bytes as in this process, and every failure is reported.

Slurm is tested with substitutes of its commands, and with a real one if `sinfo` finds a node. Ray is tested if it is
installed (it is large, and not in the extra dev).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engine.data.clean import executors
from engine.data.clean import run as clean_module
from engine.data.clean.options import CleanOptions
from engine.errors import DataError
from tests.support.errors import raises
from tests.support.texts import document, jsonl, needs_extra, outputs
from tests.support.verbs import clean

RAY = importlib.util.find_spec("ray") is not None
STAND_INS = {
    "sbatch": """
        for script in "$@"; do :; done
        array=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
        number=$(( $(cat "$SLURM_STAND_IN/number" 2>/dev/null || echo 6) + 1 )); echo $number > "$SLURM_STAND_IN/number"
        if ! grep -q merge_stats "$script"; then
            for i in $(seq 0 "$array"); do SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here bash "$script"; done
        fi > "$SLURM_STAND_IN/log" 2>&1 < /dev/null
        echo "Submitted batch job $number"
    """,
    "srun": 'while [ "${1#-}" != "$1" ]; do if [ "$1" = -n ]; then shift; fi; shift; done; exec "$@"',
    "scontrol": "echo here",
    "squeue": 'cat "$SLURM_STAND_IN/queue" 2>/dev/null || { echo "Invalid job id" >&2; exit 1; }',
}


def real_slurm() -> bool:
    try:
        found = subprocess.run(["sinfo", "-h", "-t", "idle,mixed,allocated"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return bool(found.stdout.strip())


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    draw = random.Random(11)
    texts = [[document(draw, draw.randrange(5, 60)) for _ in range(count)] for count in (30, 1, 12, 40)]
    return [jsonl(tmp_path / "in" / f"{number}.jsonl", [*t, t[0]]) for number, t in enumerate(texts)]


@pytest.fixture(params=["stand-ins", "real"])
def slurm(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options for --executor slurm."""
    scripts = Path(sys.executable).parent  # of launch_pickled_pipeline
    monkeypatch.setenv("PATH", f"{scripts}:{os.environ['PATH']}")
    if request.param == "real":
        if not real_slurm():
            pytest.skip("sinfo finds no Slurm node")
        partition = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True).stdout.split()[0]
        return {"slurm_partition": partition, "slurm_time": "0:05:00"}
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(folder))
    return {"slurm_partition": "p", "slurm_time": "0:05:00"}


def finish(corpus: list[str], output: str, slurm: dict[str, Any], **options: Any) -> Any:
    """Repeat the command until its Slurm jobs have ended."""
    for _ in range(200):
        report = clean(corpus, output, tasks=3, executor="slurm", **slurm, **options)
        if report is not None:
            return report
        time.sleep(0.3)
    raise AssertionError("Slurm took too long")


@needs_extra
@pytest.mark.timeout(300)
def test_local_processes(corpus: list[str], tmp_path: Path) -> None:
    clean(corpus, str(tmp_path / "here.jsonl"))
    clean(corpus, str(tmp_path / "local.jsonl"), tasks=3, executor="local", workers=2)
    assert outputs(tmp_path, "local") == outputs(tmp_path, "here")
    Path(corpus[3]).write_text("{")
    with raises(DataError, "clean.task-failed", "3.jsonl:1: malformed JSON"):
        clean(corpus, str(tmp_path / "o.jsonl"), tasks=2, executor="local", workers=2)


@needs_extra
@pytest.mark.timeout(300)
def test_slurm_jobs(corpus: list[str], slurm: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean(corpus, str(tmp_path / "here.jsonl"))
    monkeypatch.chdir(tmp_path)
    output = "jobs.jsonl"  # relative, as users write it
    assert finish(corpus, output, slurm)["documents_kept"] == 83
    assert outputs(tmp_path, "jobs") == outputs(tmp_path, "here")


@needs_extra
@pytest.mark.timeout(300)
def test_a_failed_slurm_job_is_reported_by_the_next_command(
    corpus: list[str], slurm: dict[str, Any], tmp_path: Path
) -> None:
    Path(corpus[1]).write_text("{")
    output = str(tmp_path / "out.jsonl")
    with raises(DataError, "clean.task-failed", "1.jsonl:1: malformed JSON"):
        finish(corpus, output, slurm)
    kept = {path.name for path in (tmp_path / "out.jsonl.work").glob("part-?????")}
    assert kept and len(kept) < 3
    report = finish(corpus, output, slurm, on_error="skip")
    assert report["dropped"]["input: malformed JSON"] == 1


def test_running_slurm_jobs_are_waited_for(corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without datatrove: the Slurm job is in the queue, has ended, or squeue fails."""
    output, work = str(tmp_path / "out.jsonl"), tmp_path / "out.jsonl.work"
    monkeypatch.setattr(executors, "require_package", lambda *_: pytest.fail("jobs were started a second time"))
    monkeypatch.setattr(clean_module, "_run_tasks", lambda job, *_: clean_module.run_task(job, 0))
    assert clean(corpus, output, tasks=2) is None
    monkeypatch.undo()
    monkeypatch.setattr(executors, "require_package", lambda *_: pytest.fail("jobs were started a second time"))
    (work / "slurm-job").write_text("12 /some/log folder")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    monkeypatch.setenv("PATH", str(bin_folder))

    def command(text: str) -> Any:
        (bin_folder / "squeue").write_text(f"#!/bin/sh\n{text}\n")
        (bin_folder / "squeue").chmod(0o755)
        return clean(corpus, output, tasks=2, executor="slurm", slurm_partition="p")

    assert command("echo '12 p engine R 0:10'") is None
    with raises(DataError, "clean.squeue-failed", 12, "no answer"):
        command("echo no answer >&2; exit 1")
    with raises(DataError, "clean.slurm-tasks-lost", 12, [1], "/some/log folder"):
        command("exit 0")
    assert not (work / "slurm-job").exists() and (work / "part-00000").is_dir()
    (work / "slurm-job").write_text("12 /some/log folder")
    (bin_folder / "squeue").unlink()
    with raises(DataError, "clean.no-squeue", "squeue", 12):
        clean(corpus, output, tasks=2, executor="slurm", slurm_partition="p")


@needs_extra
@pytest.mark.skipif(not RAY, reason="ray is not installed")
@pytest.mark.timeout(300)
def test_ray_workers(corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    clean(corpus, str(tmp_path / "here.jsonl"))
    monkeypatch.chdir(tmp_path)
    try:
        ray.init(num_cpus=2, include_dashboard=False)
        clean(corpus, "ray.jsonl", tasks=3, executor="ray", workers=2)
        assert outputs(tmp_path, "ray") == outputs(tmp_path, "here")
        Path(corpus[3]).write_text("{")
        with raises(DataError, "clean.task-failed", "3.jsonl:1: malformed JSON"):
            clean(corpus, "o.jsonl", tasks=3, executor="ray", workers=2)
        assert not Path("o.jsonl").exists()
    finally:
        ray.shutdown()


@needs_extra
@pytest.mark.parametrize(
    ("executor", "options", "code", "part"),
    [
        ("slurm", {"slurm_partition": "p", "slurm_time": "1:00:00"}, "clean.executor-failed", "sbatch"),
        ("ray", {}, "clean.package-missing", "pip install ray"),
    ],
)
def test_an_executor_that_cannot_start_says_so(
    executor: Any,
    options: dict[str, Any],
    code: str,
    part: str,
    corpus: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ray", None)
    with raises(DataError, code, f"--executor {executor}", part):
        clean(corpus, str(tmp_path / "out.jsonl"), tasks=2, executor=executor, **options)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_task_leaves_its_error(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        raise ValueError("too bad") if rank else DataError("data.torn", "a.jsonl:3: torn")

    task = executors.Task(run, tmp_path, str(Path.cwd()))
    for rank in (0, 1):
        with contextlib.suppress(ValueError, DataError):
            task(None, rank)
    assert (tmp_path / "failed-00001").read_text() == "ValueError: too bad"
    with raises(DataError, "clean.task-failed", "a.jsonl:3: torn (1 "):
        executors._raise_failures(tmp_path)
    executors._raise_failures(tmp_path)  # raised only once
    shutil.rmtree(tmp_path)


def test_options_of_the_executors() -> None:
    def options_of(executor: Any, **how: Any) -> dict[str, Any]:
        return CleanOptions(("a",), "o.jsonl", executor=executor, **how).executor_options()

    assert options_of("slurm", slurm_partition="p") == {"workers": -1, "partition": "p", "time": "24:00:00"}
    assert options_of("local") == {"workers": os.cpu_count()} and options_of("ray", workers=3) == {"workers": 3}
