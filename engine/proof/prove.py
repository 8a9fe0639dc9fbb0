"""Proves a layout: a shrunk config, run on the ranks of its layout and on one process, gives the same numbers.

Both runs are real ones (engine.train.run) on small corpora: data, objective, steps, validation, checkpoint and resume.
The process that the layout is compared with has one micro-batch per sample, no recomputation and the plainest schedule.
"""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.derived import derive
from engine.config.load import Resolved
from engine.config.schema import Config
from engine.distributed.context import ParallelContext
from engine.distributed.layout import AXES, Layout
from engine.proof.ranks import run
from engine.proof.shrink import shrink
from engine.proof.small_data import with_small_data
from engine.proof.tensors import assemble, errors_of, gradients_of, optimizer_states_of, weights_of
from engine.train.loop import steps
from engine.train.resume import save_state
from engine.train.run import open_run

_ONE_STEP, _MANY_STEPS = 1e-11, 1e-9  # a sum in another order, in float64; the same after some steps
_TENSORS = {"init": "initial weights", "gradients": "gradients", "weights": "weights", "states": "optimizer state"}


@dataclass(frozen=True)
class Check:
    """One line of a proof. error: largest relative difference; 0: the same bits. worst: the tensor or step with it.

    problem: what else is wrong, such as replicas that differ.
    """

    what: str
    error: float
    limit: float
    worst: str = ""
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit, and there is no problem."""
        return self.error <= self.limit and not self.problem


@dataclass(frozen=True)
class Proof:
    """A layout compared with one process. config: shrunk. notes: what shrinking does not keep. seconds: it took."""

    config: Config
    layout: Layout
    notes: tuple[str, ...]
    checks: tuple[Check, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether all checks have passed."""
        return all(check.passed for check in self.checks)


def prove(
    cfg: Config, most: int = 8, progress: Callable[[str], None] = lambda text: None, timeout_s: float = 600.0
) -> Proof:
    """Prove the layout of a resolved config on at most `most` processes. progress: called with what runs next.

    Raises RankError if a rank fails or does not finish within `timeout_s`.
    """
    begin = time.monotonic()
    small = shrink(cfg, most)
    layout = derive(small.config).layout
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        progress("writing small corpora")
        # in another process: training a tokenizer starts threads, whose locks the ranks would inherit
        made = run(Layout(), lambda ctx: with_small_data(small.config, folder).model_dump(), timeout_s=timeout_s)
        config = _in_folder(Config.model_validate(made[0]), folder)
        half = config.train.steps // 2
        progress(f"training {config.train.steps} steps on {layout.world} process{'es' * (layout.world > 1)}")
        transport = config.parallel.transport
        ranks = run(
            layout, lambda ctx: _train_twice(config, ctx, folder, half), transport=transport, timeout_s=timeout_s
        )
        progress("training the same steps on one process")
        checkpoint = folder / "checkpoints" / f"step_{half:08d}"
        one = run(Layout(), lambda ctx: _train_and_resume(single(config), ctx, checkpoint), timeout_s=timeout_s)
    found, again = (_merged([rank[k] for rank in ranks]) for k in range(2))
    wanted, resumed = (_merged([rank[k] for rank in one]) for k in range(2))
    checks = tuple(_checks(found, wanted))
    checks += tuple(_resumed(again, found, "resumed", 0.0))
    checks += tuple(_resumed(resumed, wanted, "resumed on one", _MANY_STEPS))
    return Proof(small.config, layout, tuple(small.notes), checks, time.monotonic() - begin)


def single(cfg: Config) -> Config:
    """The same run on one process: one micro-batch per sample, no recomputation, one stage."""
    values = cfg.model_dump()
    values["parallel"] |= {**dict.fromkeys(AXES, 1), "chunks": 1, "schedule": "1f1b", "layers": ""}
    values["parallel"] |= {"zero": 0, "keep_gathered": False, "overlap": False, "transport": "auto"}
    values["train"] |= {"micro_batch_size": 1, "recompute": "none", "recompute_layers": 0, "attention": "sdpa"}
    for row in values["phase"]:
        row["micro_batch_size"] = row["micro_batch_size"] and 1
    return Config.model_validate(values)


def _in_folder(cfg: Config, folder: Path) -> Config:
    """The config of a new run in a folder."""
    start = cfg.checkpoint.model_copy(update={"resume": "never"})
    return cfg.model_copy(update={"run": cfg.run.model_copy(update={"dir": str(folder / "run")}), "checkpoint": start})


def _train_twice(cfg: Config, ctx: ParallelContext, folder: Path, half: int) -> list[Any]:
    """The whole run, saved after `half` steps, and the rest again from there."""
    if ctx.rank > 0:
        warnings.simplefilter("ignore")  # rank 0 prints the same warnings
    whole = _train(cfg, ctx, folder / "checkpoints", half)
    return [whole, _train(_resuming(cfg, folder / "checkpoints" / f"step_{half:08d}"), ctx)]


def _train_and_resume(cfg: Config, ctx: ParallelContext, checkpoint: Path) -> list[Any]:
    """The whole run, and the rest from a checkpoint of another layout."""
    warnings.simplefilter("ignore")  # the ranks have printed them
    return [_train(cfg, ctx), _train(_resuming(cfg, checkpoint), ctx)]


def _resuming(cfg: Config, checkpoint: Path) -> Config:
    return cfg.model_copy(update={"checkpoint": cfg.checkpoint.model_copy(update={"resume": str(checkpoint)})})


def _train(cfg: Config, ctx: ParallelContext, root: Path | None = None, save_at: int = 0) -> dict[str, Any]:
    """A run on one rank: numbers of its steps and this rank's pieces of its tensors. root: for the checkpoint."""
    numbers: dict[str, dict[str, float]] = {}
    found: dict[str, Any] = {}
    with open_run(Resolved(cfg, {}, derive(cfg)), ctx) as opened:
        state = opened.state
        found["init"] = weights_of(state)
        for report in steps(opened):
            if result := report.result:
                found.setdefault("gradients", gradients_of(state))
                by_source = {f"loss of {opened.data.names[k]}": x for k, x in result.by_source.items()}
                values = {"loss": result.loss, "gradient norm": result.norms.norm, "counted tokens": result.tokens}
                numbers[str(state.step)] = values | result.sums | by_source
            if root is not None and state.step == save_at:
                save_state(state, root, opened.data.metadata)
        if opened.evaluator is not None:
            numbers["validation"] = opened.evaluator.run(cfg.eval.batches).as_dict()
        return found | {"weights": weights_of(state), "states": optimizer_states_of(state), "numbers": numbers}


def _merged(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The whole model's tensors, and the numbers of all ranks."""
    merged = {name: assemble(rank[name] for rank in ranks) for name in _TENSORS}
    return merged | {"numbers": [rank["numbers"] for rank in ranks]}


def _checks(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[Check]:
    """Every check of a layout `found` against one process `wanted`."""
    yield _tensors("initial weights", found["init"], wanted["init"], 0.0)
    (first, *_, last), numbers, exact = list(wanted["numbers"][0]), found["numbers"][0], wanted["numbers"][0]
    for what in exact[first]:
        limit = 0.0 if what == "counted tokens" else _ONE_STEP
        yield _numbers(f"{what} of step {first}", {first: numbers[first].get(what)}, {first: exact[first][what]}, limit)
    yield _tensors(f"gradients of step {first}", found["gradients"], wanted["gradients"], _ONE_STEP)
    for what in dict.fromkeys(name for step in exact if step not in ("validation", first) for name in exact[step]):
        here, there = (
            {f"step {step}": x[what] for step, x in side.items() if what in x and step != "validation"}
            for side in (numbers, exact)
        )
        yield _numbers(f"{what} of all steps", here, there, 0.0 if what == "counted tokens" else _MANY_STEPS)
    steps_done = next(s for s in reversed(exact) if s != "validation")
    yield _tensors(f"weights after step {steps_done}", found["weights"], wanted["weights"], _MANY_STEPS)
    yield _tensors(f"optimizer state after step {steps_done}", found["states"], wanted["states"], _MANY_STEPS)
    if last == "validation":
        yield _numbers("validation", numbers.get(last, {}), exact[last], _MANY_STEPS)
    differing = [str(rank) for rank, other in enumerate(found["numbers"]) if other != numbers]
    yield Check("all ranks report the same", 0.0, 0.0, "", f"rank {', '.join(differing)}" if differing else "")


def _resumed(again: Mapping[str, Any], whole: Mapping[str, Any], what: str, limit: float) -> Iterator[Check]:
    """Weights, optimizer state and numbers of a resumed run against those of the run that was not interrupted."""
    yield _tensors(f"{what}: weights", again["weights"], whole["weights"], limit)
    yield _tensors(f"{what}: optimizer state", again["states"], whole["states"], limit)
    here, there = again["numbers"][0], whole["numbers"][0]
    found, wanted = (
        {f"{name} of step {step}": x for step in here for name, x in side[step].items()} for side in (here, there)
    )
    yield _numbers(f"{what}: numbers", found, wanted, limit)


def _tensors(what: str, found: Any, wanted: Any, limit: float) -> Check:
    """A check of assembled tensors."""
    errors = errors_of(found.tensors, wanted.tensors)
    worst = max(errors, key=lambda name: (name in found.faults, errors[name]), default="")
    problem = found.faults.get(worst, "") or wanted.faults.get(worst, "")
    shown = worst.removeprefix("grad/") if errors.get(worst) or problem else ""
    return Check(what, errors.get(worst, 0.0), limit, shown, problem)


def _numbers(what: str, found: Mapping[str, Any], wanted: Mapping[str, Any], limit: float) -> Check:
    """A check of numbers by name, or by step."""
    errors = {name: _relative(found.get(name), wanted.get(name)) for name in found.keys() | wanted.keys()}
    worst = max(errors, key=lambda name: errors[name], default="")
    return Check(what, errors.get(worst, 0.0), limit, worst if len(errors) > 1 and errors[worst] else "")


def _relative(a: float | None, b: float | None) -> float:
    """Difference of two numbers, relative to the second; infinite if one is missing or not finite."""
    if a == b:
        return 0.0
    if a is None or b is None or not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(b), 1e-300)
