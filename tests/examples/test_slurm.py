"""examples/pretrain_7b.slurm on a temporary Slurm cluster whose two nodes are both this machine."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.examples import PORT, ROOT, SLURM, environment, losses

SLURM_CONF = """
ClusterName=engine
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthInfo=socket={folder}/munge.socket,cred_expire=20
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
ReturnToService=2
KillWait=30
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs=1 RealMemory=500
PartitionName=all Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Slurm cluster with separate daemons and two nodes on this machine; yields the environment of its commands."""
    daemons = ("munged", "slurmctld", "slurmd")
    paths = os.environ["PATH"] + ":/usr/sbin:/sbin"
    if absent := [name for name in (*daemons, "sbatch") if shutil.which(name, path=paths) is None]:
        pytest.skip(f"no Slurm here: {', '.join(absent)} is missing (Debian: slurm-wlm, munge)")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs as root only")
    port = 30000 + os.getpid() % 5000
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a short path for the socket, readable by other users
    folder.chmod(0o755)
    for name in ("state", "spool-node1", "spool-node2"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    values = {"host": socket.gethostname().split(".")[0], "folder": folder, "user": "root"}
    values |= {"port": port, "first": port + 1, "second": port + 2}
    (folder / "slurm.conf").write_text(SLURM_CONF.format(**values))
    (folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
    environ = environment(SLURM_CONF=str(folder / "slurm.conf"))
    environ["PATH"] += ":/usr/sbin:/sbin"
    commands = [["munged", "--foreground", "--force"], ["slurmctld", "-D"]]
    commands[0] += [f"--{kind}={folder}/munge.{kind.removesuffix('-file')}" for kind in ("socket", "key-file")]
    commands[0] += [f"--{kind}-file={folder}/munged.{kind}" for kind in ("pid", "log", "seed")]
    commands += [["slurmd", "-D", "-N", f"node{number}"] for number in (1, 2)]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with (folder / f"{command[0]}{len(running)}.out").open("wb") as log:
                running.append(subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT))
            time.sleep(1)
        deadline = time.monotonic() + 60
        while slurm(environ, "sinfo", "-h", "-o", "%D %t") != "2 idle":
            output = "\n".join(path.read_text(errors="replace")[-1500:] for path in folder.glob("*.out"))
            assert time.monotonic() < deadline and all(p.poll() is None for p in running), output
            time.sleep(0.5)
        yield environ
    finally:
        if len(running) == len(commands):
            slurm(environ, "scancel", "--user=root", "--signal=KILL", "--full")
            slurm(environ, "scancel", "--user=root")
            time.sleep(2)
        for process in reversed(running):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def slurm(environ: dict[str, str], *words: str) -> str:
    done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip() or done.stderr.strip()


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_slurm_signals_requeues_and_resumes(cluster: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    """Two nodes with one rank each: SIGUSR1 before the time limit, saved, exit 75, requeued, resumed at that step."""
    run, log = tmp_path / "run", tmp_path / "log"
    environ = cluster | {"GPUS_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}
    words = [
        "--nodes",
        "2",
        "--gpus-per-node",
        "0",
        "--time",
        "2",
        "--signal",
        "USR1@20",
        "--output",
        str(log),
        "--chdir",
        str(ROOT),
    ]
    words += [str(SLURM), "--config", str(tiny), "--run.dir", str(run), "--train.device", "cpu"]
    done = subprocess.run(
        ["sbatch", "--parsable", *words, "--train.steps", "10000000"],
        env=environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()

    def until(line: str, limit_s: float) -> str:
        deadline = time.monotonic() + limit_s
        while line not in (text := log.read_text() if log.exists() else ""):
            assert time.monotonic() < deadline, text + slurm(environ, "scontrol", "show", "job", job)
            time.sleep(0.5)
        return text

    text = until(f"saved on a signal: job {job} is requeued", 240)
    stopped = re.search(r"stopped on a signal after step (\d+); the same command resumes from there", text)
    assert stopped, text
    assert (run / f"checkpoints/step_{int(stopped[1]):08d}/manifest.json").exists()
    until(f"resuming from {run}/checkpoints/step_{int(stopped[1]):08d}", 240)
    deadline = time.monotonic() + 60
    while len(losses(run)) <= int(stopped[1]):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    assert "Restarts=1" in slurm(environ, "scontrol", "show", "job", job)
