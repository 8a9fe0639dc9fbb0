"""What follows from a config's values, each fact worked out in one place; `Derived` holds those that a start needs.

`engine.config.load` makes it once and carries it along beside the config (`Resolved`). A plan file is read and proven
there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.schema import Config, ModelConfig, ParallelConfig
from engine.distributed.layout import Layout
from engine.errors import PlanError
from engine.pipeline.actions import Plan
from engine.pipeline.schedules import SCHEDULES, build, load_plan

BALANCED = "balanced"  # parallel.layers, before it is resolved


@dataclass(frozen=True)
class Derived:
    """Facts of a resolved config. plan: what each pipeline rank does in a step, with its number of micro-batches;
    layers: how many blocks each pipeline stage has, in order."""

    layout: Layout
    plan: Plan
    layers: tuple[int, ...]


def derive(config: Config, plan: Plan | None = None) -> Derived:
    """What follows from a resolved config. plan: of its plan file, where that has been read already.

    Raises PlanError when a plan file cannot be read or is none.
    """
    p = config.parallel
    if p.schedule in SCHEDULES:
        plan = build(p.schedule, p.pipeline, p.chunks, microbatches(config, p.data))
    elif plan is None:
        plan = load_plan(Path(p.schedule))
    layout = Layout(
        model_ranks(p) * p.data,
        tensor=p.tensor,
        pipeline=p.pipeline,
        data=p.data,
        context=p.context,
        sequence=p.sequence and p.tensor > 1,
        tail=plan.placement[-1],
    )
    return Derived(layout, plan, layers_per_stage(config))


def model_ranks(p: ParallelConfig) -> int:
    """Ranks that hold one copy of the model between them."""
    return p.tensor * p.pipeline * p.context


def data_degree(p: ParallelConfig, world: int) -> int:
    """Ranks that share the batch: as given, or all that the other degrees leave of `world`; at least 1."""
    return p.data or max(1, world // model_ranks(p))


def microbatches(config: Config, data: int) -> int:
    """Micro-batches that each of so many data ranks takes through its pipeline in an optimizer step."""
    return config.train.global_batch_size // (data * config.train.micro_batch_size)


def head_shape(facts: Mapping[str, Any]) -> dict[str, int]:
    """num_kv_heads and head_dim of a model, given by its values: what is 0 or missing follows from the others."""
    heads = facts["num_heads"]
    return {
        "num_kv_heads": facts.get("num_kv_heads") or heads,
        "head_dim": facts.get("head_dim") or facts["hidden_size"] // heads,
    }


def with_heads(model: ModelConfig) -> ModelConfig:
    """The same model with its `head_shape` filled in."""
    return model.model_copy(update=head_shape(model.model_dump()))


def read_plan(p: ParallelConfig) -> Plan | PlanError | None:
    """The proven plan of the file that parallel.schedule names, or why it is none; None where it names no file."""
    if p.schedule in SCHEDULES or not Path(p.schedule).is_file():
        return None
    try:
        return load_plan(Path(p.schedule))
    except PlanError as error:
        return error


def chunks_of(p: ParallelConfig, plan: Plan | None) -> int:
    """Pipeline stages on each rank: as given, or as the schedule or the plan of its file has it."""
    if p.chunks:
        return p.chunks
    return plan.num_stages // p.pipeline if plan is not None else SCHEDULES[p.schedule].chunks or 2


def layers_per_stage(config: Config) -> tuple[int, ...]:
    """How many blocks each pipeline stage of a resolved config has, in order."""
    p = config.parallel
    if p.layers:
        return tuple(int(count) for count in p.layers.split(","))
    stages = p.pipeline * p.chunks
    return (config.model.num_layers // stages,) * stages
