"""How a state is saved and resumed: in any layout, from a run's own checkpoints or from weights alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from engine.checkpoint.format import MODEL, find, newest, step_dir, steps_descending
from engine.checkpoint.lineage import (
    ORDER_BEGIN,
    changes,
    code_versions,
    differences,
    extend_lineage,
    order_begin,
    refuse,
)
from engine.checkpoint.load import Reader, TensorSource, load_into
from engine.checkpoint.save import save
from engine.checkpoint.seal import storage_of
from engine.checkpoint.storage import DISK, Storage
from engine.config.schema import Config
from engine.distributed.collectives import gather_json, on_first_rank, raise_together
from engine.distributed.context import ParallelContext
from engine.errors import CheckpointError, DamageError, EngineError, SecretError
from engine.interop.convert import open_source
from engine.interop.huggingface.weights import HfReader
from engine.optim.precision import LossScale
from engine.train.state import TrainState


def save_state(state: TrainState, root: Path, data_metadata: dict[str, Any]) -> Path:
    """Save a checkpoint of the state as it is and wait until it is there. Collective."""
    c = state.cfg.checkpoint
    states, facts = state.optimizer.states(owned=True), manifest_fields(state, data_metadata)
    storage, step = storage_of(c.secret, encrypt=c.encrypt), state.step
    return save(root, states, state.ctx, step=step, facts=facts, keep=c.keep, keep_every=c.keep_every, storage=storage)


def manifest_fields(state: TrainState, data_metadata: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of a state beside its tensors."""
    return {
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_tokens,
        "optimizer": {"steps": state.optimizer.steps, **state.scale.facts()},
        "config": state.cfg.model_dump(),
        "data": data_metadata | ({ORDER_BEGIN: state.order_begin} if state.order_begin else {}),
        "versions": code_versions(),
        "lineage": state.lineage,
    }


def resume_run(state: TrainState, data_metadata: dict[str, Any]) -> str:
    """Go on from the checkpoint that checkpoint.resume means; gives its folder, empty where a run begins. Collective.

    Of a run folder's checkpoints, one that turns out to be damaged is left out, with a warning, and the one before is
    taken. One that was asked for by its path is refused.
    """
    cfg, ctx = state.cfg, state.ctx
    storage = storage_of(cfg.checkpoint.secret)
    before: int | None = None
    while source := on_first_rank(partial(find_resume, cfg, before), ctx.world, ctx.device):
        try:
            resume(state, Path(source), data_metadata, storage)
            break
        except DamageError as error:
            if cfg.checkpoint.resume not in ("auto", "latest"):
                raise
            warnings.warn(f"left out: {error}", stacklevel=2)
            before = int(Path(source).name.removeprefix("step_"))
    return str(source)


def resume(state: TrainState, folder: Path, data_metadata: dict[str, Any], storage: Storage = DISK) -> None:
    """Go on from a checkpoint of any layout: weights, optimizer, step and data position. Collective.

    Refuses, with a list of old and new values, when model, data, sequence length or seed differ and are not allowed to.
    Raises DamageError on all ranks when any finds the checkpoint damaged; weights may then be those of no step.
    """
    with _opened(folder, storage, state.ctx) as reader:
        manifest = reader.manifest
        if reader.names(MODEL) and not reader.names("exp_avg"):
            raise CheckpointError(
                "train.weights-only",
                f"{folder} holds weights only, such as an import does: start a new run from it with "
                f"--checkpoint.init {folder} and another --run.dir",
            )
        allowed = refuse(folder, manifest, differences(manifest, state.cfg, data_metadata), state.cfg)
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
    state.order_begin = order_begin(manifest, data_metadata)
    state.lineage = extend_lineage(folder, manifest, allowed, changes(manifest, state.cfg))


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
            state.lineage = extend_lineage(source.folder, source.manifest, {"optimizer state": ("there", "new")})
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
            "train.run-folder-taken",
            f"{run} already holds checkpoints (newest: step {have}) and checkpoint.resume is never: "
            "choose another --run.dir, or resume",
        )
    if have is None and steps_descending(root, storage):
        raise CheckpointError(
            "train.no-whole-checkpoint",
            f"{run} holds checkpoints, but none that is whole (the warnings say why): restore one, or begin anew with "
            "another --run.dir",
        )
    return "" if have is None else str(step_dir(root, have))
