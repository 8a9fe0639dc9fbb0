"""The phases of a run: what holds in each optimizer step, and how much data the steps before it have read.

Steps count from 1. Step s belongs to the last phase whose first_step is at most s; a value that its [[phase]] does not
give is that of the phase before, and of [train] in the first. Every count that depends on batch sizes (samples and
tokens consumed, sample numbers of a step, micro-batches) comes from here, and nothing else adds up batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from engine.config.phase_table import PhaseConfig
from engine.config.schema import Config, ModelConfig

ROPE = tuple(name for name in PhaseConfig.model_fields if name.startswith("rope_"))  # fields of the model
CHANGES_LOSS = frozenset({"weights", "seq_len", *ROPE})  # values after whose change a loss may jump
ROPE_SCALES = {  # field -> values of rope_scaling that use it
    "rope_factor": ("linear", "llama3", "yarn"),
    "rope_original_seq_len": ("llama3", "yarn"),
    "rope_low_freq_factor": ("llama3",),
    "rope_high_freq_factor": ("llama3",),
    "rope_beta_fast": ("yarn",),
    "rope_beta_slow": ("yarn",),
    "rope_attention_factor": ("yarn",),
}
_SIZES = ("global_batch_size", "micro_batch_size", "seq_len")


@dataclass(frozen=True)
class Phase:
    """What holds from optimizer step `first_step` until the next phase.

    number: of its [[phase]] in the config, from 1; 0 for [train]. given: names of the values that this phase gives.
    weights: source of the blend -> weight, of this and earlier phases; other sources keep the weight of data.train.
    rope: RoPE settings of this and earlier phases, by field of the model.
    """

    first_step: int
    global_batch_size: int
    micro_batch_size: int
    seq_len: int
    number: int = 0
    given: frozenset[str] = frozenset()
    weights: Mapping[str, float] = field(default_factory=dict)
    rope: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of one step, over all ranks."""
        return self.global_batch_size * self.seq_len

    def microbatches(self, data: int) -> int:
        """Number of micro-batches of a step in the pipeline of each of `data` data ranks."""
        return self.global_batch_size // (data * self.micro_batch_size)

    def __str__(self) -> str:
        text = f"global batch {self.global_batch_size}, micro-batch {self.micro_batch_size}"
        if "seq_len" in self.given:
            text += f", sequences of {self.seq_len} tokens"
        if rope := [f"{name} {self.rope[name]}" for name in ROPE if name in self.given]:
            text += f", {', '.join(rope)}"
        if "weights" in self.given:
            text += f", weights {', '.join(f'{name} {weight:g}' for name, weight in self.weights.items())}"
        return text


@dataclass(frozen=True)
class Position:
    """Where a run is: steps done, and samples and tokens consumed by them."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Phases:
    """The phases of a run in order; the first one holds from step 1.

    origin: position from which consumption is counted. A run that resumes continues at its checkpoint's, for any batch
    sizes of its past.
    """

    phases: tuple[Phase, ...]
    origin: Position = Position()

    def __post_init__(self) -> None:
        steps = [phase.first_step for phase in self.phases]
        if steps[:1] != [1] or any(a >= b for a, b in itertools.pairwise(steps)):
            raise ValueError(f"phases begin at steps {steps}, expected 1 and then increasing numbers")

    def at(self, step: int) -> Phase:
        """The phase of an optimizer step."""
        return next(phase for phase in reversed(self.phases) if phase.first_step <= max(1, step))

    def consumed(self, step: int) -> Position:
        """Position after `step` steps. ValueError for a step before the origin."""
        if step < self.origin.step:
            raise ValueError(f"step {step} is before step {self.origin.step}, from which this run counts")
        samples, tokens = self.origin.samples, self.origin.tokens
        ends = [*(phase.first_step - 1 for phase in self.phases[1:]), step]
        for phase, end in zip(self.phases, ends):
            steps = max(0, min(end, step) - max(phase.first_step - 1, self.origin.step))
            samples += steps * phase.global_batch_size
            tokens += steps * phase.tokens
        return Position(step, samples, tokens)

    def samples(self, step: int) -> range:
        """Global sample numbers of an optimizer step."""
        return range(self.consumed(step - 1).samples, self.consumed(step).samples)

    def steps_to_read(self, samples: float) -> int:
        """Number of steps, rounded, after which the run has consumed this many samples."""
        begins = [max(phase.first_step - 1, self.origin.step) for phase in self.phases]
        before = [self.consumed(begin).samples for begin in begins]
        k = max((k for k, read in enumerate(before) if read < samples), default=0)
        return max(self.origin.step, begins[k] + round((samples - before[k]) / self.phases[k].global_batch_size))

    def resumed(self, position: Position) -> Phases:
        """The same phases for a run that resumes at `position`."""
        return replace(self, origin=position)

    def begins(self, step: int) -> bool:
        """Whether a [[phase]] begins with this optimizer step."""
        return self.at(step).first_step == step and self.at(step).number > 0

    def until(self, steps: int) -> tuple[Phase, ...]:
        """The phases that the first `steps` steps reach."""
        return tuple(phase for phase in self.phases if phase.first_step <= steps)

    def longest(self, steps: int) -> int:
        """The most tokens per sequence in the first `steps` steps."""
        return max(phase.seq_len for phase in self.until(steps))


def phases_of(cfg: Config) -> Phases:
    """The phases of a config whose [[phase]] tables are in order."""
    t = cfg.train
    found = [Phase(1, t.global_batch_size, t.micro_batch_size, t.seq_len)]
    for number, row in enumerate(cfg.phase, 1):
        given = {name: value for name, value in row.model_dump().items() if value is not None and name != "from_step"}
        values = {name: value for name, value in given.items() if name not in ROPE}
        values["weights"] = {**found[-1].weights, **given.get("weights", {})}
        values["rope"] = {**found[-1].rope, **{name: given[name] for name in ROPE if name in given}}
        phase = replace(found[-1], first_step=row.from_step or 1, number=number, given=frozenset(given), **values)
        found = [*found[: -1 if phase.first_step == 1 else None], phase]
    return Phases(tuple(found))


def model_of(model: ModelConfig, phase: Phase) -> ModelConfig:
    """The model in a phase, with its RoPE settings."""
    return model.model_copy(update=_with_rope(model.model_dump(), phase)) if phase.rope else model


def saved_model(config: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The model fields of a config as stored in a checkpoint of this step, in the phase of the step."""
    return _with_rope(config["model"], saved_phase(config, step))


def saved_phase(config: Mapping[str, Any], step: int) -> Phase:
    """What held in the last step of a checkpoint of this step. config: as stored in it, of this or an older engine."""
    sizes = {name: size for name, size in config.get("train", {}).items() if name in _SIZES}
    return phases_of(Config.model_validate({"train": sizes, "phase": config.get("phase") or []})).at(step)


def _with_rope(fields: Mapping[str, Any], phase: Phase) -> dict[str, Any]:
    found = {**fields, **phase.rope}
    if phase.rope:
        found["rope_original_seq_len"] = original_seq_len(found)
    return found


def original_seq_len(model: Mapping[str, Any]) -> int:
    """rope_original_seq_len of the fields of a model: as given, else max_seq_len for a scaling that uses it."""
    of_context = model["rope_scaling"] in ROPE_SCALES["rope_original_seq_len"]
    return int(model["rope_original_seq_len"] or (model["max_seq_len"] if of_context else 0))
