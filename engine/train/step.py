"""Training: setup, step, and how a state is saved and resumed.

`setup` builds everything a rank needs from a config and a context; `train_step` is one optimizer step; the loop around
them is engine.train.loop.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.format import MODEL, Ancestor, find, newest, step_dir, steps_descending
from engine.checkpoint.lineage import (
    ORDER_BEGIN,
    changes,
    code_versions,
    descend,
    differences,
    order_begin,
    refuse,
)
from engine.checkpoint.load import Reader, TensorSource, load_into
from engine.checkpoint.save import save
from engine.checkpoint.seal import storage_of
from engine.checkpoint.storage import DISK, Storage
from engine.config.derived import Derived, derive
from engine.config.schema import Config
from engine.data.samples.loader import MicroBatch
from engine.distributed.collectives import all_reduce_, gather_json, on_first_rank, raise_together
from engine.distributed.context import ParallelContext
from engine.distributed.sharding import Parameter, initialise_, parameters
from engine.errors import CheckpointError, ConfigError, DamageError, DataError, EngineError, Fault, SecretError
from engine.interop.convert import open_source
from engine.interop.huggingface.weights import HfReader
from engine.model.transformer import Transformer, build_stages, tensor_shapes
from engine.monitor.health import explain_non_finite
from engine.ops.attention import chosen
from engine.ops.fp8 import check_device
from engine.ops.native import keep_freed_memory
from engine.optim.adamw import FlatAdamW
from engine.optim.clip import GradNorms, NormCounter, clip_factor
from engine.optim.lr import learning_rate
from engine.optim.precision import PRECISIONS, LossScale
from engine.parallel.gradients import GradBuckets, make_buckets, settle_before_use
from engine.pipeline.actions import Plan
from engine.pipeline.executor import Trace, execute
from engine.pipeline.stage import Stage


@dataclass
class TrainState:
    """One rank's share of a run. step: updates done; consumed_*: over all ranks since the beginning of the run.

    order_begin: the sample at which epoch 0 of the sample order began; above 0 where it was another order before.
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
    order_begin: int = 0
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


def setup(cfg: Config, ctx: ParallelContext, derived: Derived | None = None) -> TrainState:
    """Stages, flat buckets, optimizer and checked plan of this rank, with initial weights. `cfg` is resolved.

    derived: what follows from it, where that is known already.
    """
    keep_freed_memory()
    check_means(cfg, ctx)
    derived = derived or derive(cfg)
    stages: dict[int, Stage] = {}
    params: list[Parameter] = []
    for number, model, fresh in build_stages(cfg, ctx, derived):
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
    norms = NormCounter(all_buckets, ctx, list(tensor_shapes(cfg.model)), PRECISIONS[cfg.train.precision].main)
    fp16 = cfg.train.precision == "fp16"
    scale = LossScale(cfg.train.loss_scale, cfg.train.loss_scale_window) if fp16 else LossScale()
    return TrainState(cfg, ctx, derived.plan, stages, params, all_buckets, optimizer, norms, scale)


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
        raise ConfigError([Fault("", "train.attention", wanted, f"chooses {found}", repair)])


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
            range(state.consumed_samples, state.consumed_samples + cfg.train.global_batch_size),
        )
    lr = learning_rate(state.step + 1, cfg.train.steps, cfg.optimizer, cfg.lr_schedule)
    if finite:
        state.before_update()
        state.optimizer.step(lr, clip_factor(norms.norm, cfg.optimizer.clip_norm) / scale)
    leave_behind(state)
    by_source = losses_by_source(losses * (tokens / scale), batches, state, num_sources) if num_sources else {}
    return StepResult(loss, norms, lr, tokens, not finite, trace, by_source)


def leave_behind(state: TrainState) -> None:
    """Count a step as done and its batch as consumed: after its update, or without one (train.skip_steps)."""
    batch = state.cfg.train.global_batch_size
    state.step += 1
    state.consumed_samples += batch
    state.consumed_tokens += batch * state.cfg.train.seq_len


def count_tokens(batches: Sequence[MicroBatch], ctx: ParallelContext) -> int:
    """Tokens that count in the loss, over the microbatches of all data ranks."""
    total = sum(int(b.mask.sum()) for b in batches)
    if ctx.data.size > 1:  # over the world: the data axis may still gather the weights of the step before
        speaks = ctx.tensor.rank == ctx.pipeline.rank == 0
        total = int(all_reduce_(torch.tensor(total * speaks, device=ctx.device), ctx.world).item())
    if total == 0:
        raise DataError(
            "no token of this global batch counts in the loss: every mask is empty; look at the data, "
            "or leave the step out with --train.skip_steps"
        )
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
        "optimizer": {"steps": state.optimizer.steps, **state.scale.facts()},
        "config": state.cfg.model_dump(),
        "data": data_facts | ({ORDER_BEGIN: state.order_begin} if state.order_begin else {}),
        "versions": code_versions(),
        "lineage": state.lineage,
    }


def go_on(state: TrainState, data_facts: dict[str, Any]) -> str:
    """Go on from the checkpoint that checkpoint.resume means; gives its folder, empty where a run begins. Collective.

    Of a run folder's checkpoints, one that turns out to be damaged is left out, with a warning, and the one before is
    taken. One that was asked for by its path is refused.
    """
    cfg, ctx = state.cfg, state.ctx
    storage = storage_of(cfg.checkpoint.secret)
    before: int | None = None
    while source := on_first_rank(partial(find_resume, cfg, before), ctx.world, ctx.device):
        try:
            resume(state, Path(source), data_facts, storage)
            break
        except DamageError as error:
            if cfg.checkpoint.resume not in ("auto", "latest"):
                raise
            warnings.warn(f"left out: {error}", stacklevel=2)
            before = int(Path(source).name.removeprefix("step_"))
    return str(source)


def resume(state: TrainState, folder: Path, data_facts: dict[str, Any], storage: Storage = DISK) -> None:
    """Go on from a checkpoint of any layout: weights, optimizer, step and data position. Collective.

    Refuses, with a list of old and new values, when model, data, sequence length or seed differ and are not allowed to.
    Raises DamageError on all ranks when any finds the checkpoint damaged; weights may then be those of no step.
    """
    with _opened(folder, storage, state.ctx) as reader:
        manifest = reader.manifest
        if reader.names(MODEL) and not reader.names("exp_avg"):
            raise CheckpointError(
                f"{folder} holds weights only, such as an import does: start a new run from it with "
                f"--checkpoint.init {folder} and another --run.dir"
            )
        allowed = refuse(folder, manifest, differences(manifest, state.cfg, data_facts), state.cfg)
        try:
            load_into(reader, state.optimizer.states(), state.ctx)
        except EngineError as error:
            if any(name.startswith("model.") for name in allowed):  # another model was allowed: it may just not fit
                raise
            raise DamageError(error.code, str(error)) from None
    state.optimizer.publish()
    state.step = manifest.step
    state.optimizer.steps = int(manifest.optimizer.get("steps", manifest.step))
    state.scale.take(manifest.optimizer, manifest.config["train"]["precision"])
    state.consumed_samples, state.consumed_tokens = manifest.consumed_samples, manifest.consumed_tokens
    state.order_begin = order_begin(manifest, data_facts)
    state.lineage = descend(folder, manifest, allowed, changes(manifest, state.cfg))


def changed_since(changed: Mapping[str, tuple[str, str]], scale: LossScale) -> str:
    """One line of what differs from the checkpoint, name -> (old, new), though nothing refuses it."""
    text = ", ".join(f"{name} {old or 'none'} -> {new or 'none'}" for name, (old, new) in changed.items())
    begun = f" (the loss scale begins at {scale.value:,.0f})" if scale.window and "train.precision" in changed else ""
    return f"changed since the checkpoint: {text}{begun}"


def _opened(folder: Path, storage: Storage, ctx: ParallelContext) -> Reader:
    """A reader on every rank, or the same kind of error on every rank. Collective."""
    error: EngineError | None = None
    reader: Reader | None = None
    try:
        reader = Reader(folder, storage)
    except EngineError as fault:
        error = fault
    secret = any(gather_json(isinstance(error, SecretError), ctx.world, ctx.device))
    try:
        raise_together(error, ctx.world, ctx.device)
    except EngineError as fault:
        if secret:
            raise
        raise DamageError(fault.code, str(fault)) from None
    assert reader is not None
    return reader


def start_from(state: TrainState, path: Path) -> tuple[Path, list[str]]:
    """Take the weights of a Hugging Face folder or a checkpoint of any layout; the optimizer is new. Collective.

    Returns the folder they were in, and what of it is not read or not as it says, in words.
    """
    ctx = state.ctx
    error: EngineError | None = None
    source: TensorSource[Any] | None = None
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
    return source.folder, source.notes if isinstance(source, HfReader) else []


def find_resume(cfg: Config, before: int | None = None) -> str:
    """The checkpoint to go on from, by checkpoint.resume; empty to start anew. before: of a step below this one."""
    wanted, run = cfg.checkpoint.resume, Path(cfg.run.dir)
    storage, root = storage_of(cfg.checkpoint.secret), run / "checkpoints"
    if wanted not in ("auto", "never") and before is None:
        return str(find(run if wanted == "latest" else Path(wanted), storage))
    have = newest(root, storage, before)
    if wanted == "never" and have is not None:
        raise CheckpointError(
            f"{run} already holds checkpoints (newest: step {have}) and checkpoint.resume is never: "
            "choose another --run.dir, or resume"
        )
    if have is None and steps_descending(root, storage):
        raise CheckpointError(
            f"{run} holds checkpoints, but none that is whole (the warnings say why): restore one, or begin anew with "
            "another --run.dir"
        )
    return "" if have is None else str(step_dir(root, have))
