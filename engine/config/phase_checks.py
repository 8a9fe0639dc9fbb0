"""Checks of the [[phase]] tables: their order, and each phase against layout, plan and blend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from engine.config.derived import data_degree, with_heads
from engine.config.mixture import Mixture
from engine.config.model_checks import fp8_errors, multiples_near, position_errors, seq_len_errors
from engine.config.phases import ROPE, Phases, model_of, phases_of
from engine.config.schema import Config
from engine.errors import FieldError
from engine.pipeline.actions import Plan

_SIZES = ("global_batch_size", "micro_batch_size")


def phase_errors(cfg: Config, world: int, plan: Plan | None) -> Iterator[FieldError]:
    """Errors of the phases of a config for `world` ranks, [train] included. plan: of a plan file that fits step 1."""
    yield from _order_errors(cfg)
    phases = ordered_phases(cfg)
    yield from _batch_errors(phases, data_degree(cfg.parallel, world), plan)
    yield from _shape_errors(cfg, phases)
    yield from _rope_errors(cfg, phases)


def ordered_phases(cfg: Config) -> Phases:
    """The phases of a config; without its [[phase]] tables if these are not in order, which is a separate error."""
    return phases_of(cfg.model_copy(update={"phase": ()}) if any(_order_errors(cfg)) else cfg)


def _order_errors(cfg: Config) -> Iterator[FieldError]:
    before = 0
    for number, row in enumerate(cfg.phase, 1):
        path = f"phase.{number}.from_step"
        if row.from_step is None:
            fix = f"Give the first step of the phase, such as {before + 100}."
            yield FieldError("config.setting-missing", path, None, "is not given", fix)
        elif row.from_step <= before:
            problem, fix = f"is not after phase {number - 1}, which begins at step {before}", "Order phases by step."
            yield FieldError("config.phases-not-ascending", path, row.from_step, problem, fix)
        if all(value is None for name, value in row.model_dump().items() if name != "from_step"):
            problem = "gives only from_step"
            yield FieldError("config.without-effect", f"phase.{number}", row.from_step, problem, "Leave the phase out.")
        before = max(before, row.from_step or 0)


def _batch_errors(phases: Phases, data: int, plan: Plan | None) -> Iterator[FieldError]:
    """Errors of batch sizes that the data ranks, or the plan of a file, cannot split."""
    for phase in phases.phases:
        table = f"phase.{phase.number}" if phase.number else "train"
        sized = [name for name in _SIZES if name in phase.given or not phase.number]
        if not sized:
            continue
        path, value, slice_ = f"{table}.{sized[0]}", getattr(phase, sized[0]), data * phase.micro_batch_size
        if phase.global_batch_size % slice_:
            near = multiples_near(phase.global_batch_size, slice_)
            problem = f"is not a multiple of data {data} x {table}.micro_batch_size {phase.micro_batch_size}"
            if sized[0] != _SIZES[0]:
                problem = f"x data {data} = {slice_} does not divide the global batch of {phase.global_batch_size}"
            fix = f"Use {near}." if sized[0] == _SIZES[0] else f"Use {table}.{_SIZES[0]} {near}."
            yield FieldError("config.batch-not-a-multiple", path, value, problem, fix)
        elif plan is not None and phase.number and phase.microbatches(data) != plan.microbatches:
            problem = f"needs {phase.microbatches(data)} micro-batches; the plan file always has {plan.microbatches}"
            fix = "Keep global_batch_size / micro_batch_size, or name a schedule, which is built for each phase."
            yield FieldError("config.plan-does-not-fit", path, value, problem, fix)


def _shape_errors(cfg: Config, phases: Phases) -> Iterator[FieldError]:
    """Errors of the sequence lengths and micro-batches of phases with the model and the tensor ranks."""
    for phase in phases.phases:
        if phase.given & {"seq_len", "micro_batch_size"}:
            sizes = {"seq_len": phase.seq_len, "micro_batch_size": phase.micro_batch_size}
            here = cfg.model_copy(update={"train": cfg.train.model_copy(update=sizes)})
            lengths = seq_len_errors(here) if "seq_len" in phase.given else ()
            for error in (*lengths, *fp8_errors(here)):
                if error.path == "train.seq_len":
                    name = "seq_len" if "seq_len" in phase.given else "micro_batch_size"
                    yield replace(error, path=f"phase.{phase.number}.{name}", value=getattr(phase, name))


def _rope_errors(cfg: Config, phases: Phases) -> Iterator[FieldError]:
    """Errors of the RoPE settings of phases; those that the model has anyway are reported for the model."""
    known = list(position_errors(with_heads(cfg.model)))
    for phase in phases.phases:
        given = [name for name in ROPE if name in phase.given]
        if given and cfg.model.positions != "rope":
            problem, path = (
                "is for rotary positions, but model.positions is learned",
                f"phase.{phase.number}.{given[0]}",
            )
            yield FieldError("config.without-effect", path, phase.rope[given[0]], problem, "Leave it out.")
        elif given:
            for error in position_errors(with_heads(model_of(cfg.model, phase))):
                name = error.path.removeprefix("model.")
                if error not in known:
                    name = name if name in given else given[0]
                    yield replace(error, path=f"phase.{phase.number}.{name}", value=phase.rope[name])


def length_errors(cfg: Config, mixture: Mixture | None) -> Iterator[FieldError]:
    """Errors of sequence lengths of phases that the amounts of the blend do not allow."""
    for number, row in enumerate(cfg.phase, 1):
        if row.seq_len is not None and mixture is not None and mixture.kind != "weight":
            problem = f"changes the length of samples, but the sources of data.train have {mixture.kind}"
            fix = "Give the sources weights, which are shares of samples."
            yield FieldError("config.settings-contradict", f"phase.{number}.seq_len", row.seq_len, problem, fix)


def weight_errors(cfg: Config, mixture: Mixture | None) -> Iterator[FieldError]:
    """Errors of the weights of phases that do not fit the blend of data.train; None if that is not given."""
    weights: dict[str, float] = {}
    for number, row in enumerate(cfg.phase, 1):
        if row.weights is None:
            continue
        path = f"phase.{number}.weights"
        if mixture is None:
            fix = "Give a blend, such as 0.7 a/web 0.3 b/code."
            yield FieldError("config.setting-missing", path, row.weights, "needs a blend in data.train", fix)
            continue
        known = ", ".join(mixture.names[:20])
        unknown = [name for name in row.weights if name not in mixture.names]
        weights |= row.weights
        if len(mixture.names) == 1:
            problem = "needs a blend, but data.train has one corpus"
            yield FieldError("config.without-effect", path, row.weights, problem, "Leave it out.")
        elif mixture.kind != "weight":
            problem = f"changes weights, but the sources of data.train have {mixture.kind}"
            fix = "Give the sources weights, or leave it out."
            yield FieldError("config.settings-contradict", path, row.weights, problem, fix)
        elif unknown:
            problem = f"names {unknown[0]}, which is not a source of data.train"
            yield FieldError("config.mixture-unknown-source", path, row.weights, problem, f"Sources: {known}.")
        elif not any(mixture.with_weights(weights)):
            problem = "leaves no source with a weight above 0"
            yield FieldError("config.mixture-empty", path, row.weights, problem, "Give one a weight above 0.")
