"""The run: setup, and the loop around `train_step` with saving, validation, progress and the stop on a signal."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.format import newest, read_manifest
from engine.checkpoint.links import refuse_links
from engine.checkpoint.save import Saved, Saver, check_room
from engine.checkpoint.seal import storage_of
from engine.config.load import Resolved
from engine.config.schema import Config
from engine.config.skips import holds, read_ranges
from engine.data.samples.corpora import TrainingData, follow, open_data, open_training
from engine.data.samples.loader import Loader
from engine.data.tokenize.tokenizer import Tokenizer
from engine.distributed.collectives import all_reduce_, on_first_rank
from engine.distributed.context import ParallelContext
from engine.errors import EXIT_OK, EXIT_REQUEUE, CheckpointError, ConfigError, Fault
from engine.interop.huggingface.companions import copy_beside
from engine.model.transformer import num_parameters
from engine.monitor.ending import Ending
from engine.monitor.metrics import MetricsLog, lacks_validation
from engine.monitor.progress import Progress
from engine.monitor.spikes import SpikeWatch
from engine.pipeline.simulate import simulate
from engine.pipeline.trace import write_timeline
from engine.planner.flops import flops_per_token, uneven_pipeline
from engine.train.evaluate import Evaluator
from engine.train.step import (
    StepResult,
    TrainState,
    changed_since,
    facts_of,
    go_on,
    leave_behind,
    setup,
    start_from,
    train_step,
)
from engine.util.files import locked
from engine.util.signals import StopRequest


def train(resolved: Resolved, ctx: ParallelContext, stop: StopRequest, ending: Ending | None = None) -> int:
    """The whole run on one rank; returns the exit code (0 done, 75 saved on a signal).

    ending: takes note of how it ends; an error is for the caller to write there.
    """
    ending = ending or Ending(Path(resolved.config.run.dir))
    if not resolved.config.data.train:
        raise ConfigError([Fault("", "data.train", "", "no training data given", "Make some with `engine prepare`.")])
    with ExitStack() as stack:
        on_first_rank(lambda: _claim(Path(resolved.config.run.dir), stack, ending), ctx.world, ctx.device)
        ending.begun = True
        return _train(resolved, ctx, stop, ending)


def _claim(run_dir: Path, stack: ExitStack, ending: Ending) -> None:
    """Refuse a folder that another run is writing into: each would remove what the other has half written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        refuse_links(run_dir)
        holder = stack.enter_context(locked(run_dir / "lock"))
        if holder:
            raise CheckpointError(
                f"{run_dir}: another run ({holder}) is writing here; end it, or choose another --run.dir"
            )
        ending.begin()
    except OSError as error:
        where = error.filename or run_dir
        raise CheckpointError(f"{where}: {error.strerror}; make room, or choose another --run.dir") from None


def _train(resolved: Resolved, ctx: ParallelContext, stop: StopRequest, ending: Ending) -> int:
    cfg, run_dir = resolved.config, Path(resolved.config.run.dir)
    console = Progress(cfg, ctx, flops_per_token(cfg.model, cfg.train.seq_len))
    if _stopped_early(stop, cfg, ctx, console, ending):
        return EXIT_REQUEUE
    tokenizer = Tokenizer.load(Path(cfg.data.tokenizer)) if cfg.data.tokenizer else None
    data = open_training(cfg, tokenizer)
    state = setup(cfg, ctx, resolved.derived)
    source = go_on(state, data.facts)
    if source:
        past = read_manifest(Path(source), storage_of(cfg.checkpoint.secret)).data
        data = follow(data, cfg, state.step, state.consumed_samples, past)
    data.order.begin_at(state.order_begin)
    if not source and cfg.checkpoint.init:
        begun, notes = start_from(state, Path(cfg.checkpoint.init))
        on_first_rank(lambda: copy_beside(begun, run_dir), ctx.world, ctx.device)
        for note in notes:
            console.note(note)
    if _stopped_early(stop, cfg, ctx, console, ending):
        return EXIT_REQUEUE
    ending.step = state.step
    if state.step < cfg.train.steps:
        storage = storage_of(cfg.checkpoint.secret)
        check_room(run_dir / "checkpoints", state.optimizer.states(owned=True), ctx, storage)
    evaluator = None
    if cfg.data.valid:
        evaluator = Evaluator(state.plan, state.stages, ctx, open_data(cfg.data.valid, cfg, tokenizer), cfg)
    console.start(state.step, source, num_parameters(cfg.model))
    if source and (changed := state.lineage[-1].changed):
        console.note(changed_since(changed, state.scale))
    if state.order_begin:
        console.note(f"the sample order is another since sample {state.order_begin:,}: epochs are counted from there")
    for note in (*data.shares, *data.notes):
        console.note(note)
    if state.plan.microbatches < ctx.pipeline.size:
        enough = ctx.pipeline.size * ctx.data.size * cfg.train.micro_batch_size
        console.note(
            f"{state.plan.microbatches} microbatches for {ctx.pipeline.size} pipeline ranks leave a bubble of "
            f"{simulate(state.plan).bubble:.0%}; train.global_batch_size {enough} would give each rank one"
        )
    if uneven := uneven_pipeline(cfg, resolved.derived):
        console.note(uneven)
    if tokenizer is not None and ctx.rank == 0:
        tokenizer.save(run_dir / "tokenizer")  # a run folder is whole: export and generate need nothing else
    with (
        MetricsLog(run_dir, resolved, state.step, enabled=ctx.rank == 0) as log,
        _loader(state, data) as loader,
        _saver(state, run_dir / "checkpoints") as saver,
        console,
    ):
        watch = SpikeWatch(run_dir, state.step) if ctx.rank == 0 else None
        saver.spike = watch.since if watch else 0
        code, reason = _loop(state, loader, evaluator, log, console, stop, data, saver, watch, ending)
    # the others wait: torchrun ends all ranks soon after the first has left
    on_first_rank(lambda: ending.write(code, reason), ctx.world, ctx.device)
    return code


def _stopped_early(stop: StopRequest, cfg: Config, ctx: ParallelContext, console: Progress, ending: Ending) -> bool:
    """Whether any rank was asked to stop before the first step; says so then. Collective."""
    if not _agreed((bool(stop),), ctx)[0]:
        return False

    def tell() -> None:
        saved = newest(Path(cfg.run.dir) / "checkpoints", storage_of(cfg.checkpoint.secret))
        ending.step = saved or 0
        ending.write(EXIT_REQUEUE, "stopped on a signal before the first step")
        then = "begins anew" if saved is None else f"goes on from step {saved}"
        if cfg.checkpoint.resume not in ("auto", "latest"):
            then = "begins where this one did"
        console.note(f"stopped on a signal before the first step: nothing to save yet; the same command {then}")

    on_first_rank(tell, ctx.world, ctx.device)
    return True


def _saver(state: TrainState, root: Path) -> Saver:
    c = state.cfg.checkpoint
    storage = storage_of(c.secret, encrypt=c.encrypt)
    saver = Saver(root, state.ctx, keep=c.keep, keep_every=c.keep_every, storage=storage)
    if c.every and c.async_save:
        saver.reserve(state.optimizer.states(owned=True))
    state.before_update = saver.copied
    return saver


def _loader(state: TrainState, data: TrainingData) -> Loader:
    cfg, ctx = state.cfg, state.ctx
    return Loader(
        data.order,
        global_batch_size=cfg.train.global_batch_size,
        micro_batch_size=cfg.train.micro_batch_size,
        data_rank=ctx.data.rank,
        data_size=ctx.data.size,
        start_sample=state.consumed_samples,
        prefetch=cfg.data.prefetch,
        mask=data.mask,
        separate_eod=data.separate_eod,
        fim=data.fim,
        skip=read_ranges(cfg.data.skip_samples),
    )


def _loop(
    state: TrainState,
    loader: Loader,
    evaluator: Evaluator | None,
    log: MetricsLog,
    console: Progress,
    stop: StopRequest,
    data: TrainingData,
    saver: Saver,
    watch: SpikeWatch | None,
    ending: Ending,
) -> tuple[int, str]:
    cfg, ctx = state.cfg, state.ctx
    saved = state.step
    if evaluator and _left_out(state) and not _validate(state, evaluator, log, console, stop):
        return _stopped(state, console, "with its validation")
    timeline_step = min(state.step + cfg.monitor.timeline_step, cfg.train.steps) if cfg.monitor.timeline_step else 0
    skipped = read_ranges(cfg.train.skip_steps)
    while state.step < cfg.train.steps:
        if holds(skipped, state.step + 1):
            next(loader)
            leave_behind(state)
            log.left_out(state.step, state.consumed_tokens)
            console.note(f"step {state.step}: left out (train.skip_steps), its batch is consumed")
        else:
            traced = state.step + 1 == timeline_step
            _step(state, loader, log, console, data, saver, watch, traced=traced)
        ending.step = state.step
        done = state.step == cfg.train.steps
        stopping, busy, failed = _agreed((bool(stop), saver.busy, saver.failed), ctx)
        _tell(console, saver.advance(busy, failed))
        if stopping or done or (cfg.checkpoint.every and state.step % cfg.checkpoint.every == 0):
            background = cfg.checkpoint.async_save and not (stopping or done)
            _save(state, saver, data.facts, console, background=background, last=stopping or done)
            saved = state.step
        unvalidated = evaluator is not None and _validation_due(state)
        if evaluator and unvalidated and not stopping:  # after the save: it may take long, and can be made later
            unvalidated = not _validate(state, evaluator, log, console, stop)
            stopping = unvalidated
            if stopping and saver.in_flight == state.step:
                _tell(console, saver.finish())
            elif stopping and saved < state.step:
                _save(state, saver, data.facts, console, background=False, last=True)
        if stopping and (unvalidated or not done):
            return _stopped(state, console, "with its validation" if unvalidated else "from there")
    return EXIT_OK, "done"


def _stopped(state: TrainState, console: Progress, how: str) -> tuple[int, str]:
    console.note(f"stopped on a signal after step {state.step}; the same command goes on {how}")
    return EXIT_REQUEUE, "stopped on a signal"


def _step(
    state: TrainState,
    loader: Loader,
    log: MetricsLog,
    console: Progress,
    data: TrainingData,
    saver: Saver,
    watch: SpikeWatch | None,
    *,
    traced: bool,
) -> None:
    """One optimizer step, and what is told of it."""
    cfg, ctx = state.cfg, state.ctx
    begin, first = time.perf_counter(), state.consumed_samples
    batches = next(loader)
    data_s = time.perf_counter() - begin
    sent = dict(ctx.world.traffic)
    result = train_step(state, batches, traced=traced, num_sources=len(data.names))
    seconds = time.perf_counter() - begin
    spike, note = False, ""
    if watch is not None:  # it tells of rank 0, and only that one deletes checkpoints
        samples = f"{first}-{state.consumed_samples - 1}"
        spike, note = watch.see(state.step, result.loss, result.norms.norm, samples)
        saver.spike = watch.since
    record = log.step(
        state.step,
        result.loss,
        result.norms.norm,
        result.lr,
        state.consumed_tokens,
        console.rates(result.tokens, seconds)
        | {"data_s": data_s}
        | {f"loss_{data.names[k]}": loss for k, loss in result.by_source.items()}
        | ({"spike": 1.0} if spike else {})
        | _sent_since(sent, ctx)
        | _scale(state, result),
    )
    console.step(record)
    if note:
        console.note(note)
    if result.skipped:
        console.note(f"step {state.step}: a gradient overflowed in fp16, update left out, loss scale halved")
    if result.trace is not None:
        write_timeline(Path(cfg.run.dir), state.plan, result.trace, ctx, state.step)


def _validation_due(state: TrainState) -> bool:
    """Whether a validation belongs after this step, if there is a corpus for it."""
    every = state.cfg.eval.every
    return state.step == state.cfg.train.steps or bool(every and state.step % every == 0)


def _left_out(state: TrainState) -> bool:
    """Whether an earlier start was stopped between this step and its validation. Collective."""
    ctx, run = state.ctx, Path(state.cfg.run.dir)
    return _validation_due(state) and on_first_rank(lambda: lacks_validation(run, state.step), ctx.world, ctx.device)


def _validate(state: TrainState, evaluator: Evaluator, log: MetricsLog, console: Progress, stop: StopRequest) -> bool:
    """Score the validation corpus; False, and no record, if a signal came on any rank meanwhile. Collective."""
    score = evaluator.run_unless(lambda: _agreed((bool(stop),), state.ctx)[0], state.cfg.eval.batches)
    if score is None:
        return False
    log.validation(state.step, score)
    console.note(f"step {state.step}: validation {score}")
    return True


def _sent_since(before: dict[tuple[str, str], float], ctx: ParallelContext) -> dict[str, float]:
    """Bytes that this rank has sent since, as `bytes_<axis>_<collective>` (collectives.py: how they are counted)."""
    sent = {key: total - before.get(key, 0.0) for key, total in ctx.world.traffic.items()}
    return {f"bytes_{axis}_{collective}": count for (axis, collective), count in sorted(sent.items()) if count}


def _scale(state: TrainState, result: StepResult) -> dict[str, float]:
    """fp16: the loss scale after the step, and whether its update was left out."""
    return {"loss_scale": state.scale.value, "skipped": float(result.skipped)} if state.scale.window else {}


def _agreed(flags: tuple[bool, ...], ctx: ParallelContext) -> tuple[bool, ...]:
    """Of each flag, whether any rank has it set."""
    if ctx.world.size == 1:
        return flags  # a GPU would have to be waited for
    values = torch.tensor([float(flag) for flag in flags], device=ctx.device)
    return tuple(bool(value) for value in all_reduce_(values, ctx.world, "max").tolist())


def _save(
    state: TrainState, saver: Saver, data_facts: dict[str, Any], console: Progress, *, background: bool, last: bool
) -> None:
    """Save this step: wait for a save that is still under way, then begin this one, and wait for it or do not."""
    if saver.in_flight is not None:
        _tell(console, saver.finish())
    states, facts = state.optimizer.states(owned=True), facts_of(state, data_facts)
    saver.start(states, step=state.step, facts=facts, background=background, unproven=not (background or last))
    if background:
        console.note(f"step {state.step}: saving in the background")
    else:
        _tell(console, saver.finish())


def _tell(console: Progress, saved: Saved | None) -> None:
    if saved is not None:
        console.note(f"step {saved.step}: saved {saved.folder}")
        for note in saved.notes:
            console.note(note)
