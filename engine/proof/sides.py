"""The two sides of a comparison: layouts of one config, shrunk, or two run folders at a step; and recording a side.

Both sides train the same steps from the same state on the same samples. What may differ is what must not change the
result: the layout, micro-batches, recomputation, attention kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.format import Manifest, find_checkpoint, read_manifest, step_dir, steps_descending
from engine.checkpoint.lineage import ORDER_BEGIN, flat_values
from engine.config.checks import config_errors
from engine.config.derived import degrees_of, derive
from engine.config.load import Resolved, load
from engine.config.phases import phases_of
from engine.config.schema import CheckpointConfig, Config
from engine.distributed.context import ParallelContext
from engine.distributed.layout import AXES, Layout
from engine.errors import CheckpointError, ConfigError, FieldError
from engine.ops.draws import Key, normal, rectangle
from engine.ops.fp8 import E4M3, E5M2
from engine.optim.precision import PRECISIONS
from engine.optim.update_rules import MODEL
from engine.proof.capture import Noise, finish_step, traced
from engine.proof.ranks import run
from engine.proof.shrink import shrink
from engine.proof.small_data import with_small_data
from engine.proof.traces import TraceWriter
from engine.train.run import open_run
from engine.train.state import TrainState
from engine.train.step import train_step

MOST_RANKS = 8
_TIMEOUT_S = 600.0
_REDRAWN = 0.1  # standard deviation of what is added to initial weights
# Settings that may differ: they change the order of sums, or nothing. A name without a dot: a whole section.
FREE: tuple[str, ...] = ("run", "parallel", "eval", "monitor", "model.preset", "data.prefetch")
FREE += ("train.micro_batch_size", "train.recompute", "train.recompute_layers", "train.attention", "train.compile")
FREE += ("train.device", *(f"checkpoint.{name}" for name in CheckpointConfig.model_fields if name != "init"))
_PATHS = ("data.train", "data.valid", "data.tokenizer", "checkpoint.init")  # of runs: their manifests are compared
_DEGREES = tuple(f"parallel.{axis}" for axis in AXES)
_OF_PHASES = ("micro_batch_size",)
_NOT_DATA = ("prefix", ORDER_BEGIN)


@dataclass(frozen=True)
class Side:
    """The run of one side. redrawn: add drawn values to its initial weights (`redraw_`)."""

    cfg: Config
    redrawn: bool = False

    @property
    def layout(self) -> str:
        """The degrees in words."""
        degrees = degrees_of(self.cfg.parallel)
        return ", ".join(f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1) or "one process"

    @property
    def ranks(self) -> int:
        return derive(self.cfg).layout.world


def described_sides(sides: Sequence[Side]) -> list[str]:
    """Each side in words: its degrees, and its settings that the other side does not have."""
    flat = [dict(flat_values({name: side.cfg.model_dump()[name] for name in ("parallel", "train")})) for side in sides]
    shown = []
    for side, mine, other in zip(sides, flat, reversed(flat)):
        more = [f"{path} {value}" for path, value in mine.items() if value != other.get(path) and path not in _DEGREES]
        shown.append("; ".join([side.layout, *filter(None, [", ".join(more)])]))
    return shown


# -- layouts of a config


def of_config(
    files: Sequence[Path], settings: Sequence[Mapping[str, str]], precision: str, folder: Path
) -> tuple[tuple[Side, Side], tuple[str, ...]]:
    """The sides of a config with two sets of settings, shrunk to at most MOST_RANKS ranks; and notes on that.

    precision: train.precision of both. folder: for their small corpora. Raises ConfigError if a config is not valid, or
    if they are not comparable.
    """
    a, b = (load(files, given, world=None, reject_idle=True).config for given in settings)
    if errors := list(incomparable(a, b)):
        raise ConfigError(errors)
    small = [shrink(cfg, MOST_RANKS) for cfg in (a, b)]
    notes = tuple(dict.fromkeys(note for each in small for note in each.notes))
    found = _alike([each.config for each in small])
    # in another process: training a tokenizer starts threads, whose locks the ranks would inherit
    ((data,),) = run(Layout(), lambda ctx: [with_small_data(found[0], folder).data.model_dump()], timeout_s=_TIMEOUT_S)
    return (_in_folder(found[0], a, data, precision), _in_folder(found[1], b, data, precision)), notes


def _in_folder(cfg: Config, given: Config, data: Mapping[str, Any], precision: str) -> Side:
    """The side of a shrunk config with its data. given: before it was shrunk, which makes it float64."""
    keep = precision == "bf16"
    values = cfg.model_dump() | {"data": {**data, "valid": ""}}
    values["train"] |= {"precision": precision, "fp8": given.train.fp8 if keep else "none"}
    values["parallel"] |= {"reduce_dtype": given.parallel.reduce_dtype if keep else "main"}
    values["checkpoint"] |= {"resume": "never"}
    return Side(Config.model_validate(values), redrawn=True)


def _alike(small: Sequence[Config]) -> list[Config]:
    """Both shrunk configs with the sizes of one of them. ConfigError if neither size fits both layouts."""
    problems: list[FieldError] = []
    for sizes in (*small, _with_batch(small)):
        tried = [_mixed(sizes, cfg) for cfg in small]
        errors = [error for cfg in tried for error in config_errors(cfg, derive_world(cfg), None)]
        if not errors:
            return tried
        problems = problems or errors
    raise ConfigError(problems)


def derive_world(cfg: Config) -> int:
    """Number of ranks of a resolved config."""
    return math.prod(degrees_of(cfg.parallel).values())


def _with_batch(small: Sequence[Config]) -> Config:
    """The first config with a global batch that the data ranks and micro-batches of all can divide."""
    slices = [cfg.parallel.data * cfg.train.micro_batch_size for cfg in small]
    batch = math.lcm(*slices, *(cfg.train.global_batch_size for cfg in small))
    return small[0].model_copy(update={"train": small[0].train.model_copy(update={"global_batch_size": batch})})


def _mixed(sizes: Config, layout: Config) -> Config:
    """The settings of `sizes`, but the FREE ones of `layout`."""
    values, free = sizes.model_dump(), layout.model_dump()
    for name in FREE:
        section, _, key = name.partition(".")
        if key:
            values[section][key] = free[section][key]
        else:
            values[section] = free[section]
    for row, other in zip(values["phase"], free["phase"]):
        row.update({name: other[name] for name in _OF_PHASES})
    return Config.model_validate(values)


def incomparable(a: Config, b: Config, free: Sequence[str] = FREE) -> Iterator[FieldError]:
    """An error for each setting that has to be equal and differs. free: those that may differ."""
    first, second = (dict(flat_values(cfg.model_dump())) for cfg in (a, b))
    for path in dict.fromkeys([*first, *second]):
        ignored = any(f"{path}.".startswith(f"{name}.") for name in free)
        if ignored or (path.startswith("phase.") and path.endswith(_OF_PHASES)):
            continue
        if (x := first.get(path)) != (y := second.get(path)):
            problem = f"on side b it is {y!r}: both sides have to train the same steps"
            yield FieldError("proof.not-comparable", path, x, problem, "Give both the same value.")


# -- runs


def of_runs(a: Path, b: Path, step: int | None) -> tuple[tuple[Side, Side], int]:
    """The sides of two run folders at a step, and the step; None: the newest that both have a checkpoint of.

    Both sides start from the checkpoint of `b`. Raises CheckpointError if one has no checkpoint of that step,
    ConfigError if they are not comparable.
    """
    steps = [steps_descending(folder / "checkpoints") for folder in (a, b)]
    common = [number for number in steps[0] if number in steps[1]]
    for folder, have in zip((a, b), steps):
        if not have:
            raise CheckpointError("proof.no-checkpoints", f"{folder} has no checkpoints: give a run folder that has")
        if step is not None and step not in have:
            text = f"{folder} has no checkpoint of step {step}, only of {_list(have)}: choose one with --step"
            raise CheckpointError("proof.no-such-step", text)
    if step is None:
        if not common:
            text = f"{a} has checkpoints of steps {_list(steps[0])}, {b} of {_list(steps[1])}: no step is in both"
            raise CheckpointError("proof.no-common-step", f"{text}; save both runs at the same steps")
        step = common[0]
    folders = [find_checkpoint(step_dir(folder / "checkpoints", step)) for folder in (a, b)]
    manifests = [read_manifest(folder) for folder in folders]
    configs = [Config.model_validate(manifest.config) for manifest in manifests]
    errors = [*incomparable(configs[0], configs[1], FREE + _PATHS), *_other_data(*manifests)]
    errors += [error for cfg in configs for error in _too_many_ranks(cfg)]
    if errors:
        raise ConfigError(errors)
    sides = [Side(_resuming(cfg, folders[1])) for cfg in configs]
    return (sides[0], sides[1]), step


def _list(steps: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(steps)))


def _too_many_ranks(cfg: Config) -> Iterator[FieldError]:
    if (world := derive_world(cfg)) > MOST_RANKS:
        fix = "Compare layouts of its config instead: engine diff CONFIG --a ... --b ..., which shrinks it."
        problem = f"has {world} ranks, more than the {MOST_RANKS} that are started here"
        yield FieldError("proof.too-many-ranks", "parallel", None, problem, fix)


def _other_data(a: Manifest, b: Manifest) -> Iterator[FieldError]:
    """An error for each field in which the training data of two checkpoints differ."""
    for name in dict.fromkeys([*a.data, *b.data]):
        if name not in _NOT_DATA and a.data.get(name) != b.data.get(name):
            problem = f"on side b it is {b.data.get(name)!r}: the runs read other samples"
            yield FieldError(
                "proof.other-data", f"data.{name}", a.data.get(name), problem, "Compare runs of one corpus."
            )


def _resuming(cfg: Config, checkpoint: Path) -> Config:
    """The config of a run, for a side that resumes from a checkpoint and writes nothing."""
    start = cfg.checkpoint.model_copy(update={"resume": str(checkpoint.absolute()), "init": ""})
    data = cfg.data.model_copy(update={"valid": ""})
    train = cfg.train.model_copy(update={"device": "cpu"})
    return cfg.model_copy(update={"checkpoint": start, "data": data, "train": train})


# -- recording


def noise_of(configs: Sequence[Config], move: int) -> Noise:
    """The noise of a move for tensors that either config computes. configs: of the same model and precision."""
    cfg = configs[0]
    dtypes = PRECISIONS[cfg.train.precision]
    phase = phases_of(cfg).phases[0]
    terms = max(cfg.model.hidden_size, cfg.model.ffn_size, cfg.model.vocab_size, phase.tokens)
    stored = torch.finfo(dtypes.main).eps * math.sqrt(terms)
    unit = max(torch.finfo(dtypes.compute).eps, stored)
    backward = unit
    if cfg.train.fp8 != "none":
        unit, backward = torch.finfo(E4M3).eps, torch.finfo(E5M2).eps
    reduced = backward
    if any(c.parallel.reduce_dtype == "bf16" for c in configs):
        reduced = max(backward, torch.finfo(torch.bfloat16).eps)
    return Noise(move, unit, backward, reduced, stored)


@torch.no_grad()
def redraw_(state: TrainState) -> None:
    """Add drawn values to all weights: a bias of zero that is added twice, or a norm of ones, would hide a fault."""
    for shard in state.optimizer.states():
        if shard.kind != MODEL:
            continue
        for piece in shard.param.spec.pieces(state.ctx):
            key = Key.of(state.cfg.train.seed, "proof weights", name=piece.name)
            for offset, shape, first in piece.rectangles(shard.begin, shard.begin + len(shard.flat)):
                drawn = normal(key, rectangle(piece.global_shape, offset, shape, state.ctx.device)).flatten()
                shard.flat[first - shard.begin :][: len(drawn)] += _REDRAWN * drawn
    state.optimizer.masters_to_weights()


def record(side: Side, folder: Path, noises: Sequence[Noise], steps: int) -> None:
    """Run a side on the ranks of its layout, once for each noise, and write the traces to folder/0, folder/1, ..."""
    resolved = Resolved(side.cfg, {}, derive(side.cfg))

    def job(ctx: ParallelContext) -> None:
        for number, noise in enumerate(noises):
            with TraceWriter(folder / str(number), ctx.rank) as writer, open_run(resolved, ctx) as opened:
                if side.redrawn:
                    redraw_(opened.state)
                with traced(opened.state, writer, noise) as tracer:
                    for _ in range(steps):
                        finish_step(tracer, train_step(opened.state, next(opened.loader)))

    dtype = PRECISIONS[side.cfg.train.precision].compute
    run(resolved.derived.layout, job, dtype, side.cfg.parallel.transport, timeout_s=_TIMEOUT_S)
