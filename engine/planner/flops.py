"""FLOPs of a training step, computed from the config."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config.derived import Derived
from engine.config.schema import Config, ModelConfig
from engine.model.build import declare, stage_shapes
from engine.model.declarations import ModelDeclaration, Workload
from engine.pipeline.actions import Plan


def flops_per_token(cfg: ModelConfig, seq_len: int) -> int:
    """Model FLOPs of forward and backward for one token, as the parts of the model declare them.

    6 per weight of a matmul, plus attention (engine.model.declarations). Recomputation is not counted.
    """
    return sum(part.flops for part in declare(cfg, Workload(seq_len=seq_len)).parts())


def stage_flops(cfg: ModelConfig, seq_len: int, layers: Sequence[int]) -> list[int]:
    """`flops_per_token` of each pipeline stage. layers: number of layers per stage; the last stage has the head."""
    return _stage_flops(declare(cfg, Workload(seq_len=seq_len)), layers)


def _stage_flops(declared: ModelDeclaration, layers: Sequence[int]) -> list[int]:
    return [sum(part.flops for part in shape.parts(declared)) for shape in stage_shapes(layers)]


def balanced_layers(cfg: ModelConfig, seq_len: int, stages: int) -> list[int]:
    """The number of layers of each stage that minimises the FLOPs of the heaviest stage, for a resolved model config.

    Where counts cannot be equal, earlier stages get fewer layers, because they hold activations of more micro-batches.
    """

    def split(last: int) -> list[int]:
        base, more = divmod(cfg.num_layers - last, stages - 1)
        return [base + (i >= stages - 1 - more) for i in range(stages - 1)] + [last]

    if stages == 1:
        return [cfg.num_layers]
    declared = declare(cfg, Workload(seq_len=seq_len))
    return min(map(split, range(cfg.num_layers, -1, -1)), key=lambda layers: max(_stage_flops(declared, layers)))


def uneven_pipeline(cfg: Config, derived: Derived) -> str:
    """A note for the user about an unbalanced pipeline: the load of the heaviest rank, and the layers that reduce it.

    For the longest sequences of the run (Phases.longest).
    Empty if `--parallel.layers balanced` would gain less than 5%. cfg has to be resolved.
    """
    seq_len = derived.phases.longest(cfg.train.steps)
    balanced = balanced_layers(cfg.model, seq_len, derived.first_plan.num_stages)
    now, best = (_heaviest(cfg, seq_len, derived.first_plan, layers) for layers in (derived.layers, balanced))
    if now < 1.05 * best:
        return ""
    better = f"--parallel.layers balanced ({','.join(map(str, balanced))}) makes it {best:.2f}"
    at = f" at {seq_len} tokens per sequence" if len(derived.phases.until(cfg.train.steps)) > 1 else ""
    return f"the heaviest pipeline rank computes {now:.2f} times the mean{at}; {better}"


def _heaviest(cfg: Config, seq_len: int, plan: Plan, layers: Sequence[int]) -> float:
    flops = stage_flops(cfg.model, seq_len, layers)
    ranks = [sum(flops[stage] for stage in plan.stages_of(rank)) for rank in range(plan.num_ranks)]
    return max(ranks) * len(ranks) / sum(ranks)
