"""What a parallel axis touches: context parallelism as a patch of this file, and axes of the other kinds.

`layout.AXES` says what an axis splits, and everything except the layer that uses it follows. The patch switches the
degree on and gives attention a core that gathers keys and values. It equals one process, with every other axis.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batch import Documents, MicroBatch, Sequence
from engine.config.derived import NOT_BUILT, derive
from engine.config.schema import Config, LayerConfig
from engine.data.samples.indexed_writer import IndexedWriter
from engine.distributed.collectives import all_gather, reduce_scatter_start
from engine.distributed.context import Axis, ParallelContext
from engine.distributed.layout import AXES, Layout, Splits, describe
from engine.errors import ConfigError
from engine.model.attention import Attention
from engine.model.build import MIXERS
from engine.model.layers import Build
from engine.planner.memory import workload
from engine.train.run import open_run
from engine.train.state import TrainState, setup
from engine.train.step import train_step
from tests.support.cases import assemble, config, gradients_of, layout_of, max_relative_error, random_batches, resolve
from tests.support.errors import raises
from tests.support.harness import run_ranks
from tests.support.paths import ROOT


class GatherKeys(torch.autograd.Function):
    """[b, m, s / c, d] -> [b, m, s, d], the parts of all ranks of the axis; the backward sums and scatters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis, dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_start(grad.movedim(2, 0).contiguous(), ctx.axis).wait().movedim(0, 2), None


class ContextAttention(Attention):
    """Attention of this rank's queries to the keys of all ranks up to its last position."""

    def __init__(self, layer: LayerConfig, build: Build, name: str):
        super().__init__(layer, build, name)
        local, axis = self.attend, build.ctx.positions

        def attend(q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor:
            keys, values = (GatherKeys.apply(x, axis)[:, :, : sequence.first + q.shape[2]] for x in (k, v))
            return local(q, keys, values, sequence)

        self.attend = attend  # type: ignore[assignment]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Allows parallel.context above 1."""
    monkeypatch.delitem(NOT_BUILT, "context")
    yield


@pytest.fixture
def context(built: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The patch: the degree is allowed, and attention gathers keys and values."""
    attention = replace(MIXERS["attention"], module=f"{__name__}:ContextAttention")
    monkeypatch.setitem(MIXERS, "attention", attention)
    yield


def batches_of(cfg: Config, ctx: ParallelContext, step: int) -> list[MicroBatch]:
    """Batches of this rank's samples; with document masking, documents of random lengths."""
    batches = random_batches(cfg, ctx, step)
    if cfg.data.separate_documents:
        split = [Documents.from_eod(b.tokens % 7, 0) for b in batches]
        batches = [replace(b, sequence=replace(b.sequence, documents=d)) for b, d in zip(batches, split)]
    return batches


def results(world: int, **options: Any) -> dict[str, Any]:
    """Two steps: losses, named sums, gradient norms, counted tokens, losses by source; gradients of the first."""
    cfg = config(world, **options)

    def step(state: TrainState, number: int) -> list[float]:
        batches = [replace(b, sources=b.samples % 2) for b in batches_of(cfg, state.ctx, number)]
        done = train_step(state, batches, num_sources=2)
        return [done.loss, done.sums["z_loss"], done.norms.norm, done.tokens, done.by_source[0], done.by_source[1]]

    def job(ctx: ParallelContext) -> tuple[list[float], list[Any]]:
        state = setup(cfg, ctx)
        numbers, grads = step(state, 0), gradients_of(state)
        return numbers + step(state, 1), grads

    ranks = run_ranks(layout_of(cfg), job)
    for numbers, _ in ranks:
        assert numbers == ranks[0][0]
    return {"numbers": ranks[0][0], "grads": assemble([grads for _, grads in ranks])}


def equals_one_process(options: dict[str, Any], **degrees: int) -> None:
    parallel = {f"parallel_{axis}": degree for axis, degree in degrees.items()}
    many, one = results(math.prod(degrees.values()), **options, **parallel), results(1, **options)
    assert many["numbers"] == pytest.approx(one["numbers"], rel=1e-11)
    assert max_relative_error(many["grads"], one["grads"]) < 1e-11


LEAN = {"model_num_layers": 2, "train_z_loss": 0.1}
RICH = LEAN | {
    "data_separate_documents": True,
    "model_window": 5,
    "train_dropout": 0.2,
    "train_attention_dropout": 0.2,
    "train_recompute": "selective",
}


@pytest.mark.usefixtures("context")
@pytest.mark.parametrize(
    "degrees",
    [{"context": 2}, {"context": 4}, {"context": 2, "tensor": 2}, {"context": 2, "data": 2}],
    ids=lambda degrees: describe(degrees),
)
def test_context_parallelism_equals_one_process(degrees: dict[str, int]) -> None:
    equals_one_process(LEAN, **degrees)


@pytest.mark.usefixtures("context")
def test_documents_windows_dropout_and_recomputation_over_a_split_sequence() -> None:
    equals_one_process(RICH, context=2, pipeline=2)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("splits", [Splits.SAMPLES, Splits.WEIGHTS])
def test_an_axis_of_another_kind_equals_one_process(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second axis of samples, as expert parallelism has; and one over which everything is replicated."""
    monkeypatch.setitem(AXES, "context", splits)
    equals_one_process(LEAN, context=2, data=2)


@pytest.mark.usefixtures("context")
@pytest.mark.parametrize("splits", [Splits.POSITIONS, Splits.SAMPLES])
def test_a_run_reads_and_validates_over_an_axis(
    splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader of a run and the evaluator share the samples, or each sample, as one process reads them."""
    monkeypatch.setitem(AXES, "context", splits)
    rng = np.random.default_rng(3)
    with IndexedWriter(tmp_path / "corpus", vocab_size=61) as writer:
        for length in rng.integers(1, 40, 9):
            writer.add(rng.integers(0, 61, length))
        writer.finish({})
    corpus = str(tmp_path / "corpus")
    options = LEAN | {"data_train": corpus, "data_valid": corpus, "run_dir": str(tmp_path / "run")}

    def run(world: int) -> list[float]:
        resolved = resolve(world, **options, parallel_context=world)

        def job(ctx: ParallelContext) -> list[float]:
            with open_run(resolved, ctx) as run:
                done = train_step(run.state, next(run.loader))
                assert run.evaluator is not None
                score = run.evaluator.run(0)
            return [done.loss, done.tokens, done.norms.norm, score.loss, score.tokens, score.sums["z_loss"]]

        ranks = run_ranks(layout_of(resolved.config), job)
        assert all(rank == ranks[0] for rank in ranks)
        return ranks[0]

    assert run(2) == pytest.approx(run(1), rel=1e-11)


@pytest.mark.usefixtures("built")
def test_what_follows_from_the_kind_of_an_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(4, parallel_context=2, parallel_tensor=2)
    derived = derive(cfg)
    assert workload(cfg, derived.layout, derived.phases.at(1)).local_tokens == 4  # of 16
    assert describe(derived.layout.degrees) == "tensor 2 x pipeline 1 x data 1 x context 2"
    assert derived.first_plan.microbatches == 4
    views = Layout(8, tensor=2, data=2, context=2).axes(0)
    kinds = ("samples", "positions", "same_tokens", "data_context")
    assert [views[name] for name in kinds] == [(0, 4), (0, 2), (0, 1), (0, 2, 4, 6)]
    with raises(ConfigError, "config.seq-len-not-a-multiple", 18, "16 or 20"):
        config(4, parallel_context=4, train_seq_len=18)
    monkeypatch.setitem(AXES, "context", Splits.SAMPLES)
    derived = derive(cfg)
    assert workload(cfg, derived.layout, derived.phases.at(1)).local_tokens == 8
    assert derived.first_plan.microbatches == 2
    with raises(ConfigError, "config.batch-not-a-multiple", "data 1 x context 4"):
        config(4, parallel_context=4, train_global_batch_size=6)


# What names the axis of context parallelism. A patch that builds it changes these and the layer, attention.
FILES = {"config/derived.py", "config/peers.py", "config/schema.py", "distributed/context.py", "distributed/layout.py"}


def test_a_parallel_axis_is_named_in_at_most_six_files() -> None:
    named = re.compile(r"\b(ctx|layout|parallel|p)\.context\b|\"context\"|^    context: (int|Axis)", re.MULTILINE)
    engine = ROOT / "engine"
    found = {str(path.relative_to(engine)) for path in engine.rglob("*.py") if named.search(path.read_text())}
    assert found == FILES and len(found) <= 6


def test_samples_and_positions_are_read_by_kind_not_by_axis() -> None:
    """No module of the engine asks for the data axis where it reads, counts or sums."""
    named = re.compile(r"\b(ctx|self\.ctx|state\.ctx|layout)\.(data|context)\b")
    engine = ROOT / "engine"
    allowed = {engine / "distributed" / "layout.py"}
    assert [path for path in engine.rglob("*.py") if path not in allowed and named.search(path.read_text())] == []
