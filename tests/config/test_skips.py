"""Skipped samples and steps: equal in every layout and to a run without them, and recorded in checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.checks import config_errors
from engine.config.schema import Config
from engine.config.skips import contains, format_ranges, ranges_below, read_ranges
from engine.data.samples.indexed_writer import IndexedWriter
from engine.data.samples.loader import Loader
from engine.data.samples.order import SampleOrder
from engine.data.samples.transforms import SkipSamples
from engine.distributed.context import ParallelContext
from engine.errors import EngineError
from engine.monitor.metrics import lacks_validation, read_metrics
from engine.train.loop import train
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import assemble, layout_of, max_relative_error, resolve, weights_of
from tests.support.harness import run_ranks
from tests.support.shares import share_of

BATCH = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = tmp_path_factory.mktemp("corpus") / "c"
    rng = np.random.default_rng(3)
    with IndexedWriter(prefix, 61) as writer:
        for _ in range(60):
            writer.add(rng.integers(0, 61, 40))
        writer.finish({})
    return str(prefix)


def test_ranges() -> None:
    assert read_ranges("") == () and read_ranges("7, 10-12 11-13\n14 3") == ((3, 3), (7, 7), (10, 14))
    ranges = read_ranges("3 7 10-14")
    assert [n for n in range(20) if contains(ranges, n)] == [3, 7, 10, 11, 12, 13, 14]
    assert (
        format_ranges(ranges) == "3 7 10-14"
        and ranges_below(ranges, 12) == "3 7 10-11"
        and ranges_below(ranges, 3) == ""
    )
    for wrong in ("x", "3-", "-3", "5-4", "1e3", "1--2"):
        with pytest.raises(ValueError, match=re.escape(repr(wrong))):
            read_ranges(wrong)
    cfg = resolve().config
    bad = cfg.model_copy(update={"train": cfg.train.model_copy(update={"skip_steps": "a"})})
    assert [fault.path for fault in config_errors(bad, 1)] == ["train.skip_steps"]


def loader_of(cfg: Config, ctx: ParallelContext, prefix: str, skip: str) -> Loader:
    from engine.data.samples.indexed import IndexedDataset

    order = SampleOrder(IndexedDataset(prefix, 61), cfg.train.seq_len, cfg.train.seed)
    transforms = (SkipSamples(read_ranges(skip)),)
    sizes = {"global_batch_size": BATCH, "micro_batch_size": cfg.train.micro_batch_size}
    return Loader(share_of(order, **sizes, data_rank=ctx.data.rank, data_size=ctx.data.size, transforms=transforms))


def test_left_out_samples_count_nothing_in_every_layout(corpus: str) -> None:
    """Equal to one process where torch computes the loss over the other samples only, one at a time."""
    skip, results = "1 4-5 9", []
    for degrees in ({}, {"parallel_data": 2}, {"parallel_tensor": 2, "parallel_pipeline": 2}):
        world = 4 if "parallel_tensor" in degrees else 2 if degrees else 1
        cfg = resolve(world, train_global_batch_size=BATCH, data_train=corpus, **degrees).config

        def job(ctx: ParallelContext, cfg: Config = cfg) -> tuple[list[float], list[Any]]:
            state = setup(cfg, ctx)
            with loader_of(cfg, ctx, corpus, skip) as loader:
                losses = [train_step(state, next(loader)).loss for _ in range(2)]
            return losses, weights_of(state)

        ranks = run_ranks(layout_of(cfg), job)
        results.append((ranks[0][0], assemble([held for _, held in ranks])))
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], abs=1e-11) and max_relative_error(weights, results[0][1]) < 1e-11

    cfg = resolve(1, train_global_batch_size=BATCH, data_train=corpus).config

    def oracle(ctx: ParallelContext) -> list[int]:
        whole, some = (next(loader_of(cfg, ctx, corpus, text)) for text in ("", skip))
        rows = [
            torch.cat([getattr(b, name) for b in batches])
            for name in ("tokens", "weights")
            for batches in (whole, some)
        ]
        kept = [k for k in range(BATCH) if k not in (1, 4, 5)]
        assert torch.equal(rows[0][kept], rows[1][kept]) and rows[3][kept].all() and rows[2].all()
        return [int(rows[3].sum()), int(rows[1][[1, 4, 5]].abs().sum())]

    assert run_ranks(layout_of(cfg), oracle)[0] == [5 * cfg.train.seq_len, 0]


def run(corpus: str, folder: Path, world: int = 1, **overrides: Any) -> list[Any]:
    """Train on one process or more, in float64; returns the result or exception of each rank."""
    resolved = resolve(
        world, data_train=corpus, train_global_batch_size=BATCH, run_dir=folder, monitor_tensorboard=False, **overrides
    )

    def job(ctx: ParallelContext) -> int | str:
        try:
            return train(resolved, ctx, False)  # type: ignore[arg-type]
        except EngineError as error:
            return str(error)

    return run_ranks(layout_of(resolved.config), job)


def test_a_left_out_step_consumes_its_batch_and_changes_nothing(corpus: str, tmp_path: Path) -> None:
    """On one and on two processes, with a restart in between; a changed past is an error, not silent."""
    options = {"train_skip_steps": "2 4", "checkpoint_every": 1, "lr_schedule_kind": "constant"}
    assert run(corpus, tmp_path / "one", train_steps=5, **options) == [0]
    assert run(corpus, tmp_path / "two", 2, parallel_data=2, train_steps=3, **options) == [0, 0]
    assert run(corpus, tmp_path / "two", train_steps=5, **options) == [0]
    (one, *_), (two, *_) = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert sorted(one) == sorted(two) == [1, 3, 5]
    assert [two[s]["loss"] for s in two] == pytest.approx([one[s]["loss"] for s in one], abs=1e-11)
    lines = [json.loads(line) for line in (tmp_path / "one/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "left_out" in line] == [2, 4]

    cfg = resolve(
        1, data_train=corpus, train_global_batch_size=BATCH, lr_schedule_kind="constant", train_steps=5
    ).config

    def by_hand(ctx: ParallelContext) -> list[float]:
        state, losses = setup(cfg, ctx), []
        with loader_of(cfg, ctx, corpus, "") as loader:
            for step in range(1, 6):
                batches = next(loader)
                if step in (2, 4):
                    state.step += 1
                else:
                    losses.append(train_step(state, batches).loss)
        return losses

    (losses,) = run_ranks(layout_of(cfg), by_hand)
    assert losses == pytest.approx([one[s]["loss"] for s in one], abs=1e-11)

    refused = run(corpus, tmp_path / "one", train_steps=6, lr_schedule_kind="constant", train_skip_steps="4 6")[0]
    assert "train.skip_steps: checkpoint '2 4', now '4'" in refused
    refused = run(corpus, tmp_path / "one", train_steps=6, **options, data_skip_samples="39 40")[0]
    assert "data.skip_samples: checkpoint '', now '39'" in refused
    future = {**options, "train_skip_steps": "2 4 7", "data_skip_samples": "41"}
    assert run(corpus, tmp_path / "one", train_steps=6, **future) == [0]  # what is still to come may change
    manifest = json.loads((tmp_path / "one/checkpoints/step_00000006/manifest.json").read_text())
    assert manifest["lineage"][-1]["changed"]["data.skip_samples"] == ["", "41"]
    assert manifest["config"]["train"]["skip_steps"] == "2 4 7"


def test_a_step_that_is_left_out_later_has_no_loss_and_is_validated(tmp_path: Path) -> None:
    """The metrics of a run that went back before a spike, and of one that was stopped before a validation."""

    def write(*records: dict[str, float]) -> None:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    first, second, left_out = {"step": 1, "loss": 2.0}, {"step": 2, "loss": 9e9}, {"step": 2, "left_out": 1.0}
    validated = {"step": 2, "val_loss": 2.0}
    write(first, second, validated, left_out)
    assert read_metrics(tmp_path)[0] == {1: first}
    assert lacks_validation(tmp_path, 2), "the validation was of the other step 2"
    write(first, left_out)
    assert lacks_validation(tmp_path, 1) and lacks_validation(tmp_path, 2)
    write(first, left_out, validated)
    assert not lacks_validation(tmp_path, 2) and not lacks_validation(tmp_path, 3)
