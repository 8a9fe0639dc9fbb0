"""Runs stopped by older engines resume with the metrics of those engines, in the same and in other layouts.

`golden/*.zip` were created by `python tests/proofs/golden_run.py` of the engines that wrote the format; that of schema
1, which is older than the script, by the engine before commit b0d12be, with the same runs but for `LACKS`. The metrics
are in fp32 and fp16 and bitwise equal only on the same kind of processor and in the same layout, so the tolerances
allow a few steps with another order of sums. The effects of a wrong resume (another sample, a lost moment or loss
scale, another learning rate) are thousands of times larger.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.format import SCHEMA
from engine.cli.main import main
from engine.config.derived import derive
from engine.config.load import load
from engine.distributed.context import ParallelContext
from engine.optim.precision import PRECISIONS
from engine.train.loop import train
from engine.util.signals import StopRequest
from tests.proofs import golden_run
from tests.support.harness import run_ranks

FILES = sorted(Path(__file__).with_name("golden").glob("*.zip"))
LAYOUTS: dict[str, list[dict[str, int]]] = {
    "fp32": [{"tensor": 2, "pipeline": 2}, {"tensor": 1}, {"pipeline": 2, "data": 2}],
    "fp16": [{"tensor": 1}, {"tensor": 2}],
}
HEAVY = {"pipeline": 2, "data": 2}
TOLERANCE = {"fp32": 2e-6, "fp16": 2e-3}
EXACT = ("step", "tokens", "lr", "loss_scale", "skipped", "val_tokens", "val_unigram")
# The engine that wrote schema 1 had another sample order: the run resumes with other samples. What the step determines
# is equal, and the losses are close: 4.5 at step 7, 5.6 for a new model.
ALLOW = {"schema1": {"checkpoint.allow": "data.order"}}
SAME = ("step", "tokens", "lr")
OTHER_SAMPLES = 0.02
CASES = [
    pytest.param(
        *(file, name, degrees),
        id=f"{file.stem}-{name}-{'x'.join(f'{axis}{n}' for axis, n in degrees.items())}",
        marks=[pytest.mark.heavy] if degrees == HEAVY else [],
    )
    for file in FILES
    for name, layouts in LAYOUTS.items()
    for degrees in layouts
]


def test_every_schema_has_a_golden_file() -> None:
    assert [file.stem for file in FILES] == [f"schema{number}" for number in range(1, SCHEMA + 1)]


def unpacked(file: Path, folder: Path) -> Path:
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)
    return folder


def metrics(lines: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, with -1 for missing values, such as the norm of a gradient that overflowed."""
    return [{k: -1 if x is None else x for k, x in json.loads(line).items()} for line in lines.splitlines()]


@pytest.mark.parametrize(("file", "name", "degrees"), CASES)
def test_a_stopped_run_resumes(tmp_path: Path, file: Path, name: str, degrees: dict[str, int]) -> None:
    root, ranks = unpacked(file, tmp_path), math.prod(degrees.values())
    run = root / name / "run"
    expected, before = metrics((root / name / "expected.jsonl").read_text()), (run / "metrics.jsonl").read_text()
    layout = {f"parallel.{axis}": str(degrees.get(axis, 1)) for axis in ("tensor", "pipeline", "data")}
    values = golden_run.options(name, root, file.stem) | layout
    start = {"run.dir": str(run), "checkpoint.resume": "latest"} | ALLOW.get(file.stem, {})
    resolved = load([], values | start, world=ranks, reject_idle=True)
    cfg = resolved.config
    here = {key: x for key, x in values.items() if key.startswith("data.")}  # the saved config has their original paths
    saved = load([run / "config.toml"], here | layout | start, world=ranks)
    assert saved.config == cfg

    def job(ctx: ParallelContext) -> int:
        return train(resolved, ctx, StopRequest())

    dtype = PRECISIONS[cfg.train.precision].compute
    assert set(run_ranks(derive(cfg).layout, job, dtype=dtype)) == {0}
    after = (run / "metrics.jsonl").read_text()
    assert after.startswith(before)
    found = metrics(after[len(before) :])
    assert len(found) == len(expected)
    for line, wanted in zip(found, expected):
        if file.stem in ALLOW:
            assert {k: line[k] for k in SAME if k in wanted} == {k: wanted[k] for k in SAME if k in wanted}
            (loss,) = {"loss", "val_loss"} & wanted.keys()
            assert line[loss] == pytest.approx(wanted[loss], rel=OTHER_SAMPLES)
        else:
            assert {k: line[k] for k in wanted if k in EXACT} == {k: wanted[k] for k in wanted if k in EXACT}
            assert {k: line[k] for k in wanted} == pytest.approx(wanted, rel=TOLERANCE[name])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_command_reads_it(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = unpacked(file, tmp_path)
    run, picture = str(root / "fp32/run"), ["--output", str(root / "picture.png")]
    verbs = [["verify", run], ["inspect", run], ["plot", run, str(root / "fp16/run"), *picture]]
    verbs += [["schedule", "--from", run, *picture], ["export", run, str(root / "hf")]]
    verbs += [["evaluate", run, "--data", str(root / "web")]]
    for verb in verbs:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(verb)
        printed = capsys.readouterr()
        assert left.value.code == 0, printed.err
    losses = [re.findall(r"loss ([\d.]+)", text) for text in (printed.out, (root / "fp32/evaluated.txt").read_text())]
    exact = 1e-3 if file.stem in ALLOW else 0  # it did not score the last tokens of a corpus, fewer than a sample
    assert float(losses[0][0]) == pytest.approx(float(losses[1][0]), rel=exact) and len(losses[0]) == 1
