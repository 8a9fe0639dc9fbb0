"""Training: setup, step, loop.

`setup` builds everything a rank needs from a config and a context; `train_step` is one optimizer step; `train` is the
loop around it with saving, validation, progress and the orderly stop on a signal.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import engine
from engine.checkpoint.format import complete_steps, find, step_dir
from engine.checkpoint.load import Reader, load_into
from engine.checkpoint.save import save
from engine.comm import all_reduce_, on_first_rank
from engine.config import Config, Resolved
from engine.context import ParallelContext
from engine.data.indexed import IndexedDataset
from engine.data.loader import Loader, MicroBatch
from engine.data.order import SampleOrder
from engine.data.tokenizer import Tokenizer
from engine.errors import EXIT_OK, EXIT_REQUEUE, CheckpointError, ConfigError, DataError, Fault
from engine.evaluate import Evaluator, Score
from engine.launch import StopRequest
from engine.model.transformer import StageShape, Transformer, num_parameters, tensor_shapes
from engine.monitor.health import explain_non_finite
from engine.monitor.metrics import MetricsLog
from engine.monitor.progress import Progress
from engine.optim.adamw import FlatAdamW
from engine.optim.clip import GradNorms, clip_, gradient_norms
from engine.optim.lr import learning_rate
from engine.optim.precision import PRECISIONS
from engine.parallel.buckets import GradBuckets, make_buckets
from engine.pipeline.actions import Plan
from engine.pipeline.executor import execute
from engine.pipeline.schedules import build
from engine.pipeline.stage import Stage
from engine.planner.cost import flops_per_token
from engine.sharding import Parameter, initialise_, parameters


@dataclass
class TrainState:
    """One rank's share of a run. step: updates done; consumed_*: over all ranks since the beginning of the run."""

    cfg: Config
    ctx: ParallelContext
    model: Transformer
    params: list[Parameter]
    buckets: GradBuckets
    stages: dict[int, Stage]
    optimizer: FlatAdamW
    plan: Plan
    names: list[str]
    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports: mean loss in nats a counted token, norms before clipping, rate, tokens."""

    loss: float
    norms: GradNorms
    lr: float
    tokens: int


def setup(cfg: Config, ctx: ParallelContext) -> TrainState:
    """Model, flat buckets, optimizer and checked plan of this rank, with initial weights. `cfg` is resolved."""
    shape = StageShape.of(cfg.model.num_layers, ctx.pipeline.rank, ctx.pipeline.size)
    model = Transformer(cfg.model, ctx, shape)
    params = parameters(model)
    initialise_(params, ctx, cfg.train.seed)
    buckets = make_buckets(
        params,
        ctx,
        grad_dtype=PRECISIONS[cfg.train.precision].main,
        bucket_bytes=int(cfg.parallel.bucket_mib * 2**20),
        overlap=cfg.parallel.overlap,
    )
    stage = Stage(model, buckets, width=cfg.model.hidden_size, first=shape.first, last=shape.last)
    microbatches = cfg.train.global_batch_size // (ctx.data.size * cfg.train.micro_batch_size)
    plan = build(cfg.parallel.schedule, ctx.pipeline.size, 1, microbatches)
    optimizer = FlatAdamW([buckets], cfg.optimizer)
    names = list(tensor_shapes(cfg.model))
    return TrainState(cfg, ctx, model, params, buckets, {ctx.pipeline.rank: stage}, optimizer, plan, names)


def train_step(state: TrainState, batches: Sequence[MicroBatch]) -> StepResult:
    """One optimizer step on this data rank's microbatches; identical results on all ranks.

    The loss is sum of token losses / counted tokens over the whole global batch, and the count is known before the
    backward. A non-finite loss or gradient raises TrainingError on every rank before any weight has changed.
    """
    cfg, ctx = state.cfg, state.ctx
    batches = [b.to(ctx.device) for b in batches]
    tokens = count_tokens(batches, ctx)
    state.buckets.zero()
    losses = execute(state.plan, state.stages, ctx, batches, 1.0 / tokens)
    state.buckets.wait()
    loss = sum_losses(losses, ctx) / tokens
    norms = gradient_norms(state.params, ctx, state.names)
    if not abs(loss + norms.norm) < float("inf"):
        explain_non_finite(
            state.plan,
            state.stages,
            state.params,
            ctx,
            batches,
            1.0 / tokens,
            state.step + 1,
            loss,
            norms.non_finite(),
        )
    clip_([state.buckets], norms.norm, cfg.optimizer.clip_norm)
    lr = learning_rate(state.step + 1, cfg.train.steps, cfg.optimizer, cfg.schedule)
    state.optimizer.step(lr)
    state.step += 1
    state.consumed_samples += cfg.train.global_batch_size
    state.consumed_tokens += cfg.train.global_batch_size * cfg.train.seq_len
    return StepResult(loss, norms, lr, tokens)


def count_tokens(batches: Sequence[MicroBatch], ctx: ParallelContext) -> int:
    """Tokens that count in the loss, over the microbatches of all data ranks."""
    counted = torch.stack([b.mask.sum() for b in batches]).sum()
    total = int(all_reduce_(counted, ctx.data).item())
    if total == 0:
        raise DataError("no token of this global batch counts in the loss: every mask is empty; look at the data")
    return total


def sum_losses(losses: torch.Tensor, ctx: ParallelContext) -> float:
    """The sum of all microbatches' losses over all data ranks; only one tensor rank of the last stage speaks."""
    speaks = ctx.tensor.rank == 0 and ctx.pipeline.rank == ctx.pipeline.size - 1
    return float(all_reduce_(losses.sum() * float(speaks), ctx.world).item())


def save_state(state: TrainState, root: Path, data_facts: dict[str, Any]) -> Path:
    """Save a checkpoint of the state as it is. Collective. A complete checkpoint of this step is left as it is."""
    if on_first_rank(lambda: state.step in complete_steps(root), state.ctx.world, state.ctx.device):
        return step_dir(root, state.step)
    facts = {
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_tokens,
        "config": state.cfg.model_dump(),
        "data": data_facts,
        "versions": {"engine": engine.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    keep = state.cfg.checkpoint.keep
    return save(root, state.optimizer.states(), state.ctx, step=state.step, facts=facts, keep=keep)


def resume(state: TrainState, folder: Path, data_facts: dict[str, Any]) -> None:
    """Go on from a checkpoint of any layout: weights, optimizer, step and data position. Collective.

    Refuses, with a list of old and new values, when model, data, sequence length or seed differ: the loss would go on
    from somewhere else without a word.
    """
    with Reader(folder) as reader:
        manifest = reader.manifest
        differing = _differences(manifest.config, state.cfg, manifest.data, data_facts)
        if differing:
            raise CheckpointError(
                f"{folder} belongs to another run:\n"
                + "\n".join(f"  - {line}" for line in differing)
                + "\nUse the old values, or another --run.dir for a new run."
            )
        load_into(reader, state.optimizer.states(), state.ctx)
    state.optimizer.publish()
    state.optimizer.steps = state.step = manifest.step
    state.consumed_samples, state.consumed_tokens = manifest.consumed_samples, manifest.consumed_tokens


def _differences(old: dict[str, Any], cfg: Config, old_data: dict[str, Any], data: dict[str, Any]) -> list[str]:
    now = cfg.model_dump()
    pairs = {f"model.{k}": (old["model"].get(k), v) for k, v in now["model"].items() if k != "preset"}
    pairs |= {f"train.{k}": (old["train"].get(k), now["train"][k]) for k in ("seq_len", "seed")}
    pairs |= {f"data {k}": (old_data.get(k), v) for k, v in data.items() if k != "prefix"}
    return [f"{name}: checkpoint {a!r}, now {b!r}" for name, (a, b) in pairs.items() if a != b]


def find_resume(cfg: Config) -> str:
    """The checkpoint to go on from, by checkpoint.resume; empty to start anew."""
    wanted, run = cfg.checkpoint.resume, Path(cfg.run.dir)
    have = complete_steps(run / "checkpoints")
    if wanted == "never":
        if have:
            raise CheckpointError(
                f"{run} already holds checkpoints (newest: step {have[-1]}) and checkpoint.resume is never: "
                "choose another --run.dir, or resume"
            )
        return ""
    if wanted == "auto" and not have:
        return ""
    return str(find(run if wanted in ("auto", "latest") else Path(wanted)))


def open_data(prefix: str, cfg: Config, tokenizer: Tokenizer | None) -> IndexedDataset:
    """Open a corpus for this model; refuses one that was made with another tokenizer."""
    dataset = IndexedDataset(prefix, vocab_size=cfg.model.vocab_size)
    made_with = dataset.meta.get("tokenizer_digest")
    if tokenizer is not None and tokenizer.vocab_size > cfg.model.vocab_size:
        relation = f"is less than the {tokenizer.vocab_size} tokens of {cfg.data.tokenizer}"
        repair = f"Use {tokenizer.vocab_size} or more."
        raise ConfigError([Fault("model.vocab_size", cfg.model.vocab_size, relation, repair)])
    if tokenizer is not None and made_with and tokenizer.digest != made_with:
        raise DataError(
            f"{prefix}: was made with the tokenizer of digest {made_with}, but data.tokenizer "
            f"{cfg.data.tokenizer} has {tokenizer.digest}: give the right one, or prepare the data again"
        )
    return dataset


def data_facts(dataset: IndexedDataset) -> dict[str, Any]:
    """What a checkpoint remembers of its corpus."""
    return {
        "prefix": str(dataset.prefix),
        "num_documents": dataset.num_documents,
        "num_tokens": dataset.num_tokens,
        "tokenizer_digest": dataset.meta.get("tokenizer_digest"),
    }


def train(resolved: Resolved, ctx: ParallelContext, stop: StopRequest) -> int:
    """The whole run on one rank; returns the exit code (0 done, 75 saved on a signal)."""
    cfg, run_dir = resolved.config, Path(resolved.config.run.dir)
    if not cfg.data.train:
        raise ConfigError([Fault("data.train", "", "no training data given", "Make some with `engine prepare`.")])
    tokenizer = Tokenizer.load(Path(cfg.data.tokenizer)) if cfg.data.tokenizer else None
    dataset = open_data(cfg.data.train, cfg, tokenizer)
    facts = data_facts(dataset)
    state = setup(cfg, ctx)
    source = on_first_rank(lambda: find_resume(cfg), ctx.world, ctx.device)
    if source:
        resume(state, Path(source), facts)
    evaluator = None
    if cfg.data.valid:
        evaluator = Evaluator(state.stages, ctx, open_data(cfg.data.valid, cfg, tokenizer), cfg)
    console = Progress(cfg, ctx, flops_per_token(cfg.model, cfg.train.seq_len))
    console.start(state.step, source, num_parameters(cfg.model))
    if tokenizer is not None and ctx.rank == 0:
        tokenizer.save(run_dir / "tokenizer")  # a run folder is whole: export and generate need nothing else
    with (
        MetricsLog(run_dir, resolved, state.step, enabled=ctx.rank == 0) as log,
        _loader(state, dataset) as loader,
        console,
    ):
        code, reason = _loop(state, loader, evaluator, log, console, stop, facts)
        log.exit(code, reason)
    return code


def _loader(state: TrainState, dataset: IndexedDataset) -> Loader:
    cfg, ctx = state.cfg, state.ctx
    order = SampleOrder(dataset, cfg.train.seq_len, cfg.train.seed)
    return Loader(
        order,
        global_batch_size=cfg.train.global_batch_size,
        micro_batch_size=cfg.train.micro_batch_size,
        data_rank=ctx.data.rank,
        data_size=ctx.data.size,
        start_sample=state.consumed_samples,
        prefetch=cfg.data.prefetch,
    )


def _loop(
    state: TrainState,
    loader: Loader,
    evaluator: Evaluator | None,
    log: MetricsLog,
    console: Progress,
    stop: StopRequest,
    facts: dict[str, Any],
) -> tuple[int, str]:
    cfg, ctx, root = state.cfg, state.ctx, Path(state.cfg.run.dir) / "checkpoints"
    while state.step < cfg.train.steps:
        begin = time.perf_counter()
        batches = next(loader)
        data_s = time.perf_counter() - begin
        result = train_step(state, batches)
        seconds = time.perf_counter() - begin
        record = log.step(
            state.step,
            result.loss,
            result.norms.norm,
            result.lr,
            state.consumed_tokens,
            console.rates(result.tokens, seconds) | {"data_s": data_s},
        )
        console.step(record)
        done = state.step == cfg.train.steps
        if evaluator and (done or (cfg.train.eval_every and state.step % cfg.train.eval_every == 0)):
            score: Score = evaluator.run(0 if done else cfg.train.eval_batches)
            log.validation(state.step, score)
            console.note(f"step {state.step}: validation {score}")
        stopping = _agreed(bool(stop), ctx)
        if stopping or done or (cfg.checkpoint.every and state.step % cfg.checkpoint.every == 0):
            console.note(f"step {state.step}: saved {save_state(state, root, facts)}")
        if stopping and not done:
            console.note(f"stopped on a signal after step {state.step}; the same command goes on from there")
            return EXIT_REQUEUE, "stopped on a signal"
    return EXIT_OK, "done"


def _agreed(flag: bool, ctx: ParallelContext) -> bool:
    """Whether any rank has the flag set."""
    return bool(all_reduce_(torch.tensor([float(flag)], device=ctx.device), ctx.world, "max").item())
