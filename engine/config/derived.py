"""Values that follow from a config, each computed in one place; `Derived` has those that a start needs.

`engine.config.load` computes it once and returns it with the config (`Resolved`). A plan file is read and checked only
there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.phases import Phase, Phases, phases_of
from engine.config.schema import Config, ModelConfig, ParallelConfig
from engine.distributed.layout import AXES, Layout, Splits, axes_that_split
from engine.errors import PlanError
from engine.pipeline.actions import Plan
from engine.pipeline.schedules import SCHEDULES, build, load_plan

BALANCED = "balanced"  # parallel.layers, before it is resolved
# Degrees that engine.config.checks rejects above 1, and why.
NOT_BUILT = {
    "context": "context parallelism is not built yet",
    "expert": "expert parallelism is not built yet",
}


@dataclass(frozen=True)
class Derived:
    """Values derived from a resolved config.

    plans: number of micro-batches -> checked actions of each pipeline rank in a step, for every phase. The
    placement of the stages is the same in all. layers: number of blocks of each pipeline stage, in order.
    """

    layout: Layout
    phases: Phases
    plans: Mapping[int, Plan]
    layers: tuple[int, ...]

    def plan_of(self, phase: Phase) -> Plan:
        """The plan of the steps of a phase."""
        return self.plans[phase.microbatches(self.layout.ways(Splits.SAMPLES))]

    @property
    def first_plan(self) -> Plan:
        """The plan of step 1, for what is the same in all: the ranks and the placement of the stages."""
        return self.plan_of(self.phases.at(1))


def derive(config: Config, plan: Plan | None = None, *, most: int = 0) -> Derived:
    """Compute the derived values of a resolved config. plan: of its plan file, if that was already read.

    most: for estimates, micro-batches of the plan of a schedule at most; 0: those of the run. Raises PlanError if the
    plan file cannot be read or is not a plan.
    """
    p, phases = config.parallel, phases_of(config)
    counts = {phase.microbatches(math.prod(sample_degrees(p).values())) for phase in phases.phases}
    if p.schedule in SCHEDULES:
        made = {count: min(count, most or count) for count in sorted(counts)}
        plans = {count: build(p.schedule, p.pipeline, p.chunks, few) for count, few in made.items()}
    else:
        plan = plan or load_plan(Path(p.schedule))
        plans = dict.fromkeys(counts, plan)
    layout = Layout(
        math.prod(degrees_of(p).values()),
        **degrees_of(p),
        sequence=p.sequence and p.tensor > 1,
        tail=next(iter(plans.values())).placement[-1],
    )
    return Derived(layout, phases, plans, layers_per_stage(config))


def degrees_of(p: ParallelConfig) -> dict[str, int]:
    """Axis of the grid -> its degree, in the order of the config. What is not built counts as 1: it is an error."""
    return {axis: 1 if axis in NOT_BUILT else getattr(p, axis) for axis in type(p).model_fields if axis in AXES}


def model_ranks(p: ParallelConfig) -> int:
    """Number of ranks for each data rank: the product of the other degrees."""
    return math.prod(degree for axis, degree in degrees_of(p).items() if axis != "data")


def position_ranks(p: ParallelConfig) -> int:
    """Number of ranks that split the positions of each sample."""
    return math.prod(degrees_of(p)[axis] for axis in axes_that_split(Splits.POSITIONS))


def sample_degrees(p: ParallelConfig, world: int = 1) -> dict[str, int]:
    """The degrees that split the samples of a global batch. world: number of ranks, if the data degree is 0."""
    degrees = degrees_of(p) | {"data": data_degree(p, world)}
    return {axis: degrees[axis] for axis in axes_that_split(Splits.SAMPLES)}


def data_degree(p: ParallelConfig, world: int) -> int:
    """Number of data ranks: as given, else `world` divided by the other degrees; at least 1."""
    return p.data or max(1, world // model_ranks(p))


def head_shape(fields: Mapping[str, Any]) -> dict[str, int]:
    """num_kv_heads and head_dim of a model; if 0 or missing they are derived from the other model fields."""
    heads = fields["num_heads"]
    return {
        "num_kv_heads": fields.get("num_kv_heads") or heads,
        "head_dim": fields.get("head_dim") or fields["hidden_size"] // heads,
    }


def with_heads(model: ModelConfig) -> ModelConfig:
    """The same model with its `head_shape` filled in."""
    return model.model_copy(update=head_shape(model.model_dump()))


def read_plan(p: ParallelConfig) -> Plan | PlanError | None:
    """The checked plan of the file that parallel.schedule names, or its error; None if it names no file."""
    if p.schedule in SCHEDULES or not Path(p.schedule).is_file():
        return None
    try:
        return load_plan(Path(p.schedule))
    except PlanError as error:
        return error


def chunks_of(p: ParallelConfig, plan: Plan | None) -> int:
    """Number of pipeline stages on each rank: as given, else as the schedule or the plan file defines."""
    if p.chunks:
        return p.chunks
    return plan.num_stages // p.pipeline if plan is not None else SCHEDULES[p.schedule].chunks or 2


def layers_per_stage(config: Config) -> tuple[int, ...]:
    """Number of blocks of each pipeline stage of a resolved config, in order."""
    p = config.parallel
    if p.layers:
        return tuple(int(count) for count in p.layers.split(","))
    stages = p.pipeline * p.chunks
    return (config.model.num_layers // stages,) * stages
