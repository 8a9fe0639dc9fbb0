"""Derived values are computed once per start, and lists of names that several packages have are equal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from engine.checkpoint.tensorfile import DTYPES
from engine.cli.main import main
from engine.cli.schedule_pages import NAMES
from engine.config import derived
from engine.config.derived import derive, with_heads
from engine.config.dtypes import DTYPE_BYTES, MAIN_DTYPE, SAFETENSORS_DTYPES
from engine.config.load import load
from engine.config.schema import ModelConfig, ParallelConfig, TrainConfig
from engine.config.section import Section
from engine.data.samples.indexed_writer import IndexedWriter
from engine.distributed.context import ParallelContext
from engine.errors import ConfigError
from engine.ops.attention_cores import CORES
from engine.optim.precision import PRECISIONS
from engine.pipeline.schedules import SCHEDULES, build, load_plan
from engine.train.loop import train
from engine.util.signals import StopRequest
from tests.support.cases import MODEL, resolve
from tests.support.harness import run_ranks
from tests.support.paths import ROOT

TRAINING = (ROOT / "docs/training.md").read_text()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """List of the plan files that were read, in order."""
    found: list[Path] = []

    def note(path: Path) -> Any:
        found.append(path)
        return load_plan(path)

    monkeypatch.setattr(derived, "load_plan", note)
    return found


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    prefix = tmp_path / "noise"
    with IndexedWriter(prefix, vocab_size=MODEL["vocab_size"]) as writer:
        for _ in range(40):
            writer.add(np.arange(1, 50))
        writer.finish({})
    return str(prefix)


def test_a_plan_file_is_read_and_proven_once_a_start(tmp_path: Path, corpus: str, reads: list[Path]) -> None:
    file = tmp_path / "zb.plan"
    file.write_text(str(build("zb-v", 2, 2, 4)))
    values = {"parallel.pipeline": "2", "parallel.schedule": str(file), "train.global_batch_size": "4"}
    words = [word for key, value in values.items() for word in (f"--{key}", value)]
    with pytest.raises(SystemExit) as left:
        main(["train", "--model.preset", "tiny", *words, "--dry-run"])
    assert left.value.code == 0 and reads == [file]
    reads.clear()
    options = {key.replace(".", "_"): value for key, value in values.items()}
    resolved = resolve(2, **options, train_steps=1, data_train=corpus, run_dir=tmp_path / "run")
    assert reads == [file] and resolved.derived.first_plan == load_plan(file)

    def job(ctx: ParallelContext) -> tuple[int, int]:
        return train(resolved, ctx, StopRequest()), len(reads)

    assert run_ranks(resolved.derived.layout, job) == [(0, 1)] * 2


def test_a_plan_file_that_is_none_is_read_once_too(tmp_path: Path, reads: list[Path]) -> None:
    file = tmp_path / "torn.plan"
    file.write_text("rank 0: F0")
    with pytest.raises(ConfigError):
        load([], {"parallel.schedule": str(file)})
    assert reads == [file]


def test_heads_follow_from_the_other_values() -> None:
    shapes = {
        (0, 0): (8, 32),
        (2, 0): (2, 32),
        (0, 48): (8, 48),
        (4, 64): (4, 64),
    }
    for (kv_heads, head_dim), expected in shapes.items():
        model = with_heads(ModelConfig(hidden_size=256, num_heads=8, num_kv_heads=kv_heads, head_dim=head_dim))
        assert (model.num_kv_heads, model.head_dim) == expected


def test_layout_plan_and_stages_belong_together() -> None:
    resolved = resolve(8, parallel_pipeline=2, parallel_schedule="zb-v", train_global_batch_size=16)
    found = resolved.derived
    assert found == derive(resolved.config)
    assert (found.layout.world, found.layout.data, found.layout.tail) == (8, 4, 0)
    assert (found.first_plan.microbatches, found.first_plan.num_stages, found.layers) == (4, 4, (1, 1, 1, 1))


def choices(section: type[Section], name: str) -> set[str]:
    return set(get_args(section.model_fields[name].annotation))


def test_every_list_of_names_is_the_same_list() -> None:
    assert choices(TrainConfig, "precision") == PRECISIONS.keys() == DTYPE_BYTES.keys()
    assert {name: DTYPES[stored] for name, stored in SAFETENSORS_DTYPES.items()} == {
        name: precision.compute for name, precision in PRECISIONS.items()
    }
    for name, precision in PRECISIONS.items():
        assert (precision.compute.itemsize, precision.main) == (DTYPE_BYTES[name], PRECISIONS[MAIN_DTYPE[name]].compute)
    assert choices(TrainConfig, "attention") == {"auto", *CORES}
    listed = ", ".join(SCHEDULES)
    assert f": {listed}, or a file" in str(ParallelConfig.model_fields["schedule"].description)
    assert (*SCHEDULES, "searched") == NAMES
    assert {"auto", *CORES} - {"auto", "own", "sdpa"} <= set(re.findall(r"`([a-z0-9-]+)`", TRAINING))
