"""Training: setup, step, loop.

`setup` builds everything a rank needs from a config and a context; `train_step` is one optimizer step; `train` is the
loop around it with saving, validation, progress and the orderly stop on a signal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.convert import copy_beside, open_source
from engine.checkpoint.format import MODEL, Ancestor, find, newest, step_dir
from engine.checkpoint.hf import HfReader
from engine.checkpoint.lineage import code_versions, descend, differences, refuse
from engine.checkpoint.load import Reader, Source, load_into
from engine.checkpoint.save import Saved, Saver, save
from engine.checkpoint.seal import storage_of
from engine.checkpoint.storage import DISK, Storage
from engine.comm import all_reduce_, gather_json, on_first_rank, raise_together
from engine.config import Config, pipeline_plan
from engine.context import ParallelContext
from engine.data.corpora import TrainingData, open_data, open_training
from engine.data.loader import Loader, MicroBatch
from engine.data.tokenizer import Tokenizer
from engine.errors import EXIT_OK, EXIT_REQUEUE, CheckpointError, ConfigError, DataError, EngineError, Fault
from engine.evaluate import Evaluator, Score
from engine.files import locked
from engine.launch import StopRequest
from engine.model.transformer import Transformer, build_stages, num_parameters, tensor_shapes
from engine.monitor.health import explain_non_finite
from engine.monitor.metrics import MetricsLog
from engine.monitor.progress import Progress
from engine.monitor.trace import write_timeline
from engine.ops.attention import chosen
from engine.ops.fp8 import check_device
from engine.ops.native import keep_freed_memory
from engine.optim.adamw import FlatAdamW
from engine.optim.clip import GradNorms, NormCounter, clip_factor
from engine.optim.lr import learning_rate
from engine.optim.precision import PRECISIONS, LossScale
from engine.parallel.buckets import GradBuckets, make_buckets, settle_before_use
from engine.pipeline.actions import Plan
from engine.pipeline.executor import Trace, execute
from engine.pipeline.simulate import simulate
from engine.pipeline.stage import Stage
from engine.planner.cost import flops_per_token, uneven_pipeline
from engine.resolve import Resolved
from engine.sharding import Parameter, initialise_, parameters


@dataclass
class TrainState:
    """One rank's share of a run. step: updates done; consumed_*: over all ranks since the beginning of the run.

    stages: the pipeline stages on this rank by number; params: of all of them, each once. before_update: returns when
    weights and moments may change (a save in the background may still be copying them).
    """

    cfg: Config
    ctx: ParallelContext
    plan: Plan
    stages: dict[int, Stage]
    params: list[Parameter]
    buckets: list[GradBuckets]
    optimizer: FlatAdamW
    norms: NormCounter
    scale: LossScale
    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    lineage: tuple[Ancestor, ...] = ()
    before_update: Callable[[], None] = lambda: None

    def settle(self) -> None:
        """Return when all weights of this rank are there (ZeRO-1 may still gather them after a step)."""
        for stage in self.buckets:
            stage.settle()


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports: mean loss in nats a counted token, norms before clipping, rate, tokens.

    skipped: a gradient overflowed in fp16 and no weight was changed. trace: of the executor if asked for.
    by_source: source of a blend -> its mean loss, of those that had a counted token in this step.
    """

    loss: float
    norms: GradNorms
    lr: float
    tokens: int
    skipped: bool = False
    trace: Trace | None = None
    by_source: dict[int, float] = field(default_factory=dict)


def setup(cfg: Config, ctx: ParallelContext) -> TrainState:
    """Stages, flat buckets, optimizer and checked plan of this rank, with initial weights. `cfg` is resolved."""
    keep_freed_memory()
    check_means(cfg, ctx)
    plan = pipeline_plan(cfg)
    stages: dict[int, Stage] = {}
    params: list[Parameter] = []
    for number, model, fresh in build_stages(cfg, ctx, plan.stages_of(ctx.pipeline.rank)):
        if not cfg.checkpoint.init:  # else `start_from` fills them
            initialise_(fresh, ctx, cfg.train.seed)
        buckets = make_buckets(
            fresh,
            ctx,
            grad_dtype=PRECISIONS[cfg.train.precision].main,
            bucket_bytes=int(cfg.parallel.bucket_mib * 2**20),
            overlap=cfg.parallel.overlap,
            zero=cfg.parallel.zero == 1,
            reduce_dtype=torch.bfloat16 if cfg.parallel.reduce_dtype == "bf16" else None,
        )
        shape = model.shape
        stages[number] = Stage(model, parameters(model), buckets, cfg.model.hidden_size, shape.first, shape.last)
        params += fresh
    all_buckets = [stage.buckets for stage in stages.values() if stage.buckets is not None]
    settle_before_use([stage.module for stage in stages.values() if isinstance(stage.module, Transformer)], all_buckets)
    optimizer = FlatAdamW(all_buckets, cfg.optimizer, overlap=cfg.parallel.overlap_gather)
    norms = NormCounter(all_buckets, ctx, list(tensor_shapes(cfg.model)))
    fp16 = cfg.train.precision == "fp16"
    scale = LossScale(cfg.train.loss_scale, cfg.train.loss_scale_window) if fp16 else LossScale()
    return TrainState(cfg, ctx, plan, stages, params, all_buckets, optimizer, norms, scale)


def check_means(cfg: Config, ctx: ParallelContext) -> None:
    """Whether this device can do what train.attention and train.fp8 ask for, and all ranks do the same. Collective.

    ConfigError where it cannot, or where ranks would choose differently because one has a package that another lacks.
    """
    check_device(cfg, ctx.device)
    apart, wanted = cfg.data.separate_documents, cfg.train.attention
    mine = chosen(ctx.device, ctx.dtype, cfg.model.head_dim, documents=apart, wanted=wanted)
    names = gather_json(mine, ctx.world, ctx.device)
    if len(set(names)) > 1:
        found = ", ".join(f"{name} on rank {names.index(name)}" for name in dict.fromkeys(names))
        repair = f"Install the same packages everywhere, or set train.attention {sorted(set(names))[0]}."
        raise ConfigError([Fault("train.attention", wanted, f"chooses {found}", repair)])


def train_step(
    state: TrainState, batches: Sequence[MicroBatch], *, traced: bool = False, num_sources: int = 0
) -> StepResult:
    """One optimizer step on this data rank's microbatches; identical results on all ranks.

    num_sources: of a blend, to tell their losses apart.

    The loss is sum of token losses / counted tokens over the whole global batch, and the count is known before the
    forward. A non-finite loss or gradient raises TrainingError on every rank before any weight has changed; in fp16 a
    non-finite gradient only leaves this update out and halves the loss scale.
    """
    cfg, ctx, scale = state.cfg, state.ctx, state.scale.value
    tokens = count_tokens(batches, ctx)  # on the host: a GPU would have to be waited for
    batches = [b.to(ctx.device) for b in batches]
    for stage in state.buckets:
        stage.zero_grad()
    trace = Trace(ctx.device) if traced else None
    losses = execute(state.plan, state.stages, ctx, batches, scale / tokens, trace)
    for stage in state.buckets:
        stage.wait()
    summed = sum_losses(losses, ctx)
    norms = state.norms(scale)  # the one place where the host waits for a GPU: all that is to be read is there then
    loss = float(summed) / scale
    finite = math.isfinite(norms.norm)
    state.scale.update(finite)
    if not math.isfinite(loss) or not (finite or (state.scale.window and state.scale.value >= 1)):
        explain_non_finite(
            state.plan,
            state.stages,
            state.params,
            ctx,
            batches,
            scale / tokens,
            state.step + 1,
            loss,
            norms.non_finite(),
        )
    lr = learning_rate(state.step + 1, cfg.train.steps, cfg.optimizer, cfg.schedule)
    if finite:
        state.before_update()
        state.optimizer.step(lr, clip_factor(norms.norm, cfg.optimizer.clip_norm) / scale)
    state.step += 1
    state.consumed_samples += cfg.train.global_batch_size
    state.consumed_tokens += cfg.train.global_batch_size * cfg.train.seq_len
    by_source = losses_by_source(losses * (tokens / scale), batches, state, num_sources) if num_sources else {}
    return StepResult(loss, norms, lr, tokens, not finite, trace, by_source)


def count_tokens(batches: Sequence[MicroBatch], ctx: ParallelContext) -> int:
    """Tokens that count in the loss, over the microbatches of all data ranks."""
    total = sum(int(b.mask.sum()) for b in batches)
    if ctx.data.size > 1:  # over the world: the data axis may still gather the weights of the step before
        speaks = ctx.tensor.rank == ctx.pipeline.rank == 0
        total = int(all_reduce_(torch.tensor(total * speaks, device=ctx.device), ctx.world).item())
    if total == 0:
        raise DataError("no token of this global batch counts in the loss: every mask is empty; look at the data")
    return total


def sum_losses(losses: torch.Tensor, ctx: ParallelContext) -> torch.Tensor:
    """The sum of all microbatches' losses over all data ranks, as weighted; they are zero off the last stage.

    Of the tensor ranks, which all have them, one speaks.
    """
    return all_reduce_(losses.sum() * float(ctx.tensor.rank == 0), ctx.world)


def losses_by_source(
    losses: torch.Tensor, batches: Sequence[MicroBatch], state: TrainState, num_sources: int
) -> dict[int, float]:
    """Source -> sum of its token losses / its counted tokens, over the whole global batch. Collective.

    losses [microbatches, b]: of each sample the sum of its token losses in nats.
    """
    ctx = state.ctx
    sums = torch.zeros(2, num_sources, dtype=torch.float64, device=ctx.device)
    last = state.plan.rank_of(state.plan.num_stages - 1)
    if ctx.tensor.rank == 0 and ctx.pipeline.rank == last:
        for row, batch in zip(losses, batches):
            assert batch.sources is not None
            sums[0].index_add_(0, batch.sources, row)
            sums[1].index_add_(0, batch.sources, batch.mask.sum(1).double())
    total, counted = all_reduce_(sums, ctx.world).tolist()
    return {k: total[k] / counted[k] for k in range(num_sources) if counted[k]}


def save_state(state: TrainState, root: Path, data_facts: dict[str, Any]) -> Path:
    """Save a checkpoint of the state as it is and wait until it is there. Collective."""
    c = state.cfg.checkpoint
    states, facts = state.optimizer.states(owned=True), facts_of(state, data_facts)
    storage, step = storage_of(c.secret, encrypt=c.encrypt), state.step
    return save(root, states, state.ctx, step=step, facts=facts, keep=c.keep, keep_every=c.keep_every, storage=storage)


def facts_of(state: TrainState, data_facts: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of a state beside its tensors."""
    return {
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_tokens,
        "optimizer": {
            "steps": state.optimizer.steps,
            "loss_scale": state.scale.value,
            "good_steps": state.scale.good,
        },
        "config": state.cfg.model_dump(),
        "data": data_facts,
        "versions": code_versions(),
        "lineage": state.lineage,
    }


def resume(state: TrainState, folder: Path, data_facts: dict[str, Any], storage: Storage = DISK) -> None:
    """Go on from a checkpoint of any layout: weights, optimizer, step and data position. Collective.

    Refuses, with a list of old and new values, when model, data, sequence length or seed differ and are not allowed to.
    """
    with Reader(folder, storage) as reader:
        manifest = reader.manifest
        if reader.names(MODEL) and not reader.names("exp_avg"):
            raise CheckpointError(
                f"{folder} holds weights only, such as an import does: start a new run from it with "
                f"--checkpoint.init {folder} and another --run.dir"
            )
        allowed = refuse(folder, differences(manifest, state.cfg, data_facts), state.cfg)
        load_into(reader, state.optimizer.states(), state.ctx)
    state.optimizer.publish()
    state.step = manifest.step
    state.optimizer.steps = int(manifest.optimizer.get("steps", manifest.step))
    if state.scale.window and "loss_scale" in manifest.optimizer:
        state.scale.value, state.scale.good = manifest.optimizer["loss_scale"], int(manifest.optimizer["good_steps"])
    state.consumed_samples, state.consumed_tokens = manifest.consumed_samples, manifest.consumed_tokens
    state.lineage = descend(folder, manifest, allowed)


def start_from(state: TrainState, path: Path) -> Path:
    """Take the weights of a Hugging Face folder or a checkpoint of any layout; the optimizer is new. Collective.

    Returns the folder they were in.
    """
    ctx = state.ctx
    error: EngineError | None = None
    source: Source[Any] | None = None
    try:
        source = open_source(path, state.cfg.model.max_seq_len, storage_of(state.cfg.checkpoint.secret))
        if ctx.rank == 0 and isinstance(source, HfReader):
            source.check_spare_head()
    except EngineError as fault:
        error = fault
    raise_together(error, ctx.world, ctx.device)
    assert source is not None
    with source:
        if isinstance(source, Reader):
            state.lineage = descend(source.folder, source.manifest, {"optimizer state": ("there", "new")})
        load_into(source, (held for held in state.optimizer.states() if held.kind == MODEL), ctx)
    state.optimizer.publish()
    return source.folder


def find_resume(cfg: Config) -> str:
    """The checkpoint to go on from, by checkpoint.resume; empty to start anew."""
    wanted, run = cfg.checkpoint.resume, Path(cfg.run.dir)
    storage = storage_of(cfg.checkpoint.secret)
    if wanted not in ("auto", "never"):
        return str(find(run if wanted == "latest" else Path(wanted), storage))
    have = newest(run / "checkpoints", storage)
    if wanted == "never" and have is not None:
        raise CheckpointError(
            f"{run} already holds checkpoints (newest: step {have}) and checkpoint.resume is never: "
            "choose another --run.dir, or resume"
        )
    return "" if have is None else str(step_dir(run / "checkpoints", have))


def train(resolved: Resolved, ctx: ParallelContext, stop: StopRequest) -> int:
    """The whole run on one rank; returns the exit code (0 done, 75 saved on a signal)."""
    if not resolved.config.data.train:
        raise ConfigError([Fault("data.train", "", "no training data given", "Make some with `engine prepare`.")])
    with ExitStack() as stack:
        on_first_rank(lambda: _claim(Path(resolved.config.run.dir), stack), ctx.world, ctx.device)
        return _train(resolved, ctx, stop)


def _claim(run_dir: Path, stack: ExitStack) -> None:
    """Refuse a folder that another run is writing into: each would remove what the other has half written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        holder = stack.enter_context(locked(run_dir / "lock"))
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}; choose another --run.dir") from None
    if holder:
        raise CheckpointError(f"{run_dir}: another run ({holder}) is writing here; end it, or choose another --run.dir")


def _train(resolved: Resolved, ctx: ParallelContext, stop: StopRequest) -> int:
    cfg, run_dir = resolved.config, Path(resolved.config.run.dir)
    tokenizer = Tokenizer.load(Path(cfg.data.tokenizer)) if cfg.data.tokenizer else None
    data = open_training(cfg, tokenizer)
    state = setup(cfg, ctx)
    source = on_first_rank(lambda: find_resume(cfg), ctx.world, ctx.device)
    if source:
        resume(state, Path(source), data.facts, storage_of(cfg.checkpoint.secret))
    elif cfg.checkpoint.init:
        begun = start_from(state, Path(cfg.checkpoint.init))
        if ctx.rank == 0:
            copy_beside(begun, run_dir)
    evaluator = None
    if cfg.data.valid:
        evaluator = Evaluator(state.plan, state.stages, ctx, open_data(cfg.data.valid, cfg, tokenizer), cfg)
    console = Progress(cfg, ctx, flops_per_token(cfg.model, cfg.train.seq_len))
    console.start(state.step, source, num_parameters(cfg.model))
    for note in data.notes:
        console.note(note)
    if state.plan.microbatches < ctx.pipeline.size:
        enough = ctx.pipeline.size * ctx.data.size * cfg.train.micro_batch_size
        console.note(
            f"{state.plan.microbatches} microbatches for {ctx.pipeline.size} pipeline ranks leave a bubble of "
            f"{simulate(state.plan).bubble:.0%}; train.global_batch_size {enough} would give each rank one"
        )
    if uneven := uneven_pipeline(cfg, state.plan):
        console.note(uneven)
    if tokenizer is not None and ctx.rank == 0:
        tokenizer.save(run_dir / "tokenizer")  # a run folder is whole: export and generate need nothing else
    with (
        MetricsLog(run_dir, resolved, state.step, enabled=ctx.rank == 0) as log,
        _loader(state, data) as loader,
        _saver(state, run_dir / "checkpoints") as saver,
        console,
    ):
        code, reason = _loop(state, loader, evaluator, log, console, stop, data, saver)
        log.exit(code, reason)
    return code


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
) -> tuple[int, str]:
    cfg, ctx = state.cfg, state.ctx
    timeline_step = min(state.step + cfg.monitor.timeline_step, cfg.train.steps) if cfg.monitor.timeline_step else 0
    while state.step < cfg.train.steps:
        begin = time.perf_counter()
        batches = next(loader)
        data_s = time.perf_counter() - begin
        sent = dict(ctx.world.traffic)
        result = train_step(state, batches, traced=state.step + 1 == timeline_step, num_sources=len(data.names))
        seconds = time.perf_counter() - begin
        record = log.step(
            state.step,
            result.loss,
            result.norms.norm,
            result.lr,
            state.consumed_tokens,
            console.rates(result.tokens, seconds)
            | {"data_s": data_s}
            | {f"loss_{data.names[k]}": loss for k, loss in result.by_source.items()}
            | _sent_since(sent, ctx)
            | _scale(state, result),
        )
        console.step(record)
        if result.skipped:
            console.note(f"step {state.step}: a gradient overflowed in fp16, update left out, loss scale halved")
        if result.trace is not None:
            write_timeline(Path(cfg.run.dir), state.plan, result.trace, ctx, state.step)
        done = state.step == cfg.train.steps
        if evaluator and (done or (cfg.train.eval_every and state.step % cfg.train.eval_every == 0)):
            score: Score = evaluator.run(0 if done else cfg.train.eval_batches)
            log.validation(state.step, score)
            console.note(f"step {state.step}: validation {score}")
        stopping, busy, failed = _agreed((bool(stop), saver.busy, saver.failed), ctx)
        _tell(console, saver.advance(busy, failed))
        last = stopping or done
        if last or (cfg.checkpoint.every and state.step % cfg.checkpoint.every == 0):
            _save(state, saver, data.facts, console, background=cfg.checkpoint.async_save and not last)
        if stopping and not done:
            console.note(f"stopped on a signal after step {state.step}; the same command goes on from there")
            return EXIT_REQUEUE, "stopped on a signal"
    return EXIT_OK, "done"


def _sent_since(before: dict[tuple[str, str], float], ctx: ParallelContext) -> dict[str, float]:
    """Bytes that this rank has sent since, as `bytes_<axis>_<collective>` (engine.comm says how they are counted)."""
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


def _save(state: TrainState, saver: Saver, data_facts: dict[str, Any], console: Progress, *, background: bool) -> None:
    """Save this step: wait for a save that is still under way, then begin this one, and wait for it or do not."""
    if saver.in_flight is not None:
        _tell(console, saver.finish())
    states, facts = state.optimizer.states(owned=True), facts_of(state, data_facts)
    saver.start(states, step=state.step, facts=facts, background=background)
    if background:
        console.note(f"step {state.step}: saving in the background")
    else:
        _tell(console, saver.finish())


def _tell(console: Progress, saved: Saved | None) -> None:
    if saved is not None:
        console.note(f"step {saved.step}: saved {saved.folder}")
        for note in saved.notes:
            console.note(note)
