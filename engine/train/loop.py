"""The training loop around `train_step`: logging, checkpoints, validation, and stopping on a signal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoint.format import newest_step
from engine.checkpoint.links import reject_links
from engine.checkpoint.save import SavedCheckpoint, Saver, check_space
from engine.checkpoint.seal import open_storage
from engine.config.load import Resolved
from engine.config.schema import Config
from engine.config.skips import contains, read_ranges
from engine.distributed.collectives import all_reduce_, on_first_rank
from engine.distributed.context import ParallelContext
from engine.errors import EXIT_OK, EXIT_REQUEUE, CheckpointError, ConfigError, FieldError
from engine.model.build import num_parameters
from engine.monitor.ending import ExitRecord
from engine.monitor.metrics import MetricsLog, lacks_validation
from engine.monitor.progress import Progress
from engine.monitor.spikes import SpikeWatch
from engine.pipeline.simulate import simulate
from engine.pipeline.trace import write_timeline
from engine.planner.flops import uneven_pipeline
from engine.train.resume import changed_since, manifest_fields
from engine.train.run import Run, open_run
from engine.train.state import TrainState
from engine.train.step import StepResult, train_step
from engine.util.files import locked
from engine.util.signals import StopRequest


@dataclass(frozen=True)
class StepReport:
    """One step of a run. samples: global sample numbers. result: None for a step skipped by train.skip_steps.

    data_s: seconds spent waiting for data. seconds: duration of the step. sent: bytes that this rank sent in it, by
    (axis, collective).
    """

    samples: range
    result: StepResult | None
    data_s: float
    seconds: float
    sent: dict[tuple[str, str], float]


@dataclass(frozen=True)
class RunOutputs:
    """The outputs of a run other than checkpoints. spikes: only on rank 0, which also deletes old checkpoints."""

    console: Progress
    log: MetricsLog
    spikes: SpikeWatch | None
    exit_record: ExitRecord


def steps(run: Run) -> Iterator[StepReport]:
    """Run steps until train.steps and yield a report of each. The caller logs, saves and validates in between."""
    state, cfg = run.state, run.state.cfg
    skipped = read_ranges(cfg.train.skip_steps)
    timeline_step = min(state.step + cfg.monitor.timeline_step, cfg.train.steps) if cfg.monitor.timeline_step else 0
    while state.step < cfg.train.steps:
        number = state.step + 1
        yield _step(run, skipped=contains(skipped, number), traced=number == timeline_step)


def _step(run: Run, *, skipped: bool, traced: bool) -> StepReport:
    state, world = run.state, run.state.ctx.world
    begin, samples = time.perf_counter(), state.phases.samples(state.step + 1)
    batches = next(run.loader)
    data_s, before = time.perf_counter() - begin, dict(world.traffic)
    result = None
    if skipped:
        state.enter(state.phase)  # as train_step does: a validation of this step is in its phase
        state.step += 1
    else:
        result = train_step(state, batches, traced=traced, num_sources=len(run.data.names))
    seconds = time.perf_counter() - begin
    sent = {key: total - before.get(key, 0.0) for key, total in world.traffic.items()}
    return StepReport(samples, result, data_s, seconds, sent)


def train(resolved: Resolved, ctx: ParallelContext, stop: StopRequest, exit_record: ExitRecord | None = None) -> int:
    """The whole run on one rank; returns the exit code (0: done, 75: saved and stopped on a signal).

    exit_record: written at the end of the run; on an error the caller writes it.
    """
    exit_record = exit_record or ExitRecord(Path(resolved.config.run.dir))
    if not resolved.config.data.train:
        raise ConfigError(
            [
                FieldError(
                    "train.no-data", "data.train", "", "no training data given", "Make some with `engine prepare`."
                )
            ]
        )
    with ExitStack() as stack:
        on_first_rank(
            lambda: _lock_run_folder(Path(resolved.config.run.dir), stack, exit_record), ctx.world, ctx.device
        )
        exit_record.begun = True
        return _train(resolved, ctx, stop, exit_record)


def _lock_run_folder(run_dir: Path, stack: ExitStack, exit_record: ExitRecord) -> None:
    """Lock the run folder; CheckpointError if another run writes there: each would delete the other's partial files."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        reject_links(run_dir)
        holder = stack.enter_context(locked(run_dir / "lock"))
        if holder:
            raise CheckpointError(
                "train.run-folder-in-use",
                f"{run_dir}: another run ({holder}) is writing here; stop it, or choose another --run.dir",
            )
        exit_record.begin()
    except OSError as error:
        where = error.filename or run_dir
        raise CheckpointError(
            "train.run-folder-not-writable",
            f"{where}: {error.strerror}; free space or fix its permissions, or choose another --run.dir",
        ) from None


def _train(resolved: Resolved, ctx: ParallelContext, stop: StopRequest, exit_record: ExitRecord) -> int:
    cfg, run_dir = resolved.config, Path(resolved.config.run.dir)
    console = Progress(cfg, ctx, resolved.derived.phases)
    if _stopped_early(stop, cfg, ctx, console, exit_record):
        return EXIT_REQUEUE
    run = open_run(resolved, ctx)
    for note in run.notes:
        console.note(note)
    if _stopped_early(stop, cfg, ctx, console, exit_record):
        return EXIT_REQUEUE
    state = run.state
    exit_record.step = state.step
    if state.step < cfg.train.steps:
        storage = open_storage(cfg.checkpoint.secret)
        check_space(run_dir / "checkpoints", state.optimizer.states(owned=True), ctx, storage)
    _announce(run, console)
    if run.tokenizer is not None and ctx.rank == 0:
        run.tokenizer.save(run_dir / "tokenizer")  # so export and generate need only the run folder
    with (
        MetricsLog(run_dir, resolved, state.step, enabled=ctx.rank == 0) as log,
        run,
        _saver(state, run_dir / "checkpoints") as saver,
        console,
    ):
        watch = SpikeWatch(run_dir, state.step, state.phases) if ctx.rank == 0 else None
        saver.spike = watch.since if watch else 0
        code, reason = _loop(run, RunOutputs(console, log, watch, exit_record), saver, stop)
    # all ranks wait for this: torchrun kills the others soon after the first has exited
    on_first_rank(lambda: exit_record.write(code, reason), ctx.world, ctx.device)
    return code


def _announce(run: Run, console: Progress) -> None:
    """Print a summary of the run, and notes on anything that the user may not expect."""
    state, data = run.state, run.data
    cfg, ctx = state.cfg, state.ctx
    console.start(state.phases, run.source, num_parameters(cfg.model))
    if run.source and (changed := state.lineage[-1].changed):
        console.note(changed_since(changed, state.scale))
    if state.order_begin:
        console.note(f"the sample order changed at sample {state.order_begin:,}: epochs are counted from there")
    for note in (*data.shares, *data.notes):
        console.note(note)
    ahead = (p for p in state.phases.until(cfg.train.steps) if p.first_step >= state.phase.first_step)
    for phase in ahead:
        plan, where = run.derived.plan_of(phase), f"phase.{phase.number}" if phase.number else "train"
        if plan.microbatches < ctx.pipeline.size:
            enough = ctx.pipeline.size * ctx.samples.size * phase.micro_batch_size
            console.note(
                f"{plan.microbatches} microbatches for {ctx.pipeline.size} pipeline ranks leave a bubble of "
                f"{simulate(plan).bubble:.0%}; {where}.global_batch_size {enough} would give each rank one"
            )
    if uneven := uneven_pipeline(cfg, run.derived):
        console.note(uneven)


def _stopped_early(
    stop: StopRequest, cfg: Config, ctx: ParallelContext, console: Progress, exit_record: ExitRecord
) -> bool:
    """Whether any rank got a stop signal before the first step; if so, prints and records it. Collective."""
    if not _agreed((bool(stop),), ctx)[0]:
        return False

    def record() -> None:
        saved = newest_step(Path(cfg.run.dir) / "checkpoints", open_storage(cfg.checkpoint.secret))
        exit_record.step = saved or 0
        exit_record.write(EXIT_REQUEUE, "stopped on a signal before the first step")
        then = "starts from the beginning" if saved is None else f"resumes from step {saved}"
        if cfg.checkpoint.resume not in ("auto", "latest"):
            then = "starts from the same point"
        console.note(f"stopped on a signal before the first step: nothing to save yet; the same command {then}")

    on_first_rank(record, ctx.world, ctx.device)
    return True


def _saver(state: TrainState, root: Path) -> Saver:
    c = state.cfg.checkpoint
    storage = open_storage(c.secret, encrypt=c.encrypt)
    saver = Saver(root, state.ctx, keep=c.keep, keep_every=c.keep_every, storage=storage)
    if c.every and c.async_save:
        saver.reserve(state.optimizer.states(owned=True))
    state.before_update = saver.wait_copied
    return saver


def _loop(run: Run, outputs: RunOutputs, saver: Saver, stop: StopRequest) -> tuple[int, str]:
    """Run all steps of this start; returns (exit code, reason in one line)."""
    state, cfg, console = run.state, run.state.cfg, outputs.console
    saved = state.step
    if run.evaluator and _validation_missing(state) and not validate(run, outputs, stop):
        return _stopped(state, console, "with its validation")
    for report in steps(run):
        log_step(run, outputs, saver, report)
        outputs.exit_record.step = state.step
        done = state.step == cfg.train.steps
        stopping, busy, failed = _agreed((bool(stop), saver.busy, saver.failed), state.ctx)
        _report_saved(console, saver.advance(busy, failed))
        if stopping or done or (cfg.checkpoint.every and state.step % cfg.checkpoint.every == 0):
            background = cfg.checkpoint.async_save and not (stopping or done)
            save(run, console, saver, background=background, last=stopping or done)
            saved = state.step
        unvalidated = run.evaluator is not None and _validation_due(state)
        if unvalidated and not stopping:  # after the save: a validation may take long, and can be repeated later
            unvalidated = not validate(run, outputs, stop)
            stopping = unvalidated
            if stopping and saver.in_flight == state.step:
                _report_saved(console, saver.finish())
            elif stopping and saved < state.step:
                save(run, console, saver, background=False, last=True)
        if stopping and (unvalidated or not done):
            return _stopped(state, console, "with its validation" if unvalidated else "from there")
    return EXIT_OK, "done"


def _stopped(state: TrainState, console: Progress, how: str) -> tuple[int, str]:
    console.note(f"stopped on a signal after step {state.step}; the same command resumes {how}")
    return EXIT_REQUEUE, "stopped on a signal"


def log_step(run: Run, outputs: RunOutputs, saver: Saver, report: StepReport) -> None:
    """Record a step, show it, and check for a spike of loss or gradient norm."""
    state, result = run.state, report.result
    phase = state.phases.at(state.step)  # of the step of the report; that of the next one may differ
    if state.phases.begins(state.step):
        outputs.console.note(f"step {state.step}: phase {phase.number} begins: {phase}")
    if result is None:
        outputs.log.skipped_step(state.step, state.position.tokens)
        outputs.console.note(f"step {state.step}: skipped (train.skip_steps), its batch is consumed")
        return
    spike, note = False, ""
    if outputs.spikes is not None:
        samples = f"{report.samples.start}-{report.samples.stop - 1}"
        spike, note = outputs.spikes.observe(state.step, result.loss, result.norms.norm, samples)
        saver.spike = outputs.spikes.since
    record = outputs.log.step(
        state.step,
        result.loss,
        result.norms.norm,
        result.lr,
        state.position.tokens,
        outputs.console.rates(state.step, result.tokens, report.seconds)
        | {"data_s": report.data_s}
        | result.sums
        | {f"loss_{run.data.names[k]}": loss for k, loss in result.by_source.items()}
        | ({"spike": 1.0} if spike else {})
        | ({"global_batch_size": len(report.samples)} if state.cfg.phase else {})
        | {f"bytes_{axis}_{collective}": count for (axis, collective), count in sorted(report.sent.items()) if count}
        | _scale(state, result),
    )
    outputs.console.step(record)
    if note:
        outputs.console.note(note)
    if result.skipped:
        outputs.console.note(f"step {state.step}: a gradient overflowed in fp16: step skipped, loss scale halved")
    if result.trace is not None:
        write_timeline(Path(state.cfg.run.dir), run.derived.plan_of(phase), result.trace, state.ctx, state.step)


def _validation_due(state: TrainState) -> bool:
    """Whether this step is to be followed by a validation, if there is a validation corpus."""
    every = state.cfg.eval.every
    return state.step == state.cfg.train.steps or bool(every and state.step % every == 0)


def _validation_missing(state: TrainState) -> bool:
    """Whether an earlier start stopped after this step but before its validation. Collective."""
    ctx, run = state.ctx, Path(state.cfg.run.dir)
    return _validation_due(state) and on_first_rank(lambda: lacks_validation(run, state.step), ctx.world, ctx.device)


def validate(run: Run, outputs: RunOutputs, stop: StopRequest) -> bool:
    """Score the validation corpus; False, and no record, if a signal arrived on any rank meanwhile. Collective."""
    state = run.state
    assert run.evaluator is not None
    score = run.evaluator.run_unless(lambda: _agreed((bool(stop),), state.ctx)[0], state.cfg.eval.batches)
    if score is None:
        return False
    outputs.log.validation(state.step, score)
    outputs.console.note(f"step {state.step}: validation {score}")
    return True


def _scale(state: TrainState, result: StepResult) -> dict[str, float]:
    """In fp16: the loss scale after the step, and whether the step was skipped."""
    return {"loss_scale": state.scale.value, "skipped": float(result.skipped)} if state.scale.window else {}


def _agreed(flags: tuple[bool, ...], ctx: ParallelContext) -> tuple[bool, ...]:
    """For each flag, whether any rank has set it. Collective."""
    if ctx.world.size == 1:
        return flags  # avoids a synchronisation with the GPU
    values = torch.tensor([float(flag) for flag in flags], device=ctx.device)
    return tuple(bool(value) for value in all_reduce_(values, ctx.world, "max").tolist())


def save(run: Run, console: Progress, saver: Saver, *, background: bool, last: bool) -> None:
    """Save this step: wait for a save in progress, then start this one, in the background or waiting for its end."""
    state = run.state
    if saver.in_flight is not None:
        _report_saved(console, saver.finish())
    states, fields = state.optimizer.states(owned=True), manifest_fields(state, run.data.metadata)
    saver.start(states, step=state.step, metadata=fields, background=background, loss_unknown=not (background or last))
    if background:
        console.note(f"step {state.step}: saving in the background")
    else:
        _report_saved(console, saver.finish())


def _report_saved(console: Progress, saved: SavedCheckpoint | None) -> None:
    if saved is not None:
        console.note(f"step {saved.step}: saved {saved.folder}")
        for note in saved.notes:
            console.note(note)
