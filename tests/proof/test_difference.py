"""`engine diff`: clean layouts do not differ; planted faults are named with layer, operation, rank and micro-batch."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engine.ops.linear as linear_module
from engine.cli import diff
from engine.errors import CheckpointError, ConfigError
from engine.model.layers import RowLinear
from engine.optim.optimizer import Optimizer
from engine.proof import difference
from engine.proof.capture import Noise
from engine.proof.difference import MOVES, LayoutDifference, compare, first_difference, limit
from engine.proof.sides import Side, noise_of, record
from engine.proof.small_data import with_small_data
from engine.proof.traces import FORWARD, TensorRecord, Trace, TraceWriter
from tests.support.cases import config
from tests.support.errors import raises
from tests.support.runs import TINY

MICRO = ["--model.preset", "micro", "--model.num_layers", "2", "--train.seq_len", "16"]


def sides(folder: Path, world: int = 2, model: dict[str, Any] | None = None, **layout: Any) -> tuple[Side, Side]:
    """A layout of a tiny model and one process, on a small corpus."""
    options = TINY | {"data_mask_eod": True, "checkpoint_resume": "never"} | (model or {})
    with_small_data(config(1, **options), folder)
    options["data_train"] = str(folder / "train")
    return Side(config(world, **options, **layout), redrawn=True), Side(config(1, **options), redrawn=True)


def found(folder: Path, steps: int = 1, **options: Any) -> LayoutDifference:
    return first_difference(sides(folder, **options), steps, folder / "traces")


# -- clean layouts

CLEAN: dict[str, dict[str, Any]] = {
    "sequence": {"parallel_tensor": 2},
    "replicated": {"parallel_tensor": 2, "parallel_sequence": False, "train_recompute": "full"},
    "pipeline-full": {"parallel_pipeline": 2, "train_recompute": "full", "model": {"model_num_layers": 4}},
    "pipeline": {"parallel_pipeline": 2, "parallel_schedule": "zb-h1", "train_recompute": "selective"},
    "data": {"parallel_data": 2, "train_micro_batch_size": 2},
    "shared-kv": {"parallel_tensor": 2, "model": {"model_num_kv_heads": 1, "train_dropout": 0.2, "train_z_loss": 0.1}},
    "post": {"parallel_tensor": 2, "model": {"model_norm_position": "post", "model_qk_norm_span": "projection"}},
}


QUICK = ("sequence-bf16", "shared-kv-fp64", "pipeline-bf16")


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, dtype, id=f"{name}-{dtype}", marks=[] if f"{name}-{dtype}" in QUICK else pytest.mark.heavy)
        for name in CLEAN
        for dtype in ("fp64", "bf16")
    ],
)
def test_clean_layouts_do_not_differ(name: str, precision: str, tmp_path: Path) -> None:
    options = dict(CLEAN[name])
    model = options.pop("model", {}) | {"train_precision": precision}
    result = found(tmp_path, model=model, **options)
    assert result.findings == () and result.only == ((), ()), result.findings[:1]
    assert result.tensors > 150 and result.compared > result.tensors


def test_every_part_of_a_step_is_compared(tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    assert not first_difference(sides(tmp_path, parallel_tensor=2), 1, folder).findings
    tensors = {(r.kind, r.name) for r in Trace(folder / "here" / "0").records}
    layer = "layers.1"
    for name in ("embed", f"{layer}.attention.q", f"{layer}.attention.out.input", f"{layer}.attention.out"):
        assert {("activation", name), ("gradient", name)} <= tensors
    for name in (f"{layer}.mlp_norm.sum", f"{layer}.mlp.down.input", f"{layer}.attention.q_norm", layer, "norm"):
        assert {("activation", name), ("gradient", name)} <= tensors
    weight = f"{layer}.attention.k.weight"
    for kind in ("weight gradient", "exp_avg", "exp_avg_sq", "master weights", "weights"):
        assert (kind, weight) in tensors
    assert {("activation", "losses"), ("number", "loss"), ("number", "gradient norm")} <= tensors


def test_noise_reaches_every_tensor(tmp_path: Path) -> None:
    """Each move differs from the reference in every tensor, except in numbers that are given and states of zero."""
    folder = tmp_path / "traces"
    first_difference(sides(tmp_path, parallel_data=2), 1, folder)
    there, move = (Trace(folder / "there" / str(k)) for k in (0, 1))
    assert len(there.records) == len(move.records)
    same = [r for r in there.records if np.array_equal(there.values(r), move.values(r))]
    assert {r.name for r in same if np.any(there.values(r))} == {"learning rate"}


def test_gradients_have_noise_of_the_backward(tmp_path: Path) -> None:
    """With noise in the backward only, no activation moves, and the first gradient of the backward does."""
    _, one = sides(tmp_path)
    record(one, tmp_path / "traces", [Noise(0, 0.0, 0.0, 0.0, 0.0), Noise(1, 0.0, 2.0**-50, 0.0, 0.0)], 1)
    there, move = (Trace(tmp_path / "traces" / str(k)) for k in (0, 1))
    moved = {(r.kind, r.name) for r in there.records if not np.array_equal(there.values(r), move.values(r))}
    assert ("gradient", "norm") in moved and not any(kind == "activation" for kind, _ in moved)


# -- planted faults


def test_a_wrong_activation_is_named_with_layer_operation_rank_and_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = RowLinear.forward
    calls = []

    def wrong(self: RowLinear, x: torch.Tensor, recipe: Any = None) -> torch.Tensor:
        out = forward(self, x, recipe)
        if self.weight.name != "layers.1.mlp.down.weight" or self.sequence.size == 1:
            return out
        calls.append(None)
        return out * (1 + 1e-9) if len(calls) == 3 and self.sequence.rank == 1 else out

    monkeypatch.setattr(RowLinear, "forward", wrong)
    first = found(tmp_path, parallel_tensor=2).findings[0]
    assert (first.here.kind, first.here.name, first.here.layer) == ("activation", "layers.1.mlp.down", 1)
    assert (first.here.op, first.here.rank, first.here.microbatch) == ("row-parallel matmul", 1, 2)
    assert first.here.offset == (2, 4, 0)  # the third sample, the second half of the positions
    assert first.allowed < first.distance < 1e-8 * first.size


def test_a_wrong_input_gradient_is_named_by_the_operation_whose_backward_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = linear_module.reduce_partial_sums_start

    def wrong(x: torch.Tensor, replicated: Any, sequence: Any) -> Any:
        return start(x * 1.001 if sequence.size > 1 else x, replicated, sequence)

    monkeypatch.setattr(linear_module, "reduce_partial_sums_start", wrong)
    first = found(tmp_path, parallel_tensor=2).findings[0]
    assert (first.here.kind, first.here.name) == ("gradient", "layers.1.mlp_norm")
    assert first.here.op == "backward of column-parallel matmul layers.1.mlp.gate"


def test_a_wrong_update_of_one_rank_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Optimizer.step

    def wrong(self: Optimizer, lr: float, grad_scale: float = 1.0) -> None:
        step(self, lr * (1 + 1e-6 * self.stages[0].ctx.data.rank), grad_scale)

    monkeypatch.setattr(Optimizer, "step", wrong)
    first = found(tmp_path, parallel_data=2).findings[0]
    assert (first.here.kind, first.here.rank, first.here.op) == ("master weights", 1, "optimizer")


def test_in_bf16_a_fault_above_rounding_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = RowLinear.forward

    def wrong(self: RowLinear, x: torch.Tensor, recipe: Any = None) -> torch.Tensor:
        out = forward(self, x, recipe)
        late = self.weight.name == "layers.1.attention.out.weight" and self.sequence.rank == 1
        return out * 1.1 if late else out

    monkeypatch.setattr(RowLinear, "forward", wrong)
    both = sides(tmp_path, model={"train_precision": "bf16"}, parallel_tensor=2)
    noise = noise_of([side.cfg for side in both], 1)
    assert noise.unit == 2.0**-7 and noise.stored_unit < 1e-5
    first = first_difference(both, 1, tmp_path / "traces").findings[0]
    assert (first.here.name, first.here.rank) == ("layers.1.attention.out", 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_differ(bad: float) -> None:
    record = TensorRecord((1, FORWARD, 0, 0), "activation", "x", "norm", 0, (0,), (4,))
    reference = np.ones(4)
    moved = [reference + 1e-3 * k for k in range(1, MOVES + 1)]
    assert difference.judge(record, np.array([1.0, 1.0, bad, 1.0]), (reference, record), moved, 10) is not None


# -- the statistics


@pytest.mark.parametrize("nu", [1, 4, 30, 1000])
def test_the_limit_holds_for_noise_of_that_many_degrees_of_freedom(nu: int) -> None:
    """Distance and moves from the same distribution: no alarm in 20,000 draws, the bound is one in a million."""
    rng = np.random.default_rng(nu)
    distance, moves = rng.chisquare(nu, 20_000), rng.chisquare(nu, (20_000, MOVES)).mean(1)
    assert (np.sqrt(distance / moves) < limit(nu, 1)).all()
    assert 1 < limit(nu, 1) < limit(nu, 1000)


def test_many_degrees_of_freedom_make_the_limit_narrow() -> None:
    assert 1 < limit(1e6, 1000) < 1.02 < limit(1000, 1000) < 1.5 < limit(100, 1000) < 4


# -- traces


def write(folder: Path, rank: int, *entries: tuple[TensorRecord, torch.Tensor]) -> None:
    with TraceWriter(folder, rank) as writer:
        for record, values in entries:
            writer.write(record, values)


def of(name: str, offset: tuple[int, ...], shape: tuple[int, ...] = (), *, place: int = 0) -> TensorRecord:
    return TensorRecord((1, FORWARD, 0, place), "activation", name, "norm", 0, offset, shape)


def test_rectangles_are_assembled_from_those_of_other_ranks(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    write(tmp_path, 0, (of("x", (0, 0)), whole[:, :4]))
    write(tmp_path, 1, (of("x", (0, 4)), whole[:3, 4:]))
    trace = Trace(tmp_path)
    got = trace.rectangle(of("x", (1, 2), (2, 4)))
    assert got is not None and np.array_equal(got[0], whole[1:3, 2:].numpy())
    assert trace.rectangle(of("x", (3, 2), (1, 4))) is None  # the last row of rank 1 is not there
    assert trace.rectangle(of("y", (0, 0), (1, 1))) is None


def test_no_more_than_one_tensor_is_in_memory(tmp_path: Path) -> None:
    count, size = 40, 100_000
    for folder in range(MOVES + 2):
        rng = torch.Generator().manual_seed(folder)
        for k in range(count):
            values = 1 + 1e-6 * torch.rand(size, generator=rng, dtype=torch.float64)
            write(tmp_path / str(folder), k, (of(f"x{k}", (0,), place=k), values))
    tracemalloc.start()
    here, there, *moves = (Trace(tmp_path / str(k)) for k in range(MOVES + 2))
    assert compare(here, there, moves).compared == count
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * (MOVES + 2) * size * 8 < count * size * 8


# -- the command


def test_the_command_reports_a_difference_as_json_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*MICRO, "--a", "parallel.tensor=2", "--b", "parallel.tensor=1", "--json"]
    assert diff.run(args) == 0
    clean = json.loads(capsys.readouterr().out)
    assert clean["first"] is None and clean["differing"] == 0 and clean["reference"] == "b"
    forward = RowLinear.forward
    monkeypatch.setattr(RowLinear, "forward", lambda self, *x: forward(self, *x) * (1 + 1e-6 * self.sequence.rank))
    assert diff.run(args) == 1
    first = json.loads(capsys.readouterr().out)["first"]
    assert (first["layer"], first["op"], first["a"]["rank"]) == (0, "row-parallel matmul", 1)
    assert first["a"]["microbatch"] == 0 and first["phase"] == "forward" and first["difference"] > first["allowed"]
    assert diff.run(args[:-1]) == 1
    text = capsys.readouterr().out
    assert "first difference: step 1, forward: activation layers.0.attention.out\n" in text
    assert all(len(line) <= 80 for line in text.splitlines()), text


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--a", "parallel.tensor=2", "--b", "parallel.tensor=2"], "cli.sides-are-equal"),
        (["--a", "parallel.tensor", "--b", "parallel.tensor=1"], "cli.not-a-setting"),
        (["--a", "train.seed=2", "--b", "train.seed=3"], "proof.not-comparable"),
        (["--a", "model.num_layers=2", "--b", "model.num_layers=4"], "proof.not-comparable"),
        (["--a", "parallel.tensor=2", "--steps", "0"], "cli.too-small"),
        (["--a", "parallel.tensor=2", "--step", "3"], "cli.without-effect"),
    ],
)
def test_wrong_options_are_reported(args: list[str], code: str) -> None:
    with raises(ConfigError, code):
        diff.run(["--model.preset", "micro", *args])


def test_a_folder_is_no_config_and_no_run(tmp_path: Path) -> None:
    with raises(ConfigError, "cli.not-a-config"):
        diff.run([str(tmp_path), "--a", "parallel.tensor=2"])
    with raises(CheckpointError, "proof.no-checkpoints"):
        diff.run([str(tmp_path), str(tmp_path)])
