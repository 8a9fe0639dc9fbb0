"""Checks between the values of a config for a given number of ranks. Each error says how to fix it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator

from engine.config.derived import BALANCED, NOT_BUILT, chunks_of, degrees_of, model_ranks, sample_degrees
from engine.config.model_checks import fp8_errors, model_errors, multiples_near, seq_len_errors
from engine.config.objective_table import OBJECTIVES
from engine.config.phase_checks import ordered_phases, phase_errors
from engine.config.schema import CheckpointConfig, Config
from engine.config.skips import read_ranges
from engine.distributed.layout import describe
from engine.errors import FieldError, PlanError
from engine.optim.groups import row_errors
from engine.pipeline.actions import Plan
from engine.pipeline.schedules import SCHEDULES


def config_errors(cfg: Config, world: int, plan: Plan | PlanError | None = None) -> list[FieldError]:
    """All errors between values of a config, for `world` ranks. plan: result of `read_plan`."""
    return [
        *model_errors(cfg),
        *_parallel_errors(cfg, world, plan),
        *_train_errors(cfg),
        *_checkpoint_errors(cfg.checkpoint),
        *_skip_errors(cfg),
        *_objective_errors(cfg),
        *row_errors(cfg.optimizer),
        *phase_errors(cfg, world, None if isinstance(plan, PlanError) else plan),
    ]


def _objective_errors(cfg: Config) -> Iterator[FieldError]:
    if (kind := cfg.objective.kind) not in OBJECTIVES:
        near = difflib.get_close_matches(kind, OBJECTIVES, n=1, cutoff=0.0)[0]
        problem = f"is not one of {', '.join(OBJECTIVES)}"
        yield FieldError("config.objective-unknown", "objective.kind", kind, problem, f"Did you mean {near}?")


def _skip_errors(cfg: Config) -> Iterator[FieldError]:
    for path, value in (("train.skip_steps", cfg.train.skip_steps), ("data.skip_samples", cfg.data.skip_samples)):
        try:
            read_ranges(value)
        except ValueError as error:
            yield FieldError(
                "config.ranges-not-valid",
                path,
                value,
                f"{error}",
                'Write numbers and ranges separated by spaces, such as "7 10-12".',
            )


def _parallel_errors(cfg: Config, world: int, plan: Plan | PlanError | None) -> Iterator[FieldError]:
    p = cfg.parallel
    for name, problem in NOT_BUILT.items():
        degree = getattr(p, name)
        if degree > 1:
            yield FieldError("config.not-built", f"parallel.{name}", degree, problem, "Use 1.")
    shards, degrees = model_ranks(p), degrees_of(p)
    wanted = shards * (p.data or 1)
    if p.data and wanted != world:
        yield FieldError(
            "config.world-does-not-fit",
            "parallel",
            describe(degrees),
            f"needs {wanted} processes, but there {'is 1' if world == 1 else f'are {world}'}",
            f"Start `torchrun --nproc-per-node {wanted} -m engine train ...`, or change the degrees.",
        )
    elif not p.data and world % shards:
        yield FieldError(
            "config.world-does-not-fit",
            "parallel",
            describe({axis: degree for axis, degree in degrees.items() if axis != "data"}),
            f"= {shards} does not divide the {world} processes",
            f"Start `torchrun --nproc-per-node {shards * -(-world // shards)} -m engine train ...`.",
        )
    yield from _schedule_errors(cfg, world, plan)


def _schedule_errors(cfg: Config, world: int, plan: Plan | PlanError | None) -> Iterator[FieldError]:
    p, m = cfg.parallel, cfg.model
    name = "parallel.schedule"
    if plan is None and p.schedule not in SCHEDULES:
        near = difflib.get_close_matches(p.schedule, SCHEDULES, n=1, cutoff=0.0)[0]
        known = ", ".join(SCHEDULES)
        yield FieldError(
            "config.unknown-choice", name, p.schedule, f"is neither one of {known} nor a file", f"Did you mean {near}?"
        )
        return
    if isinstance(plan, PlanError):
        yield FieldError(
            "config.plan-not-valid", name, p.schedule, str(plan), "Save it again with `engine schedule --save`."
        )
        return
    if plan is not None:
        wanted = ordered_phases(cfg).at(1).microbatches(math.prod(sample_degrees(p, world).values()))
        if (plan.num_ranks, plan.microbatches) != (p.pipeline, wanted):
            have = f"is a plan for {plan.num_ranks} ranks and {plan.microbatches} micro-batches"
            want = f"--ranks {p.pipeline} --microbatches {wanted}"
            yield FieldError(
                "config.plan-does-not-fit",
                name,
                p.schedule,
                have,
                f"This run needs `engine schedule ... {want} --save FILE`.",
            )
            return
    chunks = chunks_of(p, plan)
    fixed = SCHEDULES[p.schedule].chunks if plan is None else chunks
    if fixed is not None and chunks != fixed:
        yield FieldError(
            "config.chunks-do-not-fit",
            "parallel.chunks",
            chunks,
            f"does not fit {name} {p.schedule}, which places {fixed} on a rank",
            f"Use {fixed}, or {name} interleaved.",
        )
        return
    stages = p.pipeline * chunks
    if p.layers == BALANCED:
        return
    if p.layers:
        yield from _layer_list_errors(p.layers, stages, m.num_layers)
    elif m.num_layers % stages:
        fits = [d for d in range(1, m.num_layers + 1) if m.num_layers % (d * chunks) == 0]
        near_degree = f", or pipeline {min(fits, key=lambda d: (abs(d - p.pipeline), d))}" if fits else ""
        uneven = ",".join(str(m.num_layers // stages + (i < m.num_layers % stages)) for i in range(stages))
        yield FieldError(
            "config.layers-not-a-multiple",
            "parallel.pipeline",
            p.pipeline,
            (f"x {chunks} chunks = {stages} stages " if chunks > 1 else "")
            + f"does not divide model.num_layers = {m.num_layers}",
            f"Use {multiples_near(m.num_layers, stages)} layers{near_degree}, or parallel.layers {uneven}.",
        )


def _layer_list_errors(text: str, stages: int, num_layers: int) -> Iterator[FieldError]:
    counts = text.split(",")
    even = ",".join(str(num_layers // stages + (i < num_layers % stages)) for i in range(stages))
    if not all(count.isdecimal() for count in counts):
        fix = f"Give one for each stage, such as {even}, or {BALANCED}."
        yield FieldError("config.layers-not-a-list", "parallel.layers", text, "is not a list of numbers", fix)
    elif len(counts) != stages or sum(map(int, counts)) != num_layers:
        problem = f"has {sum(map(int, counts))} layers in {len(counts)} stages, not {num_layers} in {stages}"
        yield FieldError("config.layers-do-not-add-up", "parallel.layers", text, problem, f"Use for example {even}.")


def _train_errors(cfg: Config) -> Iterator[FieldError]:
    t, p = cfg.train, cfg.parallel
    if p.keep_gathered and not (p.sequence and p.tensor > 1):
        fix = "Leave it out, or use parallel.tensor 2 or more with parallel.sequence true."
        yield FieldError(
            "config.without-effect",
            "parallel.keep_gathered",
            True,
            "has no effect unless the sequence is sharded",
            fix,
        )
    if p.keep_gathered and t.recompute == "selective":
        problem = "saves the activations that train.recompute selective recomputes"
        yield FieldError(
            "config.settings-contradict", "parallel.keep_gathered", True, problem, "Remove one of the two."
        )
    if t.recompute == "none" and t.recompute_layers:
        fix = "Set train.recompute to selective or full."
        yield FieldError(
            "config.without-effect",
            "train.recompute_layers",
            t.recompute_layers,
            "has no effect without train.recompute",
            fix,
        )
    if t.precision == "fp64" and p.reduce_dtype == "bf16":
        yield FieldError(
            "config.settings-contradict",
            "parallel.reduce_dtype",
            "bf16",
            "would round the gradients of train.precision fp64",
            "Use main.",
        )
    if t.attention_dropout and t.attention not in ("auto", "own", "sdpa"):
        problem, fix = "cannot drop attention weights by place (train.attention_dropout)", "Use auto, own or sdpa."
        yield FieldError("config.settings-contradict", "train.attention", t.attention, problem, fix)
    yield from fp8_errors(cfg)
    yield from seq_len_errors(cfg)
    if math.log2(t.loss_scale) % 1:
        problem, near = "is not a power of two, so scaling would round", 2 ** round(math.log2(t.loss_scale))
        yield FieldError(
            "config.loss-scale-not-a-power-of-two", "train.loss_scale", t.loss_scale, problem, f"Nearest: {near}."
        )
    yield from _lr_schedule_errors(cfg)


def _lr_schedule_errors(cfg: Config) -> Iterator[FieldError]:
    t, s = cfg.train, cfg.lr_schedule
    horizon = s.horizon_steps or t.steps
    if s.horizon_steps and s.kind == "constant":
        yield FieldError(
            "config.without-effect",
            "lr_schedule.horizon_steps",
            horizon,
            "has no effect for lr_schedule.kind constant",
            "Leave it out.",
        )
    elif s.horizon_steps and horizon <= s.warmup_steps:
        problem = f"ends the decay before the warm-up of lr_schedule.warmup_steps = {s.warmup_steps} is over"
        yield FieldError(
            "config.decay-does-not-fit",
            "lr_schedule.horizon_steps",
            horizon,
            problem,
            f"Use for example {max(t.steps, 2 * s.warmup_steps)}.",
        )
    elif s.kind == "wsd" and not 0 < s.decay_steps <= horizon - s.warmup_steps:
        yield FieldError(
            "config.decay-does-not-fit",
            "lr_schedule.decay_steps",
            s.decay_steps,
            f"must be at least 1 and fit in the {horizon - s.warmup_steps} steps after the warm-up for wsd",
            f"A tenth of the run is usual: {max(1, horizon // 10)}.",
        )
    if s.kind != "wsd" and s.decay_steps:
        yield FieldError(
            "config.without-effect",
            "lr_schedule.decay_steps",
            s.decay_steps,
            f"has no effect for lr_schedule.kind {s.kind}",
            "Leave it out, or use wsd.",
        )


def _checkpoint_errors(c: CheckpointConfig) -> Iterator[FieldError]:
    if c.encrypt and not c.secret:
        yield FieldError(
            "config.setting-missing",
            "checkpoint.encrypt",
            True,
            "needs checkpoint.secret",
            "Set it, for example to file:/home/me/run.key.",
        )
    if c.secret and not c.secret.startswith(("file:", "env:")):
        problem, fix = "is neither file:PATH nor env:NAME", "Give where the secret is, never the secret itself."
        yield FieldError("config.secret-not-a-place", "checkpoint.secret", "...", problem, fix)
    if c.keep_every and not c.keep:
        yield FieldError(
            "config.setting-missing",
            "checkpoint.keep_every",
            c.keep_every,
            "checkpoint.keep is 0, so all are kept",
            "Set keep as well.",
        )
    if c.keep_every and c.every and c.keep_every % c.every:
        near = max(1, round(c.keep_every / c.every)) * c.every
        problem = f"is not a multiple of checkpoint.every {c.every}, so few such steps are saved"
        yield FieldError(
            "config.keep-every-not-a-multiple", "checkpoint.keep_every", c.keep_every, problem, f"Nearest: {near}."
        )
