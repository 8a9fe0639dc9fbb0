"""Checks of the [[phase]] tables: their order, and each phase against layout, plan and blend."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from engine.config.derived import sample_degrees, with_heads
from engine.config.mixture import Mixture, too_small
from engine.config.model_checks import fp8_errors, multiples_near, position_errors, seq_len_errors
from engine.config.phases import ROPE, ROPE_SCALES, Phase, Phases, model_of, phases_of
from engine.config.schema import Config, ModelConfig
from engine.distributed.layout import describe
from engine.errors import FieldError
from engine.pipeline.actions import Plan

_SIZES = ("global_batch_size", "micro_batch_size")


def phase_errors(cfg: Config, world: int, plan: Plan | None) -> Iterator[FieldError]:
    """Errors of the phases of a config for `world` ranks, [train] included. plan: of a plan file that fits step 1."""
    yield from _order_errors(cfg)
    phases = ordered_phases(cfg)
    yield from _batch_errors(phases, sample_degrees(cfg.parallel, world), plan)
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


def _batch_errors(phases: Phases, degrees: Mapping[str, int], plan: Plan | None) -> Iterator[FieldError]:
    """Errors of batch sizes that the ranks of these axes of samples, or the plan of a file, cannot split.

    The first phase is checked, and each that changes a size; an error is at the row of the config that does so.
    """
    ranks, axes = math.prod(degrees.values()), describe(degrees)
    before, tables = None, dict.fromkeys(_SIZES, "train")  # tables: the row that gives each size
    for phase in phases.phases:
        given = [name for name in _SIZES if name in phase.given]
        tables |= dict.fromkeys(given, f"phase.{phase.number}")
        sizes = [getattr(phase, name) for name in _SIZES]
        if sizes == before:
            continue
        name, slice_, first = (given or _SIZES)[0], ranks * phase.micro_batch_size, before is None
        path, value, before = f"{tables[name]}.{name}", getattr(phase, name), sizes
        if phase.global_batch_size % slice_:
            near, of_micro = multiples_near(phase.global_batch_size, slice_), f"{tables[_SIZES[1]]}.{_SIZES[1]}"
            problem = f"is not a multiple of {axes} x {of_micro} {phase.micro_batch_size}"
            if name != _SIZES[0]:
                problem = f"x {axes} = {slice_} does not divide the global batch of {phase.global_batch_size}"
            fix = f"Use {near}." if name == _SIZES[0] else f"Use {tables[name]}.{_SIZES[0]} {near}."
            yield FieldError("config.batch-not-a-multiple", path, value, problem, fix)
        elif plan is not None and not first and phase.microbatches(ranks) != plan.microbatches:
            problem = f"needs {phase.microbatches(ranks)} micro-batches; the plan file always has {plan.microbatches}"
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
    """Errors of the RoPE settings of phases; those that the model, or a phase before, has anyway are not repeated."""
    known = list(position_errors(with_heads(cfg.model)))
    owners = dict.fromkeys(ROPE, "the model")
    before = None
    for phase in phases.phases:
        given, row = [name for name in ROPE if name in phase.given], f"phase.{phase.number}"
        owners |= dict.fromkeys(given, f"phase {phase.number}")
        if given and cfg.model.positions != "rope":
            problem, path = "is for rotary positions, but model.positions is learned", f"{row}.{given[0]}"
            yield FieldError("config.without-effect", path, phase.rope[given[0]], problem, "Leave it out.")
        elif given:
            if before is not None and _lacks_context(cfg, before, phase):
                problem = f"is not given, but {row} lengthens the sequences and scales RoPE from this length"
                fix = f"Give the length so far, such as {before.seq_len}."
                yield FieldError("config.setting-missing", f"{row}.rope_original_seq_len", None, problem, fix)
            found = list(position_errors(with_heads(model_of(cfg.model, phase))))
            for error in found:
                if error not in known:
                    yield from _of_phase(error, phase, given, owners)
            known += found
        before = phase


def _lacks_context(cfg: Config, before: Phase, phase: Phase) -> bool:
    """Whether a phase sets a scaling of a context whose length nothing says, and longer sequences."""
    scalings = ROPE_SCALES["rope_original_seq_len"]
    unknown = cfg.model.rope_scaling not in scalings and "rope_original_seq_len" not in phase.rope
    sets = "rope_scaling" in phase.given and phase.rope["rope_scaling"] in scalings
    return unknown and sets and phase.seq_len > before.seq_len


def _of_phase(error: FieldError, phase: Phase, given: Sequence[str], owners: Mapping[str, str]) -> Iterator[FieldError]:
    """An error of the model in a phase, for a value that the phase gives. owners: of each RoPE setting, as text."""
    name, row, problem = error.path.removeprefix("model."), f"phase.{phase.number}", error.problem.replace("model.", "")
    if name in given:
        yield replace(error, path=f"{row}.{name}", value=phase.rope[name], problem=problem)
        return
    if name == "rope_original_seq_len":  # nothing reads it, and no value of a phase takes it back
        return
    changed = "rope_scaling" if "rope_scaling" in given else given[0]
    fix = f"Give {row}.{name} = {ModelConfig.model_fields[name].default:g}."
    problem = f"does not fit {name} {error.value} of {owners[name]}, which {problem}"
    yield replace(error, path=f"{row}.{changed}", value=phase.rope[changed], problem=problem, fix=fix)


def length_errors(cfg: Config, mixture: Mixture | None) -> Iterator[FieldError]:
    """Errors of sequence lengths of phases that the amounts of the blend do not allow."""
    for number, row in enumerate(cfg.phase, 1):
        if row.seq_len is not None and mixture is not None and mixture.kind != "weight":
            problem = f"changes the length of samples, but the sources of data.train have {mixture.kind}"
            fix = "Give the sources weights, which are shares of samples."
            yield FieldError("config.settings-contradict", f"phase.{number}.seq_len", row.seq_len, problem, fix)


def weight_errors(cfg: Config, mixture: Mixture | None) -> Iterator[FieldError]:
    """Errors of the weights of data.train's blend, and of phases that do not fit it; None if it is not given."""
    if mixture is not None and mixture.kind == "weight":
        yield from too_small(mixture, mixture.amounts)
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
        else:
            yield from too_small(mixture, mixture.with_weights(weights), path)
