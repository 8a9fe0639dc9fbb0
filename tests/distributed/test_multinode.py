"""Several nodes: two hosts as network namespaces, and the scripts that start one torchrun on each.

Each namespace has separate interfaces, addresses and routes, and only a cable to the other. A socket bound to the
loopback, or to the address of the host's name, cannot be reached from the other namespace.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from engine.distributed import network
from engine.distributed.env import Env
from engine.errors import ConfigError
from tests.support.errors import raises
from tests.support.examples import PORT, SCRIPT, SLURM, environment, losses
from tests.support.paths import ROOT

CONFIG = ROOT / "examples/configs/llama-2-7b.toml"
TIMEOUT_S = 8
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Host:
    """A network namespace: its name, its end of the cable, its address."""

    name: str
    link: str
    address: str

    def set_link(self, state: str) -> None:
        ip("-n", self.name, "link", "set", self.link, state)


THIS_HOST = Host("", "", "127.0.0.1")  # this machine as it is


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    """Two hosts with a cable between them; always removed at the end."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` (iproute2): two hosts cannot be made")
    pair = [Host(f"engine{os.getpid()}n{i}", f"cable{i}", f"10.77.0.{i + 1}") for i in range(2)]
    try:
        try:
            for host in pair:
                ip("netns", "add", host.name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no right to make network namespaces: {error.stderr.strip()}")
        first, second = pair
        ends = (first.link, "netns", first.name, "type", "veth", "peer", "name", second.link, "netns", second.name)
        ip("link", "add", *ends)
        for host in pair:
            ip("-n", host.name, "link", "set", "lo", "up")
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.link)
            host.set_link("up")
        yield pair
    finally:
        for host in pair:
            subprocess.run(["ip", "netns", "delete", host.name], check=False, capture_output=True)


@contextmanager
def started(hosts: list[Host], config: Path, run: Path, *options: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Run the script on every host, two ranks each: yields the processes, and kills the remaining ones at the end."""
    nodes: list[subprocess.Popen[str]] = []
    try:
        for rank, host in enumerate(hosts):
            here = {"NNODES": str(len(hosts)), "NODE_RANK": str(rank), "MASTER_ADDR": hosts[0].address}
            here |= {"GPUS_PER_NODE": "2", "MASTER_PORT": PORT}
            command = ["ip", "netns", "exec", host.name] if host.name else []
            command += [
                "bash",
                str(SCRIPT),
                "--config",
                str(config),
                "--run.dir",
                str(run),
                "--train.device",
                "cpu",
                *options,
            ]
            with (run.parent / f"{run.name}.{rank}.log").open("w") as log:
                streams = {"stdout": log, "stderr": subprocess.STDOUT}
                nodes.append(
                    subprocess.Popen(command, env=environment(**here), text=True, start_new_session=True, **streams)
                )
        yield nodes
    finally:
        for node in nodes:
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def codes(nodes: list[subprocess.Popen[str]], timeout_s: float = 200) -> list[int]:
    deadline = time.monotonic() + timeout_s
    return [node.wait(max(deadline - time.monotonic(), 0.1)) for node in nodes]


def output(run: Path) -> list[str]:
    """The output of each node."""
    return [path.read_text() for path in sorted(run.parent.glob(f"{run.name}.*.log"))]


def wait_for_steps(run: Path, nodes: list[subprocess.Popen[str]], steps: int) -> None:
    deadline = time.monotonic() + 90
    while len(losses(run)) < steps:
        assert time.monotonic() < deadline and all(node.poll() is None for node in nodes), output(run)
        time.sleep(0.05)


# -- two hosts ---------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(400)
def test_two_nodes_equal_one_process_and_stop_and_resume(hosts: list[Host], tiny: Path, tmp_path: Path) -> None:
    """Data parallel over the cable; SIGUSR1 to one node's script: saved, 75 on both; then a pipeline over the cable."""
    run = tmp_path / "run"
    with started(hosts, tiny, run, "--train.steps", "100000") as nodes:
        wait_for_steps(run, nodes, 3)
        nodes[1].send_signal(signal.SIGUSR1)
        assert codes(nodes) == [75, 75], output(run)
    saved = len(losses(run))
    assert json.loads((run / "exit.json").read_text()) == {"code": 75, "reason": "stopped on a signal", "step": saved}
    steps = ("--train.steps", str(saved + 3))
    with started(hosts, tiny, run, *steps, "--parallel.pipeline", "2") as nodes:
        assert codes(nodes) == [0, 0], output(run)
    assert f"tensor 2 x pipeline 2 x data 1, 1f1b; steps {saved + 1}..{saved + 3}, resuming" in output(run)[0]

    self_axis = [sys.executable, "-m", "engine", "train", "--run.dir", str(tmp_path / "one"), *steps]
    self_axis += ["--config", str(CONFIG), "--config", str(tiny), "--parallel.data", "1", "--parallel.tensor", "1"]
    subprocess.run(self_axis, env=environment(), check=True, capture_output=True)
    assert len(losses(run)) == saved + 3
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), rel=1e-11, abs=0)


@pytest.mark.heavy
@pytest.mark.timeout(400)
def test_a_cut_link_ends_both_sides_with_one_message_each(hosts: list[Host], tiny: Path, tmp_path: Path) -> None:
    """No connection is closed: both sides notice by the time-out, and the far one has also lost torchrun's store."""
    run = tmp_path / "run"
    with started(hosts, tiny, run, "--train.steps", "100000", "--parallel.timeout-s", str(TIMEOUT_S)) as nodes:
        wait_for_steps(run, nodes, 2)
        hosts[1].set_link("down")
        try:
            cut = time.monotonic()
            assert codes(nodes) == [1, 1], output(run)
            assert (
                TIMEOUT_S - 2 < time.monotonic() - cut < TIMEOUT_S + 40
            )  # 5 s on an idle machine; without bounded waits TCP would take minutes
        finally:
            hosts[1].set_link("up")
    near, far = output(run)
    printed = [[line for line in text.splitlines() if line.startswith("error: ")] for text in (near, far)]
    assert [len(lines) for lines in printed] == [1, 1], near + far
    silence = rf"error: rank [01]: no message from another rank for {TIMEOUT_S} s \(parallel.timeout_s\): its host or"
    assert re.match(silence, printed[0][0]), near
    gone = (
        rf"error: rank 2: lost contact with other ranks and with the first node, {hosts[0].address}: that host or the"
    )
    assert re.match(gone, printed[1][0]), far
    for text in (near, far):
        assert "then start the same command again: it resumes from the last checkpoint." in text
        assert "in train_step" not in text and text.count("Traceback") == 1  # that of torchrun


@pytest.mark.timeout(400)
def test_a_signal_to_every_process_of_a_node_is_one_request(tiny: Path, tmp_path: Path) -> None:
    """Slurm may signal script, torchrun and ranks at once; the script and torchrun then forward the signal as well."""
    run = tmp_path / "run"
    with started([THIS_HOST], tiny, run, "--train.steps", "100000") as nodes:
        wait_for_steps(run, nodes, 2)
        os.killpg(nodes[0].pid, signal.SIGTERM)
        assert codes(nodes) == [75], output(run)
    assert json.loads((run / "exit.json").read_text())["code"] == 75


# -- the interface -----------------------------------------------------------------------------------------------------


def test_the_interface_is_the_users_the_loopback_or_the_way_to_the_master(monkeypatch: pytest.MonkeyPatch) -> None:
    far, near = Env(0, 4, 0, 2), Env(0, 2, 0, 2)

    def chosen(env: Env, master: str, given: str = "", device: str = "cpu") -> str | None:
        monkeypatch.setenv("MASTER_ADDR", master)
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", given)
        if not given:
            monkeypatch.delenv("GLOO_SOCKET_IFNAME")
        network.choose_interface(env, torch.device(device))
        return os.environ.get("GLOO_SOCKET_IFNAME")

    assert chosen(near, "10.77.0.1") == "lo"
    assert chosen(near, "10.77.0.1", given="eth7") == "eth7"
    assert chosen(far, "10.77.0.1", given="eth7") == "eth7"
    assert chosen(far, "127.0.0.1") == "lo"  # two nodes on one machine, with a loopback master address
    assert chosen(far, "no.such.host.invalid") is None
    assert chosen(far, "127.0.0.1", device="cuda") is None
    monkeypatch.setattr(network, "_address_towards", lambda host: "127.0.1.1")
    with raises(ConfigError, "distributed.master-on-loopback", "MASTER_ADDR", "head", "127.0.1.1", "--master-addr"):
        chosen(far, "head")


# -- the scripts -------------------------------------------------------------------------------------------------------


def bash(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *words], env=environment(**variables), capture_output=True, text=True, cwd=ROOT, timeout=60
    )


def test_a_dry_run_shows_the_command_and_the_run() -> None:
    nodes = {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    done = bash(str(SCRIPT), "--dry-run", "--parallel.tensor=8", "--optimizer.lr", "1e-4", **nodes)
    assert done.returncode == 0, done.stderr
    command = (
        "torchrun --nnodes 4 --node-rank 3 --nproc-per-node 8 --master-addr head --master-port 1234 -m engine train"
    )
    assert done.stdout.startswith(command)
    line = done.stdout.splitlines()[0]
    assert line.rstrip().endswith("--parallel.tensor=8 --optimizer.lr 1e-4 --run.dir runs/llama-2-7b")
    assert "\nranks: 32\n" in done.stdout and re.search(r"parallel.tensor\W+8\W+command line", done.stdout)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NNODES": "2", "MASTER_ADDR": "head"}, "error: NNODES=2, but NODE_RANK is not set"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "error: NNODES=2, but MASTER_ADDR is not set"),
        (
            {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "head"},
            "error: NODE_RANK=2 with NNODES=2: the nodes are 0 to 1",
        ),
        ({"NNODES": "two"}, "error: NNODES=two is not a whole number of at least 1"),
        ({"GPUS_PER_NODE": "0"}, "error: GPUS_PER_NODE=0 is not a whole number of at least 1"),
    ],
)
def test_missing_variables_are_reported(variables: dict[str, str], message: str) -> None:
    done = bash(str(SCRIPT), "--dry-run", **variables)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("torchrun", "code"),
    [
        ("exit 0", 0),
        ("exit 1", 1),  # and not 75: that exit.json is from an earlier start
        ("kill -USR1 $$; exit 3", 3),  # a signal to every process of the job does not end torchrun
        ("""echo '{"code": 75, "step": 4}' > run/exit.json; exit 1""", 75),
        ("""echo '{"code": 1, "step": 4}' > run/exit.json; exit 1""", 1),
        ("echo 2 > $ENGINE_EXIT_CODE_FILE; exit 1", 2),  # a configuration error
        # a second signal ended the ranks at once: they had no time to write exit.json
        ("""echo '{"code": null}' > run/exit.json; for i in 1 2; do kill -USR1 $PPID; sleep 0.5; done; exit 1""", 138),
    ],
)
def test_the_script_ends_as_the_run_did(torchrun: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "torchrun").write_text(f"#!/bin/sh\n{torchrun}\n")
    (tmp_path / "torchrun").chmod(0o755)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/exit.json").write_text('{"code": 75, "reason": "stopped on a signal", "step": 2}\n')
    variables = environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
    done = subprocess.run(["bash", str(SCRIPT), "--run.dir=run"], env=variables, cwd=tmp_path, timeout=30)
    assert done.returncode == code


def test_a_signal_to_all_processes_before_the_ranks_ends_no_script(tmp_path: Path) -> None:
    (tmp_path / "mktemp").write_text("#!/bin/sh\nkill -USR1 $PPID\nkill -USR1 $$\n")
    (tmp_path / "mktemp").chmod(0o755)
    variables = environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
    done = subprocess.run(
        ["bash", str(SCRIPT), "--run.dir=run"], env=variables, cwd=tmp_path, timeout=30, capture_output=True, text=True
    )
    assert done.returncode == 75 and "nothing to save yet" in done.stderr


def test_slurm_dry_run_needs_no_slurm() -> None:
    done = bash(str(SLURM), "--dry-run", "--train.steps", "7000")
    assert done.returncode == 0, done.stderr
    assert "scontrol show hostnames" in done.stdout and "NNODES=4 GPUS_PER_NODE=8" in done.stdout
    assert re.search(r"srun .* bash \S*examples/pretrain_7b.sh --dry-run --train.steps 7000", done.stdout)
    assert "torchrun --nnodes 4 --node-rank 0" in done.stdout and "\nranks: 32\n" in done.stdout
    done = bash(str(SLURM))
    assert done.returncode == 2 and "error: this is not a Slurm job" in done.stderr


@pytest.mark.parametrize("code", [0, 1, 75])
def test_slurm_queues_up_again_after_a_save_only(code: int, tmp_path: Path) -> None:
    tools = {
        "srun": f'echo "srun $* for $NNODES nodes at $MASTER_ADDR"; exit {code}',
        "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "scontrol $*"; fi',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    done = bash(str(SLURM), "--train.steps", "7", PATH=f"{tmp_path}:{os.environ['PATH']}", **job)
    assert done.returncode == code, done.stderr
    assert "pretrain_7b.sh --train.steps 7 for 2 nodes at node7\n" in done.stdout
    assert ("scontrol requeue 42\n" in done.stdout) == (code == 75)
