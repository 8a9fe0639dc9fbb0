"""Saving and resuming a TrainState in any layout, from a run's checkpoints or from weights only."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from engine.checkpoint.format import Manifest, find_checkpoint, newest_step, step_dir, steps_descending
from engine.checkpoint.lineage import (
    ORDER_BEGIN,
    changes,
    code_versions,
    differences,
    extend_lineage,
    missing_states,
    old_optimizer,
    order_begin,
    require_resumable,
)
from engine.checkpoint.load import Reader, TensorSource, load_into
from engine.checkpoint.save import save
from engine.checkpoint.seal import open_storage
from engine.checkpoint.storage import DISK, Storage
from engine.config.phases import Position
from engine.config.schema import Config
from engine.distributed.collectives import gather_json, on_first_rank, raise_together
from engine.distributed.context import ParallelContext
from engine.errors import CheckpointError, DamageError, EngineError, SecretError
from engine.interop.convert import open_source
from engine.interop.huggingface.weights import HfReader
from engine.optim.groups import group_of
from engine.optim.optimizer import StateShard
from engine.optim.precision import LossScale
from engine.optim.update_rules import MODEL
from engine.train.state import TrainState


def save_state(state: TrainState, root: Path, data_metadata: dict[str, Any]) -> Path:
    """Save a checkpoint of the state under `root` and wait until it is complete; returns its folder. Collective.

    data_metadata: description of the training data, for the manifest.
    """
    c = state.cfg.checkpoint
    states, fields = state.optimizer.states(owned=True), manifest_fields(state, data_metadata)
    storage, step = open_storage(c.secret, encrypt=c.encrypt), state.step
    return save(
        root, states, state.ctx, step=step, metadata=fields, keep=c.keep, keep_every=c.keep_every, storage=storage
    )


def manifest_fields(state: TrainState, data_metadata: dict[str, Any]) -> dict[str, Any]:
    """Fields of a checkpoint's manifest except its tensors: counters, optimizer, config, data, versions, lineage."""
    return {
        "consumed_samples": state.position.samples,
        "consumed_tokens": state.position.tokens,
        "optimizer": {"steps": state.optimizer.steps, **state.scale.state_dict()},
        "state_kinds": sorted({kind for spec in state.specs for kind in group_of(spec, state.cfg.optimizer).states}),
        "config": state.cfg.model_dump(),
        "data": data_metadata | ({ORDER_BEGIN: state.order_begin} if state.order_begin else {}),
        "versions": code_versions(),
        "lineage": state.lineage,
        "initial_values": state.initial_values,
    }


def resume_run(state: TrainState, data_metadata: dict[str, Any]) -> str:
    """Resume from the checkpoint selected by checkpoint.resume; returns its folder, "" for a new run. Collective.

    A corrupt checkpoint of the run folder is skipped with a warning, and the previous one is used. If the user gave the
    path of a corrupt checkpoint, DamageError is raised.
    """
    cfg, ctx = state.cfg, state.ctx
    storage = open_storage(cfg.checkpoint.secret)
    before: int | None = None
    while source := on_first_rank(partial(find_resume, cfg, before), ctx.world, ctx.device):
        try:
            resume(state, Path(source), data_metadata, storage)
            break
        except DamageError as error:
            if cfg.checkpoint.resume not in ("auto", "latest"):
                raise
            warnings.warn(f"skipped: {error}", stacklevel=2)
            before = int(Path(source).name.removeprefix("step_"))
    return str(source)


def resume(state: TrainState, folder: Path, data_metadata: dict[str, Any], storage: Storage = DISK) -> None:
    """Load a checkpoint of any layout: weights, optimizer, step and data position. Collective.

    Raises CheckpointError, with old and new values, if model, data, sequence length or seed differ and
    checkpoint.allow does not list them. Raises DamageError on all ranks if any finds the checkpoint corrupt; some
    weights may then be loaded and others not.
    """
    with _opened(folder, storage, state.ctx) as reader:
        manifest = reader.manifest
        if manifest.kinds is None:
            raise CheckpointError(
                "train.weights-only",
                f"{folder} holds only weights, such as an imported model: start a new run from it with "
                f"--checkpoint.init {folder} and another --run.dir",
            )
        found = differences(manifest, state.cfg, data_metadata) | missing_states(manifest, state.cfg, state.specs)
        allowed = require_resumable(folder, manifest, found, state.cfg)
        try:
            load_into(reader, _saved_states(state, manifest), state.ctx)
        except EngineError as error:
            if any(name.startswith("model.") for name in allowed):  # a changed model was allowed: tensors may not fit
                raise
            raise DamageError(error.code, str(error)) from None
    state.optimizer.masters_to_weights()
    state.step = manifest.step
    state.optimizer.steps = int(manifest.optimizer.get("steps", manifest.step))
    state.scale.load_state_dict(manifest.optimizer, manifest.config["train"]["precision"])
    begin = Position(manifest.step, manifest.consumed_samples, manifest.consumed_tokens)
    state.phases = state.phases.resumed(begin)
    state.order_begin = order_begin(manifest, data_metadata)
    state.initial_values = manifest.initial_values
    state.lineage = extend_lineage(folder, manifest, allowed, changes(manifest, state.cfg))


def _saved_states(state: TrainState, manifest: Manifest) -> Iterator[StateShard]:
    """This rank's state shards except those that start at zero, because the checkpoint's run had no such state."""
    old = old_optimizer(manifest)
    for shard in state.optimizer.states():
        if shard.kind == MODEL or shard.kind in group_of(shard.param.spec, old).states:
            yield shard
        else:
            shard.flat.zero_()


def changed_since(changed: Mapping[str, tuple[str, str]], scale: LossScale) -> str:
    """One line with the allowed differences from the checkpoint. changed: name -> (old, new)."""
    text = ", ".join(f"{name} {old or 'none'} -> {new or 'none'}" for name, (old, new) in changed.items())
    begun = f" (the loss scale starts at {scale.value:,.0f})" if scale.window and "train.precision" in changed else ""
    return f"changed since the checkpoint: {text}{begun}"


def _opened(folder: Path, storage: Storage, ctx: ParallelContext) -> Reader:
    """A reader on every rank, or an error of the same class on every rank. Collective."""
    error: EngineError | None = None
    reader: Reader | None = None
    try:
        reader = Reader(folder, storage)
    except EngineError as raised:
        error = raised
    secret = any(gather_json(isinstance(error, SecretError), ctx.world, ctx.device))
    try:
        raise_together(error, ctx.world, ctx.device)
    except EngineError as raised:
        if secret:
            raise
        raise DamageError(raised.code, str(raised)) from None
    assert reader is not None
    return reader


def start_from(state: TrainState, path: Path) -> tuple[Path, list[str]]:
    """Load the weights of a Hugging Face folder or a checkpoint of any layout; the optimizer stays new. Collective.

    Returns the folder of the weights, and notes on its contents that are ignored or inconsistent.
    """
    ctx = state.ctx
    error: EngineError | None = None
    source: TensorSource[Any] | None = None
    try:
        source = open_source(path, state.cfg.model.max_seq_len, open_storage(state.cfg.checkpoint.secret))
        if ctx.rank == 0 and isinstance(source, HfReader):
            source.check_tied_head()
    except EngineError as raised:
        error = raised
    raise_together(error, ctx.world, ctx.device)
    assert source is not None
    state.initial_values = ""
    with source:
        if isinstance(source, Reader):
            state.initial_values = source.manifest.initial_values
            state.lineage = extend_lineage(source.folder, source.manifest, {"optimizer state": ("there", "new")})
        load_into(source, (held for held in state.optimizer.states() if held.kind == MODEL), ctx)
    state.optimizer.masters_to_weights()
    return source.folder, source.notes if isinstance(source, HfReader) else []


def find_resume(cfg: Config, before: int | None = None) -> str:
    """The checkpoint that checkpoint.resume selects; "" to start a new run. before: only steps below this one."""
    wanted, run = cfg.checkpoint.resume, Path(cfg.run.dir)
    storage, root = open_storage(cfg.checkpoint.secret), run / "checkpoints"
    if wanted not in ("auto", "never") and before is None:
        return str(find_checkpoint(run if wanted == "latest" else Path(wanted), storage))
    have = newest_step(root, storage, before)
    if wanted == "never" and have is not None:
        raise CheckpointError(
            "train.run-folder-taken",
            f"{run} already holds checkpoints (newest: step {have}) and checkpoint.resume is never: "
            "choose another --run.dir, or resume",
        )
    if have is None and steps_descending(root, storage):
        raise CheckpointError(
            "train.no-whole-checkpoint",
            f"{run} holds checkpoints, but none that is complete (see the warnings): restore one, or start a new run "
            "with another --run.dir",
        )
    return "" if have is None else str(step_dir(root, have))
