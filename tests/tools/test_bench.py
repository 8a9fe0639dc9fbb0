"""`make bench` at tiny sizes: every script runs, and its rows are in the table and the JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

BENCH = ROOT / "tools/bench"
sys.path.insert(0, str(BENCH))

from measure import Options  # noqa: E402
from report import Row, as_json, from_json  # noqa: E402
from train_cpu import doubt, paired, rows_of, run_case  # noqa: E402


@pytest.mark.heavy
@pytest.mark.timeout(300)
@pytest.mark.parametrize("only", ["train", "startup prepare checkpoint order"])
def test_one_table_and_json(only: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "all.py"), "--tiny", "--json", str(tmp_path / "bench.json")]
    done = subprocess.run([*command, "--only", *only.split()], capture_output=True, text=True, check=False)
    log = (tmp_path / "bench.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["machine"]["cores"] and found["machine"]["torch"] and "all.py" in found["command"] and found["date"]
    assert set(found["details"]) == set(only.split())
    for row in found["rows"]:
        assert row["ours"] and row["unit"] and row["what"].split(",")[0] in done.stdout
        assert as_json(from_json(row)) == row
    if only == "train":
        assert [row["peer"] for row in found["rows"]][:2] == ["transformers loop", ""]
        assert found["rows"][0]["ratio"] and found["rows"][0]["share"]


@pytest.mark.heavy
def test_initial_values_and_buckets_are_measured() -> None:
    import buckets
    import initialise

    row, values = initialise.measure("micro", 2, 1)
    assert values > 1000 and row.ours[0] > 0 and row.peers[0] > 0
    seconds, count = buckets.measure("gloo", 1, model_num_layers=1, parallel_bucket_mib=32.0)
    assert seconds > 0 and count == 3  # embeddings, the block, final norm and head


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_what_is_reproducible() -> None:
    """Training and evaluation agree in every bit, and so do two runs, with deterministic algorithms or without."""
    sizes = {"hidden": 32, "layers": 1, "vocab": 300, "seq": 32, "rounds": 1, "batch": 4, "precisions": "fp32"}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(BENCH / "reproducible.py"), *options]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "two runs of 2 steps: the same bits" in lines[1] and lines[2].count("the same bits") == 2
    assert "training, micro-batch 1, 1 thread: the same bits" in lines[3] and len(lines) == 3 + 6


def test_a_script_that_fails_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    for name in ("all.py", "report.py", "machine.py", "peers_env.py"):
        (tmp_path / "bench" / name).write_text((BENCH / name).read_text())
    (tmp_path / "bench/order.py").write_text("raise SystemExit('no disk')")
    command = [sys.executable, "bench/all.py", "--tiny", "--only", "order", "--json", "out.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "FAILED" in done.stdout
    assert "no disk" in (tmp_path / "out.log").read_text()
    assert json.loads((tmp_path / "out.json").read_text())["details"]["order"]["failed"] == 1


def test_ratio_and_share_are_of_one_repetition() -> None:
    row = Row("x", "tokens/s", [100.0, 300.0, 100.0], "p", [50.0, 100.0, 100.0], "l", [200.0])
    assert row.against(row.peers) == [2.0, 3.0, 1.0] and row.against(row.limits) == [0.5]
    seconds = Row("x", "s", [2.0], "p", [4.0], more=False)
    assert seconds.against(seconds.peers) == [2.0] and seconds.against([]) == []


def test_a_peer_that_does_other_work_is_not_compared() -> None:
    o = Options(hidden=64, layers=2, heads=4, ffn=176, vocab=500)
    ours = {"parameters": 164_672, "losses": [6.2, 6.1, 6.0]}
    assert o.parameters() == 164_672
    assert not doubt(o, ours, ours)
    assert "parameters" in doubt(o, ours | {"parameters": 132_672}, ours)
    assert "first loss" in doubt(o, ours | {"losses": [0.8, 0.7, 0.6]}, ours)
    assert "falls by" in doubt(o, ours | {"losses": [6.2, 6.2, 6.2]}, ours)
    assert "falls by" in doubt(o, ours | {"losses": [6.2, 5.9, 5.6]}, ours)

    def run(speed: float, others: float = 0.0) -> dict[str, float]:
        return {"tokens_per_s": speed, "others": others, "peak_sum_mib": 1.0, "first_step_s": 1.0}

    runs = {"engine": [run(3.0), run(3.0, 0.5)], "loop": [run(2.0), run(1.0)], "litgpt": [run(9.0), run(9.0)]}
    doubts = {"litgpt": "other work", "olmo": "no such package", "trainer": "no such package", "data.litgpt": "slow"}
    rows = rows_of(o, runs, doubts, [{"torch": 1.0}, {"torch": 1.0}])
    left_out = "litgpt, compiled (other work); OLMo-core, HF Trainer, compiled (no such package)"
    assert rows[0].note == f"not compared: {left_out}" and rows[1].note == rows[2].note == ""
    assert rows[0].peer == "transformers loop" and rows[0].ours == [3.0] and rows[0].peers == [2.0]
    assert paired(o, runs["engine"][1:], runs["loop"][1:]) == ([0], "disturbed")


def test_flops_of_the_58_m_model() -> None:
    o = Options()
    assert o.parameters() == 58_073_600 and round(o.flops_per_token() / 1e6) == 275
    assert o.stages() == (6, 2)


def test_a_case_that_fails_or_hangs_tells_why(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ValueError: no such thing' >&2\nexit 3\n")
    python.chmod(0o755)
    assert run_case(Options(), "loop", python)["error"] == "ValueError: no such thing"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    assert "not done after" in run_case(Options(timeout=0.2), "loop", python)["error"]


@pytest.mark.heavy
def test_conversion_is_measured_beside_a_copy() -> None:
    sizes = ["--layers", "1", "--hidden", "64", "--ffn", "128", "--vocab", "512", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, str(BENCH / "convert.py"), *sizes], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "import" in done.stdout and "export" in done.stdout and "plain copy + fsync" in done.stdout
