"""Which settings to change so that a run fits into the memory of a GPU, the cheapest changes first.

A change keeps the number of ranks, the batch of a step and the result. Its price is the time that it adds to a step, as
a fraction of the model's FLOPs: exact for recomputation; for communication a byte between tensor ranks counts as
FLOPS_PER_BYTE; for the pipeline, its bubble. The peak of each change is counted by the memory sheet.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.config.checks import config_errors
from engine.config.derived import Derived, derive, read_plan
from engine.config.schema import Config
from engine.distributed.layout import Splits
from engine.errors import PlanError
from engine.model.build import declare
from engine.model.declarations import Workload, matmul_flops
from engine.pipeline.schedules import SCHEDULES
from engine.planner.flops import stage_flops
from engine.planner.memory import RankState, rank_states
from engine.planner.sheet import sheets

FLOPS_PER_BYTE = 1500  # a GPU of 600 TFLOP/s in matmuls, whose tensor ranks exchange 400 GB/s
SMALLER_MATMULS = 0.02  # of a step's time, for each halving of the micro-batch
MOST_COUNTED = 24  # candidates whose memory is counted: the sheet stays within a second


@dataclass(frozen=True)
class Change:
    """Settings that make a run fit. settings: path -> value. peak: bytes. price: fraction of a step's time.

    reasons: what it costs, in words.
    """

    settings: Mapping[str, Any]
    peak: int
    price: float
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _Candidate:
    """A change that is not counted yet."""

    settings: Mapping[str, Any]
    price: float
    reasons: tuple[str, ...]


def changes_that_fit(cfg: Config, derived: Derived, budget: int, wanted: int = 3) -> list[Change]:
    """The cheapest changes of settings with which every rank needs at most `budget` bytes, at most `wanted`.

    At most one change for each layout, and one for each set of settings.
    """
    counter, found = _Counter(cfg, derived, budget), list[Change]()
    for layout in sorted(_layouts(cfg, derived), key=lambda c: c.price):
        last = found[wanted - 1].price if len(found) >= wanted else math.inf
        if layout.price >= last or counter.counted >= MOST_COUNTED:
            break
        if not counter.layout_fits(layout):
            continue
        for candidate in sorted(_within(cfg, derived, layout), key=lambda c: (c.price, len(c.settings))):
            peak = math.inf if candidate.price >= last else counter.peak(candidate.settings)
            if peak <= budget:
                if all(change.settings.keys() != candidate.settings.keys() for change in found):
                    found.append(Change(candidate.settings, int(peak), candidate.price, candidate.reasons))
                break
        found.sort(key=lambda change: change.price)
    return found[:wanted]


@dataclass
class _Counter:
    """Counts the peaks of changed configs. counted: how many so far. states: of each layout, counted once."""

    cfg: Config
    derived: Derived
    budget: int
    counted: int = 0
    states: dict[str, list[RankState]] = field(default_factory=dict)

    def peak(self, settings: Mapping[str, Any]) -> float:
        """The largest peak of any rank with these settings, in bytes; infinite if the config does not allow them."""
        changed, plan = _changed(self.cfg, settings), read_plan(self.cfg.parallel)
        if isinstance(plan, PlanError) or config_errors(changed, self.derived.layout.world, plan):
            return math.inf
        self.counted += 1
        p = changed.parallel
        # with more micro-batches than this a rank holds no more at once, except in gpipe
        resolved = derive(changed, plan, most=0 if p.schedule == "gpipe" else 4 * p.pipeline * p.chunks)
        states = self.states.setdefault(repr(p), [])
        states[:] = states or rank_states(changed, resolved)
        return max(sheet.peak.total for sheet in sheets(changed, resolved, states))

    def layout_fits(self, layout: _Candidate) -> bool:
        """Whether a layout fits with full recomputation of micro-batches of one sequence."""
        savings = [option.settings for option in (*_batches(self.cfg), *_free(self.cfg, self.derived))]
        strongest = {"train.recompute": "full", "train.recompute_layers": 0}
        return (
            self.peak({**strongest, **layout.settings, **dict(kv for s in savings for kv in s.items())}) <= self.budget
        )


def _changed(cfg: Config, settings: Mapping[str, Any]) -> Config:
    """The config with these settings; the data ranks, chunks and blocks of each stage follow from the layout."""
    sections: dict[str, dict[str, Any]] = {}
    for path, value in settings.items():
        section, _, name = path.partition(".")
        sections.setdefault(section, {})[name] = value
    p = cfg.parallel
    if parallel := sections.get("parallel"):
        ranks = p.tensor * p.pipeline * p.data
        tensor, pipeline = parallel.get("tensor", p.tensor), parallel.get("pipeline", p.pipeline)
        parallel["data"] = ranks // (tensor * pipeline)
        if pipeline != p.pipeline:
            parallel["layers"] = ""
    updates = {name: getattr(cfg, name).model_copy(update=values) for name, values in sections.items()}
    return cfg.model_copy(update=updates)


def _within(cfg: Config, derived: Derived, layout: _Candidate) -> Iterator[_Candidate]:
    """All combinations of one option of each other kind in a layout, without the present settings."""
    kinds = (_recomputations(cfg, derived, layout), _batches(cfg), _free(cfg, derived))
    for chosen in itertools.product(*map(list, kinds)):
        options = (*chosen, layout)
        settings = {path: value for option in options for path, value in option.settings.items()}
        if settings:
            reasons = tuple(reason for option in options for reason in option.reasons)
            yield _Candidate(settings, sum(option.price for option in options), reasons)


_PRESENT = _Candidate({}, 0.0, ())


def _recomputations(cfg: Config, derived: Derived, layout: _Candidate) -> Iterator[_Candidate]:
    """Recompute policies that save less than the present one, in a layout."""
    yield _PRESENT
    declared = declare(cfg.model, Workload(seq_len=derived.phases.longest(cfg.train.steps)))
    total = sum(part.flops for part in declared.parts())
    blocks, most = sum(layer.flops for layer in declared.layers), max(derived.layers)
    if pipeline := layout.settings.get("parallel.pipeline"):
        most = -(-cfg.model.num_layers // (pipeline * cfg.parallel.chunks))
    mode, now = cfg.train.recompute, cfg.train.recompute_layers or most
    if mode == "none":
        core = blocks - sum(matmul_flops(layer.specs) for layer in declared.layers)
        price = core / 3 / total
        yield _Candidate(
            {"train.recompute": "selective"}, price, (f"{price:+.1%} FLOPs: attention core and norms again",)
        )
    for layers in sorted({-(-most * quarters // 4) for quarters in (1, 2, 3, 4)}):
        if mode == "full" and layers <= now:
            continue
        price = (layers - (now if mode == "full" else 0)) / most * blocks / 3 / total
        settings = {"train.recompute": "full", "train.recompute_layers": layers if layers < most else 0}
        present = {"train.recompute": mode, "train.recompute_layers": cfg.train.recompute_layers}
        changed = {path: value for path, value in settings.items() if present[path] != value}
        yield _Candidate(changed, price, (f"{price:+.1%} FLOPs: the forward of {layers} blocks of each stage again",))


def _layouts(cfg: Config, derived: Derived) -> Iterator[_Candidate]:
    """More tensor or pipeline ranks, with fewer data ranks."""
    yield _PRESENT
    p, phase = cfg.parallel, derived.phases.at(1)
    declared = declare(cfg.model, Workload(seq_len=phase.seq_len))
    flops = sum(part.flops for part in declared.parts())
    for tensor, pipeline in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
        t, pp = p.tensor * tensor, p.pipeline * pipeline
        if (tensor, pipeline) == (1, 1) or (p.tensor * p.pipeline * p.data) % (t * pp) or t > 8:
            continue
        if pipeline > 1 and p.schedule not in SCHEDULES:
            continue
        settings: dict[str, Any] = {}
        price, reasons = 0.0, []
        if tensor > 1:
            sent = 16 * cfg.model.hidden_size * cfg.model.num_layers * ((t - 1) / t - (p.tensor - 1) / p.tensor)
            price, settings["parallel.tensor"] = price + sent * FLOPS_PER_BYTE * t / flops, t
            reasons.append(f"{sent / 2**10:,.0f} KiB more between tensor ranks for each token")
        if pipeline > 1:
            idle = _idle(cfg, derived, pp, p.tensor * p.pipeline * p.data // (t * pp))
            price += idle - _idle(cfg, derived, p.pipeline, p.data)
            settings["parallel.pipeline"] = pp
            reasons.append(f"pipeline ranks idle for {idle:.1%} of the step")
        yield _Candidate(settings, price, tuple(reasons))


def _idle(cfg: Config, derived: Derived, pipeline: int, data: int) -> float:
    """Time that a pipeline adds to a step: about its bubble, and the wait for the stage with the most FLOPs."""
    phase, stages = derived.phases.at(1), pipeline * cfg.parallel.chunks
    bubble = (pipeline - 1) / (max(1, phase.microbatches(data)) * cfg.parallel.chunks)
    if cfg.model.num_layers % stages:  # refused when it is checked
        return bubble
    flops = stage_flops(cfg.model, phase.seq_len, [cfg.model.num_layers // stages] * stages)
    return (1 + bubble) * max(flops) * stages / sum(flops) - 1


def _batches(cfg: Config) -> Iterator[_Candidate]:
    """Smaller micro-batches."""
    yield _PRESENT
    size, price = cfg.train.micro_batch_size, 0.0
    while size % 2 == 0:
        size, price = size // 2, price + SMALLER_MATMULS
        yield _Candidate({"train.micro_batch_size": size}, price, ("smaller matmuls",))


def _free(cfg: Config, derived: Derived) -> Iterator[_Candidate]:
    """Settings that save memory for no time, or little."""
    yield _PRESENT
    settings: dict[str, Any] = {}
    if not cfg.parallel.zero and derived.layout.ways(Splits.SAMPLES, Splits.POSITIONS) > 1:
        settings["parallel.zero"] = 1
    if not cfg.parallel.sequence and derived.layout.tensor > 1:
        settings["parallel.sequence"] = True
    if cfg.parallel.keep_gathered:
        settings["parallel.keep_gathered"] = False
    if settings:
        yield _Candidate(settings, 0.001, ("the same FLOPs and about the same traffic",))
