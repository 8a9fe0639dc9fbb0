"""Saving: every rank writes its part in parallel; rank 0 writes the manifest and renames the folder into place.

Each value is written once: by a rank that counts it (`Piece.counted`), and of the data ranks by the owner of its flat
range, which is at most three rectangles of a tensor. A failure on any rank is an error on all of them, and nothing is
renamed.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.checkpoint.format import (
    DTYPE_NAMES,
    MANIFEST,
    FileEntry,
    Manifest,
    Slice,
    TensorEntry,
    complete_steps,
    step_dir,
    write_safetensors,
)
from engine.comm import gather_json, on_first_rank, raise_together
from engine.context import ParallelContext
from engine.errors import CheckpointError, EngineError
from engine.files import sync_folder, write_synced
from engine.optim.adamw import Held


def save(
    root: Path,
    states: Iterable[Held],
    ctx: ParallelContext,
    *,
    step: int,
    facts: dict[str, Any],
    keep: int = 0,
) -> Path:
    """Write the checkpoint of `step` under `root` and return its folder. Collective.

    states: what this rank is to write, FlatAdamW.states(owned=True). facts: the manifest's remaining fields. keep:
    how many newest checkpoints to keep, 0 for all. Raises CheckpointError on every rank when any rank fails.
    """
    final = step_dir(root, step)
    temporary = root / f".{final.name}.tmp"
    _on_rank_0(ctx, prepare, root, temporary)
    error: EngineError | None = None
    mine: dict[str, Any] = {}
    try:
        mine = _write_part(temporary, states, ctx)
    except OSError as fault:
        error = _explain(fault, temporary)
    raise_together(error, ctx.world, ctx.device)
    parts = gather_json(mine, ctx.world, ctx.device)
    _on_rank_0(ctx, commit, temporary, final, _manifest(parts, ctx, step, facts))
    _on_rank_0(ctx, _forget_old, root, keep)
    return final


def _on_rank_0(ctx: ParallelContext, work: Callable[..., None], *args: Any) -> None:
    """Run `work` on rank 0 while the others wait; its failure is everybody's."""

    def explained() -> None:
        try:
            work(*args)
        except OSError as fault:
            raise _explain(fault, None) from None

    on_first_rank(explained, ctx.world, ctx.device)


def _explain(fault: OSError, folder: Path | None) -> CheckpointError:
    where = fault.filename or folder
    free = ""
    if folder is not None and folder.exists():
        free = f", {shutil.disk_usage(folder).free} bytes free"
    return CheckpointError(
        f"checkpoint not saved: {where}: {fault.strerror or fault}{free}; earlier checkpoints are untouched, "
        "make room or choose another --run.dir and start the same command again"
    )


def prepare(root: Path, temporary: Path) -> None:
    """Make an empty temporary folder under `root`."""
    root.mkdir(parents=True, exist_ok=True)
    if temporary.exists():  # of a save that was killed
        shutil.rmtree(temporary)
    temporary.mkdir()


def _write_part(folder: Path, states: Iterable[Held], ctx: ParallelContext) -> dict[str, Any]:
    """Write this rank's file; returns {"file", "entry", "tensors": {kind: {name: {shape, dtype, slices}}}} as JSON."""
    file = f"rank{ctx.rank:05d}.safetensors"
    tensors: dict[str, Tensor] = {}
    index: dict[str, dict[str, Any]] = {}
    for held in states:
        for piece in held.param.spec.pieces(ctx):
            if not piece.counted:
                continue
            slices: list[Slice] = []
            for offset, shape, first in piece.rectangles(held.begin, held.begin + len(held.flat)):
                key = f"{held.kind}/{piece.name}" + (f"#{len(slices)}" if slices else "")
                begin = first - held.begin
                tensors[key] = held.flat[begin : begin + math.prod(shape)].view(shape)
                slices.append(Slice(file=file, key=key, offset=offset, shape=shape))
            if slices:
                dtype = DTYPE_NAMES[held.flat.dtype]
                entry = TensorEntry(shape=piece.global_shape, dtype=dtype, slices=tuple(slices))
                index.setdefault(held.kind, {})[piece.name] = entry.model_dump()
    if not tensors:
        return {"tensors": {}}
    return {"file": file, "entry": write_safetensors(folder / file, tensors).model_dump(), "tensors": index}


def _manifest(parts: list[dict[str, Any]], ctx: ParallelContext, step: int, facts: dict[str, Any]) -> Manifest:
    """Join what the ranks wrote."""
    tensors: dict[str, dict[str, TensorEntry]] = {}
    for part in parts:
        for kind, entries in part["tensors"].items():
            table = tensors.setdefault(kind, {})
            for name, raw in entries.items():
                entry = TensorEntry.model_validate(raw)
                if name in table:
                    entry = entry.model_copy(update={"slices": table[name].slices + entry.slices})
                table[name] = entry
    files = {part["file"]: FileEntry.model_validate(part["entry"]) for part in parts if "file" in part}
    layout = {axis: getattr(ctx.layout, axis) for axis in ("tensor", "pipeline", "data", "context")}
    return Manifest(step=step, tensors=tensors, files=files, layout=layout, **facts)


def commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest and rename the folder into place."""
    write_synced(temporary / MANIFEST, manifest.model_dump_json(indent=1).encode())
    sync_folder(temporary)
    if final.exists():  # an incomplete or damaged folder of that name: a complete one is never saved again
        os.rename(final, final.with_name(f".{final.name}.replaced"))
    os.rename(temporary, final)
    sync_folder(final.parent)
    shutil.rmtree(final.with_name(f".{final.name}.replaced"), ignore_errors=True)


def _forget_old(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints, each renamed away first: none is ever half there."""
    for step in complete_steps(root)[:-keep] if keep else []:
        folder = step_dir(root, step)
        trash = folder.with_name(f".{folder.name}.deleted")
        os.rename(folder, trash)
        shutil.rmtree(trash)
