"""Shrinking: the result is valid, has the same options, and what makes layouts hard is still there."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from engine.config.checks import config_errors
from engine.config.derived import NOT_BUILT, degrees_of, derive, layers_per_stage, read_plan
from engine.config.load import load
from engine.config.phases import phases_of
from engine.config.presets import PRESETS
from engine.config.schema import Config, fields
from engine.distributed.layout import AXES
from engine.model.build import num_parameters, parameter_specs
from engine.optim.groups import group_errors, group_of
from engine.pipeline.schedules import build
from engine.proof.shrink import Shrunk, shrink
from tests.support.drawn_configs import valid_configs

# sizes, and values that only a run in production needs; everything else stays as it is
SIZES = {
    *(f"parallel.{axis}" for axis in AXES),
    *(
        f"{table}.{name}"
        for table in ("train", "phase")
        for name in ("global_batch_size", "micro_batch_size", "seq_len")
    ),
    *(f"lr_schedule.{name}" for name in ("warmup_steps", "decay_steps", "horizon_steps")),
    "model.preset",
    "model.vocab_size",
    "model.hidden_size",
    "model.num_layers",
    "model.num_heads",
    "model.num_kv_heads",
    "model.head_dim",
    "model.ffn_size",
    "model.max_seq_len",
    "model.window",
    "model.window_layers",
    "model.rope_original_seq_len",
    "parallel.chunks",
    "parallel.layers",
    "parallel.bucket_mib",
    "parallel.timeout_s",
    "train.steps",
    "train.skip_steps",
    "train.recompute_layers",
    "train.precision",
    "train.device",
    "train.loss_scale",
    "phase.from_step",
    "phase.rope_original_seq_len",
    "optimizer.groups.names",
    "data.skip_samples",
    "eval.every",
    "eval.batches",
    "monitor.tensorboard",
    "monitor.timeline_step",
}


# numbers that are no sizes: they stay
KEPT = {"train.seed", "parallel.zero", "data.prefetch", *(f"parallel.{axis}" for axis in NOT_BUILT)}


def test_every_number_is_shrunk_or_kept() -> None:
    """A new setting: shrink it in engine/proof/shrink.py if it is a size, so that `engine prove` stays fast."""
    numbers = {f"{section}.{name}" for section, name, field in fields() if field.annotation is int}
    numbers -= {name for name in numbers if name.startswith(("checkpoint.", "monitor."))}  # no numbers of the model
    assert numbers - SIZES - KEPT == {"train.loss_scale_window"}  # of fp16 only


def flat(values: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> values, those of rows of a table together."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        here = f"{path}{name}"
        if isinstance(value, dict) and name != "weights":
            found |= flat(value, f"{here}.")
        elif isinstance(value, list | tuple):
            for row in value:
                for key, x in flat(row, f"{here}.").items():
                    found.setdefault(key, []).append(x)
        else:
            found[here] = value
    return found


def ranks(cfg: Config) -> int:
    return math.prod(degrees_of(cfg.parallel).values())


def check(cfg: Config, most: int) -> Shrunk:
    """Assert that the shrunk config is valid and has the options of `cfg`; returns it."""
    shrunk = shrink(cfg, most)
    small = shrunk.config
    assert not config_errors(small, ranks(small), read_plan(small.parallel)), cfg
    assert not list(group_errors(parameter_specs(small.model), small.optimizer))
    assert ranks(small) <= most and num_parameters(small.model) < 250_000
    derive(small)
    before, after = flat(cfg.model_dump()), flat(small.model_dump())
    noted = {note.partition(":")[0] for note in shrunk.notes}
    changed = {path for path in before if before[path] != after.get(path)} - SIZES
    if "phase" in noted:
        changed -= {path for path in changed if path.startswith("phase.")}
    assert changed <= noted, changed - noted
    return shrunk


@pytest.mark.parametrize(
    ("most", "count"), [(8, 12), (4, 12), *(pytest.param(n, 100, marks=pytest.mark.heavy) for n in (8, 4, 1))]
)
def test_drawn_configs_shrink(most: int, count: int) -> None:
    for resolved in valid_configs(most, count):
        cfg = resolved.config
        small = check(cfg, most).config
        old, new = cfg.parallel, small.parallel
        wide = [axis for axis, degree in degrees_of(old).items() if degree > 1]
        if 2 ** len(wide) <= most:
            assert all(getattr(new, axis) > 1 for axis in wide)
        if ranks(cfg) <= most:
            assert all(getattr(new, axis) == getattr(old, axis) for axis in AXES)
            shapes = [[min(1, count) for count in layers_per_stage(c)] for c in (cfg, small)]
            assert new.chunks != old.chunks or shapes[0] == shapes[1]
        assert (small.model.vocab_size % new.tensor == 0) == (cfg.model.vocab_size % old.tensor == 0) or new.tensor == 1
        assert (small.model.num_kv_heads == small.model.num_heads) == (cfg.model.num_kv_heads == cfg.model.num_heads)
        reached = phases_of(cfg).until(cfg.train.steps)
        phases = phases_of(small).until(small.train.steps)
        assert [phase.given for phase in phases] == [phase.given for phase in reached]
        for a, b in itertools.combinations(range(len(reached)), 2):
            for size in ("seq_len", "global_batch_size"):
                order = [getattr(run[a], size) < getattr(run[b], size) for run in (reached, phases)]
                assert order[0] == order[1], size
        rows = [{group_of(spec, c.optimizer).row for spec in parameter_specs(c.model)} for c in (cfg, small)]
        assert rows[0] == rows[1]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_shrink(preset: str) -> None:
    for degrees in ((1, 1, 1), (2, 2, 2), (4, 1, 2)):
        names = ("parallel.tensor", "parallel.pipeline", "parallel.data")
        values = dict(zip(names, map(str, degrees))) | {"model.preset": preset, "parallel.layers": "balanced"}
        shrunk = check(load([], values, world=None).config, 8)
        assert shrunk.notes == []


def shrunk(most: int = 8, **settings: Any) -> Shrunk:
    """The shrunk config of settings such as model__window=5."""
    return check(load([], {k.replace("__", "."): str(v) for k, v in settings.items()}, world=None).config, most)


def test_degrees_that_need_too_many_processes_are_shrunk_with_a_note() -> None:
    found = shrunk(
        model__preset="llama-2-7b",
        parallel__tensor=8,
        parallel__pipeline=4,
        parallel__data=16,
        train__global_batch_size=64,
    )
    p = found.config.parallel
    assert (p.tensor, p.pipeline, p.data) == (2, 2, 2)
    assert any("tensor 8 -> 2" in note and "512 ranks" in note for note in found.notes)


def test_shared_kv_heads_stay_shared() -> None:
    four = {"model__num_heads": 16, "model__num_kv_heads": 2, "parallel__tensor": 4}
    m = shrunk(**four).config.model
    assert m.num_kv_heads == 2 and m.num_heads % 4 == 0  # two tensor ranks share each


def test_options_that_float64_lacks_are_noted() -> None:
    options = {"train__precision": "bf16", "train__fp8": "rowwise", "train__compile": "true"}
    options |= {"parallel__reduce_dtype": "bf16", "train__attention": "flash", "train__seq_len": 64}
    found = shrunk(**options)
    names = {note.partition(":")[0] for note in found.notes}
    assert names == {"train.fp8", "train.compile", "parallel.reduce_dtype", "train.attention"}


def test_layers_with_their_own_settings_stay() -> None:
    groups = {"optimizer__groups__1__names": "layers.7.attention.*", "optimizer__groups__1__lr_factor": 0.5}
    groups |= {"optimizer__groups__2__names": "layers.1[0-9].* embed.weight", "optimizer__groups__2__frozen": "true"}
    found = shrunk(model__num_layers=16, model__window=100, model__window_layers="wwwf", **groups).config
    assert found.model.window_layers == "wf" and 3 <= found.model.num_layers <= 4
    first, second = (row.names.split() for row in found.optimizer.groups)
    assert len({name.split(".")[1] for name in first}) == 1 and "embed.weight" in second


def test_a_plan_file_stays_with_its_ranks_and_micro_batches(tmp_path: Path) -> None:
    file = tmp_path / "plan.txt"
    file.write_text(str(build("zb-v", 4, 2, 6)))
    values = {
        "parallel__pipeline": 4,
        "parallel__schedule": file,
        "model__num_layers": 8,
        "train__global_batch_size": 24,
    }
    found = shrunk(parallel__data=4, **values)
    assert found.config.parallel.schedule == str(file) and found.config.parallel.data == 2
    assert derive(found.config).first_plan.microbatches == 6
    found = shrunk(most=2, parallel__data=4, **values)
    assert found.config.parallel.schedule == "zb-v" and any("plan file" in note for note in found.notes)
