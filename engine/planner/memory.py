"""What a rank holds during a training run, computed from the config: its state, and its stages with their activations.

State: weights and gradients in flat buckets, master weights and optimizer state; counted from the partition that the
gradient buckets are made from. Activations: from the declarations of the model's parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from engine.config.derived import Derived
from engine.config.dtypes import DTYPE_BYTES, MAIN_DTYPE
from engine.config.phases import Phase
from engine.config.schema import Config
from engine.distributed.layout import Layout, Splits
from engine.distributed.specs import ShardSpec
from engine.model.build import declare, stage_shapes
from engine.model.declarations import Declaration, RecomputePolicy, WorkingMemory, Workload
from engine.optim.groups import ParameterGroup, group_of
from engine.parallel.partition import BucketPlan, Partition


def on_cpu(cfg: Config) -> bool:
    """Whether the estimate is for a CPU: by train.device, or if that is auto, for precisions that a GPU is not for."""
    return cfg.train.device == "cpu" or (cfg.train.device == "auto" and cfg.train.precision in ("fp32", "fp64"))


def attention_of(cfg: Config) -> str:
    """The attention implementation that the estimate assumes: train.attention, or what auto chooses on such a device.

    Flash attention on GPUs, the custom kernel on CPUs; neither has a kernel for every precision.
    """
    if cfg.train.attention != "auto":
        return cfg.train.attention
    if on_cpu(cfg):
        return "own" if cfg.train.precision == "fp32" else "sdpa"
    return "flash" if cfg.train.precision in ("bf16", "fp16") and not cfg.train.attention_dropout else "sdpa"


def workload(cfg: Config, layout: Layout, phase: Phase) -> Workload:
    """The workload of a rank's part of a micro-batch in a phase of a resolved config."""
    return Workload(
        tensor=layout.tensor,
        sequence=layout.sequence,
        keep_gathered=cfg.parallel.keep_gathered,
        seq_len=phase.seq_len // layout.ways(Splits.POSITIONS),
        micro_batch_size=phase.micro_batch_size,
        element_bytes=DTYPE_BYTES[cfg.train.precision],
        documents=cfg.data.separate_documents,
        attention=attention_of(cfg),
        attention_dropout=cfg.train.attention_dropout > 0,
        cpu=on_cpu(cfg),
    )


@dataclass(frozen=True)
class StageState:
    """The parameters of a stage on one rank, as buckets. unit_of: for each bucket, the part of the stage it belongs to.

    frozen: parameters that are in no bucket. late: see BucketPlan.
    """

    buckets: list[BucketPlan[ShardSpec]]
    unit_of: list[int]
    frozen: list[ShardSpec]


@dataclass(frozen=True)
class RankState:
    """The state of a pipeline rank: of the data rank that owns most. stages: by stage number."""

    cfg: Config
    stages: dict[int, StageState]

    @property
    def buckets(self) -> list[BucketPlan[ShardSpec]]:
        """The buckets of all stages."""
        return [bucket for stage in self.stages.values() for bucket in stage.buckets]

    @property
    def specs(self) -> list[ShardSpec]:
        """The specs of all parameters of the rank, each once."""
        return [
            s for stage in self.stages.values() for s in (*(p for b in stage.buckets for p in b.params), *stage.frozen)
        ]

    @cached_property
    def elements(self) -> int:
        """Elements in buckets, with padding."""
        return sum(bucket.elements for bucket in self.buckets)

    @cached_property
    def frozen(self) -> int:
        """Elements of frozen parameters."""
        return sum(math.prod(s.local_shape()) for stage in self.stages.values() for s in stage.frozen)

    def states(self, *, owned: bool) -> dict[str, int]:
        """Elements of master weights and of each kind of optimizer state on the replica with the most.

        owned: those that it writes to checkpoints; else those that it stores.
        """
        found: list[dict[str, int]] = []
        replicas = max((len(b.shares) for b in self.buckets), default=1)
        same = len({group_of(s, self.cfg.optimizer).states for s in self.specs}) == 1
        for replica in range(1 if same and all(b.even for b in self.buckets) else replicas):
            kinds: dict[str, int] = {}
            for bucket in self.buckets:
                sharded = owned or bool(self.cfg.parallel.zero)
                span = bucket.shares[replica % len(bucket.shares)] if sharded else range(bucket.elements)
                for group, length in _spans(bucket, span, partial(group_of, cfg=self.cfg.optimizer)):
                    for kind in ("master", *group.states):
                        kinds[kind] = kinds.get(kind, 0) + length
            found.append(kinds)
        return max(found, key=lambda kinds: sum(kinds.values()))

    def reduction_bytes(self, stage: int) -> list[int]:
        """For each bucket of a stage, the bytes of new tensors that live from the start of its reduction to its end."""
        main = DTYPE_BYTES[MAIN_DTYPE[self.cfg.train.precision]]
        low, found = self.cfg.parallel.reduce_dtype == "bf16", []
        for bucket in self.stages[stage].buckets:
            ranks = len(bucket.shares)
            copy = bucket.elements * 2 if low and main != 2 else 0
            scattered = bucket.elements // ranks * (2 if low else main) if self.cfg.parallel.zero and bucket.even else 0
            found.append(copy + scattered if ranks > 1 else 0)
        return found


def _spans(
    bucket: BucketPlan[ShardSpec], span: range, group_of: Callable[[ShardSpec], ParameterGroup]
) -> list[tuple[ParameterGroup, int]]:
    """(group, elements) of the parameters of a bucket inside a range of it; padding belongs to the one before it."""
    ends = [*bucket.starts[1:], bucket.elements]
    pairs = zip(bucket.params, bucket.starts, ends)
    found = [(group_of(spec), min(end, span.stop) - max(start, span.start)) for spec, start, end in pairs]
    return [(group, length) for group, length in found if length > 0]


def rank_states(cfg: Config, derived: Derived) -> list[RankState]:
    """For each pipeline rank, its state; a tied matrix is held once, with the first stage that uses it."""
    declared = declare(cfg.model, Workload(derived.layout.tensor))
    shapes, layout, found = stage_shapes(derived.layers), derived.layout, []
    main = DTYPE_BYTES[MAIN_DTYPE[cfg.train.precision]]
    elements = int(cfg.parallel.bucket_mib * 2**20) // main
    for rank in range(derived.first_plan.num_ranks):
        stages, held = {}, set[ShardSpec]()
        sizes = {name: len(ranks) for name, ranks in layout.axes(layout.rank({"pipeline": rank})).items()}
        for stage in derived.first_plan.stages_of(rank):
            units = [_own(part, held) for part in shapes[stage].parts(declared)]
            frozen = [spec for unit in units for spec in unit if group_of(spec, cfg.optimizer).frozen]
            trained = [[spec for spec in unit if spec not in frozen] for unit in units]
            divide = Partition[ShardSpec](
                lambda s: s, sizes.__getitem__, elements, partial(group_of, cfg=cfg.optimizer)
            )
            buckets = divide(trained)
            unit_of = [next(i for i, unit in enumerate(trained) if bucket.params[0] in unit) for bucket in buckets]
            stages[stage] = StageState(buckets, unit_of, frozen)
        found.append(RankState(cfg, stages))
    return found


def _own(part: Declaration, held: set[ShardSpec]) -> list[ShardSpec]:
    """The specs of a part that no earlier part of the rank holds; they are added to `held`."""
    specs = [spec for spec in part.specs if spec not in held]
    held.update(specs)
    return specs


@dataclass(frozen=True)
class StageMemory:
    """What a stage needs for one micro-batch. parts: in order. modes: of each part. hidden: bytes of its output.

    sums: for each part, the bytes of new tensors while the gradients of its buckets are summed. late: of the buckets
    that are summed at the end of the plan. shared: see ModelDeclaration. first, last: of the pipeline. local_input: the
    stage before is on the same rank, so that its output is this stage's input.
    """

    parts: tuple[Declaration, ...]
    modes: tuple[str, ...]
    hidden: int
    shared: int
    sums: tuple[int, ...]
    late: int
    first: bool
    last: bool
    local_input: bool

    @cached_property
    def saved(self) -> tuple[int, ...]:
        """Bytes that each part saves for the backward of a micro-batch."""
        return tuple(part.saved[mode] for part, mode in zip(self.parts, self.modes))

    @cached_property
    def deferred(self) -> tuple[int, ...]:
        """Bytes that each part keeps between I and W."""
        return tuple(work.deferred for work in self._works)

    @cached_property
    def total(self) -> int:
        """Bytes of all that it keeps between forward and backward, with its output."""
        kept = self.shared + sum(self.saved) + (0 if self.last else self.hidden)
        return kept - (self.hidden if self.local_input else 0)

    @cached_property
    def forward(self) -> tuple[int, int]:
        """The most that a forward needs more than before it: (bytes, number of the part)."""
        start = self.shared - (self.hidden if self.local_input else 0)
        peaks = []
        for i, work in enumerate(self._works):
            peaks.append((start + work.forward, i))
            start += self.saved[i]
        return max(peaks, default=(0, 0))

    @cached_property
    def backward(self) -> list[tuple[int, int]]:
        """For each part, last to first, (the most bytes needed more than before the backward, number of the part)."""
        return self._moments([work.backward for work in self._works], (0,) * len(self.parts))

    @cached_property
    def input_backward(self) -> list[tuple[int, int]]:
        """The same for I, where each part keeps what W needs."""
        return self._moments([work.split for work in self._works], self.deferred)

    @cached_property
    def _works(self) -> list[WorkingMemory]:
        return [part.work_in(mode) for part, mode in zip(self.parts, self.modes)]

    def _moments(self, most: Sequence[int], kept: Sequence[int]) -> list[tuple[int, int]]:
        change, found = 0, []
        for i in reversed(range(len(self.parts))):
            gradient = self.hidden if i < len(self.parts) - 1 else 0
            found.append((change + gradient + most[i], i))
            change += kept[i] - self.saved[i]
        return found


def stage_memories(cfg: Config, derived: Derived, states: Sequence[RankState], phase: Phase) -> list[StageMemory]:
    """What each pipeline stage needs for a micro-batch of a phase."""
    work, policy, plan = workload(cfg, derived.layout, phase), RecomputePolicy.of(cfg), derived.plan_of(phase)
    declared, found = declare(cfg.model, work), []
    for number, shape in enumerate(stage_shapes(derived.layers)):
        rank = plan.rank_of(number)
        state, sizes = states[rank].stages[number], states[rank].reduction_bytes(number)
        sums = [0] * len(shape.parts(declared))
        late = 0
        for bucket, unit, size in zip(state.buckets, state.unit_of, sizes):
            sums[unit] += 0 if bucket.late else size
            late += size if bucket.late else 0
        modes = ("none",) * shape.first + tuple(map(policy.mode_of, range(len(shape.layers)))) + ("none",) * shape.last
        local_input = number > 0 and plan.rank_of(number - 1) == rank
        parts, hidden = tuple(shape.parts(declared)), work.hidden(cfg.model)
        last = number == plan.num_stages - 1
        found.append(
            StageMemory(parts, modes, hidden, declared.shared, tuple(sums), late, number == 0, last, local_input)
        )
    return found


def saved_bytes(cfg: Config, derived: Derived, phase: Phase) -> list[int]:
    """For each pipeline stage, the bytes of activations that it keeps for the backward of one micro-batch."""
    found = stage_memories(cfg, derived, rank_states(cfg, derived), phase)
    return [replace(stage, local_input=False).total for stage in found]
