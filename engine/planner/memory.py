"""Memory of a training run, computed from the config."""

from __future__ import annotations

from engine.config.derived import Derived
from engine.config.dtypes import DTYPE_BYTES, MAIN_DTYPE
from engine.config.phases import Phase
from engine.config.schema import Config
from engine.distributed.layout import Layout, Splits
from engine.distributed.specs import ShardSpec
from engine.model.build import declare, stage_shapes
from engine.model.declarations import RecomputePolicy, Workload
from engine.optim.groups import ParameterGroup
from engine.pipeline.simulate import peak_memory

# train.precision -> the attention that the estimate assumes for train.attention auto: flash attention on GPUs, the
# custom kernel on CPUs; neither has a kernel for float64
_ATTENTION = {"bf16": "flash", "fp16": "flash", "fp32": "own", "fp64": "sdpa"}


def bytes_per_parameter(cfg: Config, replicas: int, group: ParameterGroup) -> float:
    """Bytes per local parameter of a group for its weight, gradient and optimizer state.

    The weight is in train.precision, its gradient in the main dtype. The states of its update rule and, if the two
    dtypes differ, the master weight are in the main dtype too; with parallel.zero they are sharded across the
    parameter's replicas (ShardSpec.replicas). A frozen parameter has only its weight.
    """
    compute, main = cfg.train.precision, MAIN_DTYPE[cfg.train.precision]
    if group.frozen:
        return DTYPE_BYTES[compute]
    state = DTYPE_BYTES[main] * (len(group.states) + (compute != main))
    return DTYPE_BYTES[compute] + DTYPE_BYTES[main] + state / (replicas if cfg.parallel.zero else 1)


def workload(cfg: Config, layout: Layout, phase: Phase) -> Workload:
    """The workload of a rank's part of a micro-batch in a phase of a resolved config."""
    dropout = cfg.train.attention_dropout > 0
    automatic = _ATTENTION[cfg.train.precision]
    if dropout and automatic != "own":
        automatic = "sdpa"
    return Workload(
        tensor=layout.tensor,
        sequence=layout.sequence,
        keep_gathered=cfg.parallel.keep_gathered,
        seq_len=phase.seq_len // layout.ways(Splits.POSITIONS),
        micro_batch_size=phase.micro_batch_size,
        element_bytes=DTYPE_BYTES[cfg.train.precision],
        documents=cfg.data.separate_documents,
        attention=automatic if cfg.train.attention == "auto" else cfg.train.attention,
        attention_dropout=dropout,
    )


def specs_per_rank(cfg: Config, derived: Derived) -> list[list[ShardSpec]]:
    """For each pipeline rank, the specs of the parameters of its stages; a tied matrix is held once."""
    declared = declare(cfg.model, Workload(derived.layout.tensor))
    shapes = stage_shapes(derived.layers)
    parts = [
        [p for stage in derived.first_plan.stages_of(rank) for p in shapes[stage].parts(declared)]
        for rank in range(derived.first_plan.num_ranks)
    ]
    return [list(dict.fromkeys(spec for part in held for spec in part.specs)) for held in parts]


def saved_bytes(cfg: Config, derived: Derived, phase: Phase) -> list[int]:
    """For each pipeline stage, the bytes of activations that it keeps for the backward of one micro-batch."""
    work = workload(cfg, derived.layout, phase)
    declared, policy = declare(cfg.model, work), RecomputePolicy.of(cfg)
    return [shape.saved_bytes(declared, policy, work.hidden(cfg.model)) for shape in stage_shapes(derived.layers)]


def activation_bytes(cfg: Config, derived: Derived) -> list[float]:
    """For each pipeline rank, the most bytes of saved activations alive at once in any step of the run.

    Not counted: what a single op needs while it runs, such as a chunk of logits.
    """
    phases = derived.phases.until(cfg.train.steps)
    peaks = (peak_memory(derived.plan_of(phase), saved_bytes(cfg, derived, phase)) for phase in phases)
    return [max(ranks) for ranks in zip(*peaks)]
