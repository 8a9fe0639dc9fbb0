"""`engine doctor`: a correct installation, a missing extension, and each kind of error, injected and found."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.cli import diagnosis, selftest
from engine.cli.main import main
from engine.distributed import pair, shared_memory
from engine.distributed.pair import try_pair
from engine.ops import native
from engine.ops.attention import attention_case, select_implementation

CPU = torch.device("cpu")
needs_ops = pytest.mark.skipif(native.load()[0] is None, reason=native.load()[1])


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Exit code and output of the command in this process. pair: in place of the test between two processes."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def call(pair: Callable[[str, float], str] = lambda transport, timeout_s: "") -> tuple[int, str]:
        monkeypatch.setattr(diagnosis, "try_pair", pair)
        with pytest.raises(SystemExit) as end:
            main(["doctor"])
        assert isinstance(end.value.code, int)
        return end.value.code, capsys.readouterr().out

    return call


def test_a_sound_installation() -> None:
    command = [str(Path(sys.executable).parent / "engine"), "doctor"]
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME")}
    done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "" and done.stdout.splitlines()[-1] == "nothing is broken"
    for topic in (
        "engine",
        "python",
        "platform",
        "CPU",
        "cores",
        "memory",
        "GPUs",
        "backends",
        "gloo",
        "shared memory",
        "extension",
    ):
        assert re.search(rf"^{topic} +\S", done.stdout, re.M), topic
    assert f"torch {torch.__version__}" in done.stdout and re.search(r"code [0-9a-f]{32}\n", done.stdout)
    assert done.stdout.count("have summed a number") == 2 and re.search(
        r"^optional +.*matplotlib \d", done.stdout, re.M
    )
    for name in selftest.OPS:
        for suffix, tolerance in (("", "1e-05"), (" in bf16", "2e-02")):
            tolerance = "0: all bits" if name in selftest.BITWISE else tolerance
            line = rf" {name}{suffix}: (custom kernel|torch); max error [0-9.e+-]+, tolerance {tolerance}$"
            assert re.search(line, done.stdout, re.M), name


def test_without_gloo_it_is_broken(examined: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A network interface that does not exist, set in the variable where users set theirs."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    monkeypatch.setattr(selftest, "OPS", {})
    code, out = examined(lambda transport, timeout_s: try_pair(transport, timeout_s) if transport == "gloo" else "")
    lines = out.splitlines()
    assert code == 1 and lines[-2] == "broken:" and "gloo: two processes on this machine could not sum" in lines[-1]
    assert "nowhere0" in lines[-1] and "nothing is broken" not in out


def test_processes_that_do_not_answer_are_not_waited_for() -> None:
    assert try_pair("gloo", 0.01) == "no answer within 0.01 s from rank 0"


def test_why_memory_is_not_shared_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "load", lambda: (None, "no such extension"))
    fork, answers = multiprocessing.get_context("fork"), []
    pipes = [fork.Pipe(duplex=False) for _ in range(2)]
    ranks = [
        fork.Process(target=pair._one_of_two, args=(pipe[1], rank, f"{tmp_path}/store", "shared", 20.0))
        for rank, pipe in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    for ours, _ in pipes:
        answers.append(ours.recv_bytes().decode() if ours.poll(30) else "")
    for process in ranks:
        process.kill()
        process.join()
    assert answers == ["no such extension"] * 2


class Liar:
    """An operator whose results are wrong by a factor; `default` is the name that torch looks up."""

    def __init__(self, true: Any, factor: float) -> None:
        self.true, self.default, self.factor = true, true.default, factor

    def __call__(self, *inputs: Any) -> Any:
        return self.true(*inputs) * self.factor


@needs_ops
@pytest.mark.parametrize(
    ("kernel", "op", "wrong"),
    [
        ("gated", "SwiGLU", 1.0001),
        ("gated_backward", "SwiGLU", math.nan),
        ("rope_backward", "RoPE", 0.999),
        ("softmax_stats", "cross entropy with z-loss", 1.001),
        ("draw", "keyed draws", 1.0000001),  # one bit of some values
        ("dropout", "dropout", 1.0000001),
    ],
)
def test_a_kernel_that_lies_is_found(
    kernel: str,
    op: str,
    wrong: float,
    monkeypatch: pytest.MonkeyPatch,
    examined: Callable[..., tuple[int, str]],
) -> None:
    monkeypatch.setattr(torch.ops.trident, kernel, Liar(getattr(torch.ops.trident, kernel), wrong))
    code, out = examined()
    head, _, broken = out.partition("\nbroken:\n")
    assert code == 1 and f" {op}: custom kernel; max error" in head
    assert any(f"op on cpu: {op}: custom kernel; max error" in line and "WRONG" in line for line in broken.splitlines())
    assert "RMSNorm" not in broken


def test_an_op_that_raises_is_a_fault_and_the_others_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("no such instruction\nmore")

    monkeypatch.setitem(selftest.OPS, "RoPE", (fails, []))
    tried = list(selftest.check_ops(CPU))
    assert [t.name for t in tried] == [name + low for name in selftest.OPS for low in ("", " in bf16")]
    assert [(t.name, t.error) for t in tried if t.broken] == [
        (name, "RuntimeError: no such instruction") for name in ("RoPE", "RoPE in bf16")
    ]


def test_without_extensions_it_says_so_and_nothing_is_broken(
    monkeypatch: pytest.MonkeyPatch, examined: Callable[..., tuple[int, str]]
) -> None:
    monkeypatch.setitem(sys.modules, "engine._index", None)
    monkeypatch.setattr(native, "load", lambda: (None, "engine._ops is not built"))
    monkeypatch.setattr(native, "_library", lambda: pytest.fail("asked for what is not there"))
    code, out = examined()
    assert code == 0 and out.endswith("nothing is broken\n")
    assert re.search(r"^extension +engine._index is not built; build it: pip install", out, re.M)
    assert re.search(r"^extension +engine._ops is not built; build it: pip install", out, re.M)
    assert "fp32 on cpu: torch (engine._ops is not built)" in out
    assert not re.search(r"op on cpu .*: custom kernel", out) and len(
        re.findall(r"op on cpu .*: torch", out)
    ) == 2 * len(selftest.OPS)


@needs_ops
def test_what_ran_is_what_was_asked_for() -> None:
    own = {t.name for t in selftest.check_ops(CPU) if t.custom}
    assert {"RMSNorm", "LayerNorm", "RoPE", "SwiGLU", "gated GeLU", "cross entropy", "AdamW"} <= own
    assert {"cross entropy with z-loss", "keyed draws", "dropout"} <= own
    assert "embedding" not in own and ("attention" in own) == ("attention with document masking" in own)
    words = native.describe_kernels(CPU, torch.float32)
    name = select_implementation("auto", attention_case(CPU, torch.float32, 16))
    assert (name == "own") == ("attention" in own) == ("attention with a sliding window" in own)
    assert ("matmul: custom" in words) == ("matmul" in own)
    assert native.describe_kernels(CPU, torch.float64).endswith("matmul: torch")
    assert (
        native.describe_kernels(torch.device("meta"), torch.float32)
        == "torch (custom kernels exist for CPUs and CUDA, not for meta)"
    )


def test_an_apex_that_is_not_nvidias_is_not_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("raise SystemExit('never imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert diagnosis._version("apex", *diagnosis.OPTIONAL["apex"]) == ""
    (tmp_path / "apex/normalization").mkdir()
    assert diagnosis._version("apex", *diagnosis.OPTIONAL["apex"]) == "(unknown version)"


@pytest.mark.parametrize(
    ("words", "output"), [(["--timeout-s", "0"], "--timeout-s = 0.0"), (["--nonsense"], "nonsense")]
)
def test_wrong_options(words: list[str], output: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["doctor", *words])
    assert end.value.code == 2
    assert output in "".join(capsys.readouterr())
