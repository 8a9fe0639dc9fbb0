"""Training state of one rank: its place in the mesh, stages, gradient buckets, optimizer, and progress counters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from engine.checkpoint.format import Ancestor
from engine.config.derived import Derived, derive
from engine.config.phases import Phase, Phases, Position, model_of
from engine.config.schema import Config
from engine.distributed.collectives import gather_json
from engine.distributed.context import ParallelContext
from engine.distributed.env import Env, pick_device
from engine.distributed.launch import Mesh
from engine.distributed.sharding import Parameter, initialise_, parameters, units
from engine.distributed.specs import ShardSpec, tensor_names
from engine.errors import ConfigError, FieldError
from engine.model.attention import attention_names
from engine.model.build import parameter_specs
from engine.model.layers import ModelPart
from engine.model.stages import build_stages
from engine.ops.draws import GENERATOR
from engine.ops.fp8 import check_device
from engine.ops.native import keep_freed_memory
from engine.optim.clip import NormCounter
from engine.optim.groups import group_errors, group_of
from engine.optim.optimizer import Optimizer
from engine.optim.precision import PRECISIONS, LossScale
from engine.parallel.gradients import GradBuckets, make_buckets, wait_before_use
from engine.pipeline.actions import Plan
from engine.pipeline.stage import Stage
from engine.train.objective import Objective, make_objective


@dataclass
class TrainState:
    """One rank's part of the training state. step: steps done.

    phases: with the position at which this start of the run began, so that `step` says what is consumed.
    order_begin: the sample at which epoch 0 of the current sample order began; above 0 if the order changed. stages:
    this rank's pipeline stages by number. specs: of all parameters of the model. params: parameters of this rank's
    stages, each once. initial_values: the generator of the initial weights, "" if they were loaded. before_update:
    returns when weights and moments may change (a background save may still be copying them).
    """

    cfg: Config
    ctx: ParallelContext
    derived: Derived
    phases: Phases
    stages: dict[int, Stage]
    specs: list[ShardSpec]
    params: list[Parameter]
    buckets: list[GradBuckets]
    optimizer: Optimizer
    norms: NormCounter
    scale: LossScale
    objective: Objective
    step: int = 0
    order_begin: int = 0
    lineage: tuple[Ancestor, ...] = ()
    initial_values: str = GENERATOR
    before_update: Callable[[], None] = lambda: None

    @property
    def phase(self) -> Phase:
        """The phase of the next step."""
        return self.phases.at(self.step + 1)

    def enter(self, phase: Phase) -> None:
        """Let the stages compute with the RoPE settings of a phase. ConfigError if a part cannot take them."""
        model = model_of(self.cfg.model, phase)
        for number, stage in self.stages.items():
            if isinstance(stage.part, ModelPart):
                stage.part.use(model)
            elif phase.rope:
                problem = f"the part of stage {number} takes no RoPE settings"
                fix = "Derive it from engine.model.layers.ModelPart, or leave RoPE out of the phases."
                raise ConfigError(
                    [FieldError("train.part-without-rope", f"phase.{phase.number}", phase.rope, problem, fix)]
                )

    @property
    def plan(self) -> Plan:
        """The plan of the next step."""
        return self.derived.plan_of(self.phase)

    @property
    def position(self) -> Position:
        """Steps done, and the samples and tokens that they consumed over all ranks since the start of the run."""
        return self.phases.consumed(self.step)

    def wait_for_weights(self) -> None:
        """Return when all weights of this rank are complete (ZeRO-1 may still all-gather them after a step)."""
        for stage in self.buckets:
            stage.wait_for_weights()


def mesh_of(cfg: Config, derived: Derived, env: Env) -> Mesh:
    """The mesh of a run, for `engine.launch`. ConfigError if it needs a GPU that is not there."""
    return Mesh(
        derived.layout,
        dtype=PRECISIONS[cfg.train.precision].compute,
        device=pick_device(cfg.train.device, env),
        timeout_s=cfg.parallel.timeout_s,
        transport=cfg.parallel.transport,
    )


def setup(cfg: Config, ctx: ParallelContext, derived: Derived | None = None) -> TrainState:
    """Build this rank's stages, buckets, optimizer and checked plan, with initial weights. Collective.

    cfg: resolved. derived: computed from cfg, to avoid computing it again.
    """
    keep_freed_memory()
    check_backends(cfg, ctx)
    specs = check_groups(cfg)
    derived = derived or derive(cfg)
    stages: dict[int, Stage] = {}
    params: list[Parameter] = []
    group = partial(group_of, cfg=cfg.optimizer)
    parts: list[ModelPart] = []
    for number, part, fresh in build_stages(cfg, ctx, derived):
        if not cfg.checkpoint.init:  # else `start_from` loads them
            initialise_(fresh, ctx, cfg.train.seed)
        own = {id(p) for p in fresh}
        for p in fresh:
            if group(p.spec).frozen:
                p.freeze()
        buckets = make_buckets(
            [[p for p in unit if id(p) in own] for unit in units(part)],
            ctx,
            grad_dtype=PRECISIONS[cfg.train.precision].main,
            bucket_bytes=int(cfg.parallel.bucket_mib * 2**20),
            overlap=cfg.parallel.overlap,
            zero=cfg.parallel.zero == 1,
            reduce_dtype=torch.bfloat16 if cfg.parallel.reduce_dtype == "bf16" else None,
            group_of=group,
        )
        stages[number] = Stage(part, parameters(part), buckets)
        params += fresh
        parts.append(part)
    all_buckets = [stage.buckets for stage in stages.values() if stage.buckets is not None]
    wait_before_use(parts, all_buckets)
    optimizer = Optimizer(all_buckets, cfg.optimizer, overlap=cfg.parallel.overlap_gather)
    norms = NormCounter(all_buckets, ctx, tensor_names(specs), PRECISIONS[cfg.train.precision].main)
    fp16 = cfg.train.precision == "fp16"
    scale = LossScale(cfg.train.loss_scale, cfg.train.loss_scale_window) if fp16 else LossScale()
    objective = make_objective(cfg.objective)
    return TrainState(
        cfg, ctx, derived, derived.phases, stages, specs, params, all_buckets, optimizer, norms, scale, objective
    )


def check_groups(cfg: Config) -> list[ShardSpec]:
    """Check optimizer.groups against the model; returns the specs of all its parameters. Raises ConfigError."""
    specs = parameter_specs(cfg.model)
    if errors := list(group_errors(specs, cfg.optimizer)):
        raise ConfigError(errors)
    return specs


def check_backends(cfg: Config, ctx: ParallelContext) -> None:
    """Check that this device supports train.attention and train.fp8, and that all ranks choose the same. Collective.

    ConfigError if it does not, or if ranks choose differently because one has a package that another lacks.
    """
    check_device(cfg.train.fp8, ctx.device)
    names = gather_json(" and ".join(attention_names(cfg, ctx)), ctx.world, ctx.device)
    if len(set(names)) > 1:
        found = ", ".join(f"{name} on rank {names.index(name)}" for name in dict.fromkeys(names))
        fix = f"Install the same packages on all hosts, or set train.attention {sorted(set(names))[0].split()[0]}."
        raise ConfigError(
            [
                FieldError(
                    "train.ranks-choose-differently",
                    "train.attention",
                    cfg.train.attention,
                    f"ranks choose differently: {found}",
                    fix,
                )
            ]
        )
