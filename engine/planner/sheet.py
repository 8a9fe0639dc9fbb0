"""The memory sheet: the bytes that each pipeline rank needs in a training step, term by term, at its peak.

A walk through the rank's plan adds and frees what each action does; the parts of the model declare what they save and
need for a moment (engine.model.declarations), and the planner counts the state (engine.planner.memory). Bytes of
tensors: the CUDA context, NCCL's buffers and fragmentation are not among them (RESERVE_GIB).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from engine.config.derived import Derived
from engine.config.dtypes import DTYPE_BYTES, MAIN_DTYPE
from engine.config.phases import Phase
from engine.config.schema import Config
from engine.distributed.layout import Splits
from engine.model.build import parameter_specs
from engine.optim.groups import group_of
from engine.pipeline.actions import COMMUNICATION, SENDS, Action, Op, Plan
from engine.planner.memory import RankState, StageMemory, rank_states, stage_memories

RESERVE_GIB = 3.0  # of a GPU for what is not a tensor of the engine: CUDA context, NCCL's buffers, fragmentation
BATCH_BYTES = 40  # per token of a step: tokens, labels, weights, weights of the objective, shares; 8 each
PREFETCH_BYTES = 24  # per token of a step that waits on the host: tokens, weights, labels or document starts; 8 each

Terms = dict[str, int]

TERMS = {  # term -> what it is; the last three are not in the memory of the device
    "weights": "parameters in the compute dtype",
    "gradients": "main gradients",
    "master": "master weights",
    "optimizer": "optimizer state",
    "activations": "activations saved for the backward",
    "temporary": "working memory of one part of the model",
    "loss": "working memory of the head: a chunk of logits",
    "messages": "tensors between pipeline ranks",
    "reductions": "results of gradient sums",
    "batch": "micro-batches of the step, RoPE tables",
    "staging": "copy for background saves",
    "prefetch": "batches read ahead",
    "checkpoint": "what a rank writes",
}


@dataclass(frozen=True)
class Peak:
    """The largest sum of bytes in a step. terms: name (TERMS) -> bytes at that moment. where: what runs.

    in_flight: for each stage, the number of micro-batches between forward and backward.
    """

    terms: Terms
    where: str
    in_flight: Mapping[int, int]

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.terms.values())


@dataclass
class _Walk:
    """The walk of a rank through its plan. alive: term -> bytes now. in_flight: as in Peak.

    most_saved: bytes of activations, at the most. sending: bytes of gradients that were posted and not waited for.
    reduced: stages whose reductions have started.
    """

    plan: Plan
    rank: int
    stages: Mapping[int, StageMemory]
    overlap: bool
    alive: Terms
    now: int = 0
    best: Peak | None = None
    most_saved: int = 0
    in_flight: dict[int, int] = field(default_factory=dict)
    sending: int = 0
    reduced: set[int] = field(default_factory=set)

    def look(self, where: Callable[[], str], **more: int) -> None:
        """Keep this moment if it is the largest so far. more: bytes of terms for this moment only."""
        if self.best is None or self.now + sum(more.values()) > self.best.total:
            terms = {name: self.alive.get(name, 0) + more.get(name, 0) for name in {**self.alive, **more}}
            self.best = Peak(terms, where(), dict(self.in_flight))

    def add(self, term: str, size: int) -> None:
        """Count more bytes from now on."""
        self.alive[term] = self.alive.get(term, 0) + size
        self.now += size

    def run(self) -> Peak:
        """The peak of the whole plan, and of the end of the step."""
        program = self.plan.programs[self.rank]
        final = {step[0].stage: step[0] for step in program if step[0].op in (Op.B, Op.W)}
        self.now = sum(self.alive.values())
        self.look(lambda: "between the steps")
        for step in program:
            action = step[0]
            stage = self.stages[action.stage]
            if action.op is Op.F:
                self._forward(action, stage)
            elif action.op in (Op.B, Op.I):
                self._backward(action, stage, final=action == final[action.stage])
            elif action.op is Op.W:
                self.look(partial(self._named, action))
                self.add("activations", -sum(stage.deferred))
                if action == final[action.stage] and self.overlap:
                    self._reduce(action.stage)
            elif action.op in COMMUNICATION:
                self._communicate(step)
            else:
                self._reduce(action.stage)
        self.add("messages", -self.sending)
        self.add("reductions", sum(stage.late for stage in self.stages.values()))
        late = 2 * max((stage.late for stage in self.stages.values()), default=0)
        self.look(lambda: "the last gradient sums", reductions=late)
        assert self.best is not None
        return self.best

    def _forward(self, action: Action, stage: StageMemory) -> None:
        if not stage.first and not stage.local_input:
            self.add("messages", -stage.hidden)  # its input, which the first block saves
        most, part = stage.forward
        loss = stage.last and part == len(stage.parts) - 1
        before = stage.shared + sum(stage.saved[:part]) - (stage.hidden if stage.local_input else 0)
        name = "loss" if loss else "temporary"
        self.in_flight[action.stage] = self.in_flight.get(action.stage, 0) + 1
        self.look(partial(self._named, action, part), **{"activations": before, name: most - before})
        self.add("activations", stage.total)
        self.most_saved = max(self.most_saved, self.alive["activations"])
        self.look(partial(self._named, action))

    def _backward(self, action: Action, stage: StageMemory, *, final: bool) -> None:
        split = action.op is Op.I
        deferred = stage.deferred if split else (0,) * len(stage.parts)
        freed, moments = 0, stage.input_backward if split else stage.backward
        if not final:  # no gradient sums grow meanwhile, so the largest part is enough
            most, part = max(moments, default=(0, 0))
            self.look(partial(self._named, action, part), temporary=most)
        for most, part in moments if final else ():
            self.look(partial(self._named, action, part), activations=freed, temporary=most - freed)
            freed += deferred[part] - stage.saved[part]
            if final and action.op is Op.B and self.overlap:
                self.add("reductions", stage.sums[part])
        if final and action.op is Op.B and self.overlap:
            self.reduced.add(action.stage)
        self.in_flight[action.stage] -= 1
        self.add("activations", sum(deferred) - stage.total)
        self.add("messages", (0 if stage.first else stage.hidden) - (0 if stage.last else stage.hidden))

    def _reduce(self, stage: int) -> None:
        if stage not in self.reduced:
            self.reduced.add(stage)
            self.add("reductions", sum(self.stages[stage].sums))
            self.look(lambda: f"the gradient sums of stage {stage}")

    def _communicate(self, step: Sequence[Action]) -> None:
        for action in step:
            if action.op not in SENDS:
                self.add("messages", self.stages[action.stage].hidden)
        self.look(lambda: "a receive")
        self.add("messages", -self.sending)
        self.sending = sum(self.stages[action.stage].hidden for action in step if action.op is Op.SEND_B)

    def _named(self, action: Action, part: int | None = None) -> str:
        stage = self.stages[action.stage]
        if part is None:
            return f"{action.op} of stage {action.stage}, micro-batch {action.microbatch + 1}"
        name = f"block {part - stage.first + 1}"
        if stage.first and part == 0:
            name = "the embedding"
        if stage.last and part == len(stage.parts) - 1:
            name = "the head"
        kind = "forward" if action.op is Op.F else "backward"
        return f"{kind} of {name}, stage {action.stage}, micro-batch {action.microbatch + 1}"


@dataclass(frozen=True)
class RankSheet:
    """The memory of the ranks of one pipeline rank: of those with the most. phase: the phase of the peak.

    state: term -> bytes that stay for the whole run. activations: the most saved at once. host: term -> bytes of the
    host's memory. checkpoint: bytes that a rank writes. stages, states: what the terms are counted from.
    """

    rank: int
    state: Terms
    peak: Peak
    activations: int
    phase: Phase
    host: Terms
    checkpoint: int
    stages: Mapping[int, StageMemory]
    states: RankState


def state_terms(cfg: Config, state: RankState) -> Terms:
    """The bytes of a rank's weights, gradients, master weights and optimizer state."""
    low, main = DTYPE_BYTES[cfg.train.precision], DTYPE_BYTES[MAIN_DTYPE[cfg.train.precision]]
    kinds = state.states(owned=False)
    masters = kinds.pop("master", 0)
    return {
        "weights": (state.elements + state.frozen) * low,
        "gradients": state.elements * main,
        "master": 0 if low == main else masters * main,
        "optimizer": sum(kinds.values()) * main,
    }


def sheets(cfg: Config, derived: Derived, states: Sequence[RankState] = ()) -> list[RankSheet]:
    """The memory sheet of each pipeline rank, over all phases that the run reaches. cfg: resolved.

    states: of the ranks, if they were already counted; they depend on the model, the layout and the optimizer only.
    """
    states = states or rank_states(cfg, derived)
    found: list[RankSheet] = []
    for phase in derived.phases.until(cfg.train.steps):
        stages = stage_memories(cfg, derived, states, phase)
        for rank, state in enumerate(states):
            sheet = _rank_sheet(cfg, derived, phase, rank, state, stages)
            if rank == len(found):
                found.append(sheet)
            elif sheet.peak.total > found[rank].peak.total:
                found[rank] = sheet
    return found


def _rank_sheet(
    cfg: Config, derived: Derived, phase: Phase, rank: int, state: RankState, stages: Sequence[StageMemory]
) -> RankSheet:
    plan, terms = derived.plan_of(phase), state_terms(cfg, state)
    mine = {number: stages[number] for number in plan.stages_of(rank)}
    tokens = phase.tokens // derived.layout.ways(Splits.SAMPLES)
    batch = tokens * BATCH_BYTES
    alive = {**terms, "batch": batch + sum(stage.shared for stage in mine.values())}
    walk = _Walk(plan, rank, mine, cfg.parallel.overlap, alive)
    peak = walk.run()
    low, main = DTYPE_BYTES[cfg.train.precision], DTYPE_BYTES[MAIN_DTYPE[cfg.train.precision]]
    written = sum(state.states(owned=True).values()) * main + state.frozen * low // derived.layout.ways(Splits.SAMPLES)
    staging = written if cfg.checkpoint.every and cfg.checkpoint.async_save else 0
    ahead = (cfg.data.prefetch + 1) * tokens * PREFETCH_BYTES
    return RankSheet(
        rank, terms, peak, walk.most_saved, phase, {"staging": staging, "prefetch": ahead}, written, mine, state
    )


def checkpoint_bytes(cfg: Config) -> int:
    """Bytes of a checkpoint without its manifest: master weights, optimizer state, frozen parameters as they are."""
    low, main, size = DTYPE_BYTES[cfg.train.precision], DTYPE_BYTES[MAIN_DTYPE[cfg.train.precision]], 0
    for spec in parameter_specs(cfg.model):
        group = group_of(spec, cfg.optimizer)
        count = sum(math.prod(chunk.shape) for chunk in spec.chunks)
        size += count * (low if group.frozen else main * (1 + len(group.states)))
    return size


def biggest(terms: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """The terms that are not 0, the largest first."""
    yield from sorted(((name, size) for name, size in terms.items() if size > 0), key=lambda term: -term[1])
