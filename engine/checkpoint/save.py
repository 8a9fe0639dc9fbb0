"""Saving: every rank writes its part in parallel; rank 0 writes the manifest and renames the folder into place.

Each value is written once: by a rank that counts it (`Piece.counted`), and of the data ranks by the owner of its flat
range, which is at most three rectangles of a tensor.

A save goes through two phases, each in one thread of each rank, while the main threads may train on:

    write    every rank: its file, synced; read back and compared where older checkpoints are to be deleted afterwards
    commit   rank 0: the manifest, synced; the folder renamed; older ones deleted

Collectives come from main threads only: at each step the ranks agree on whether any is busy or has failed (`advance`),
or they do nothing but that (`finish`). So the order of collectives is the same everywhere, and a rank that has little
to write never waits inside a collective for one that has much. A failure on any rank is an error on all; nothing is
renamed then. Two saves are never under way at once.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor

from engine.checkpoint.format import (
    FileEntry,
    FileSlice,
    Manifest,
    TensorEntry,
    file_damages,
    step_dir,
)
from engine.checkpoint.retention import commit, forget_old, set_aside_newer, tidy
from engine.checkpoint.staging import Staging
from engine.checkpoint.storage import DISK, Storage, make_folders, remove_tree
from engine.checkpoint.tensorfile import BLOCK_BYTES, DTYPE_NAMES, LazyTensor, write_safetensors
from engine.distributed.collectives import all_reduce_, gather_json, on_first_rank
from engine.distributed.context import ParallelContext
from engine.distributed.layout import Layout
from engine.errors import CheckpointError
from engine.optim.adamw import StateShard

_LOOK_S = 0.05  # a rank that waits for its own thread looks at the others so often
_STOP_S = 5.0  # a thread that has been told to stop may take so long: it may be inside one slow write


class _Stopped(Exception):
    """Another rank's write has failed, so this one's was given up."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete and durable; notes: what else was done, for people."""

    step: int
    folder: Path
    notes: tuple[str, ...] = ()


@dataclass
class _Save:
    step: int
    facts: dict[str, Any]
    temporary: Path
    stop: threading.Event
    work: Future[Any]
    committing: bool = False
    keep: int = 0


class Saver:
    """Saves checkpoints under `root`, one at a time. All ranks make the same calls; `advance`, `finish` are collective.

    keep: how many newest checkpoints to keep, 0 for all; keep_every: besides those every step that is a multiple.
    spike: of a step whose loss stands out, 0 for none: the last checkpoint before it is kept besides.
    `with` gives up a save that is under way when an exception ends the block.
    """

    def __init__(
        self,
        root: Path,
        ctx: ParallelContext,
        *,
        keep: int = 0,
        keep_every: int = 0,
        storage: Storage = DISK,
        block_bytes: int = BLOCK_BYTES,
    ):
        self.root, self.ctx, self.keep, self.keep_every = root, ctx, keep, keep_every
        self._storage, self._block_bytes = storage, block_bytes
        self._staging = Staging()
        self._copied = threading.Event()
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._token = on_first_rank(lambda: secrets.token_hex(4), ctx.world, ctx.device)
        self._count = 0
        self._save: _Save | None = None
        self.spike = 0

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._save is not None:
            self._save.stop.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def in_flight(self) -> int | None:
        """The step that is being saved; the same on all ranks."""
        return None if self._save is None else self._save.step

    @property
    def busy(self) -> bool:
        """Whether this rank still works on the phase."""
        return self._save is not None and not self._save.work.done()

    @property
    def failed(self) -> bool:
        """Whether this rank's work has ended in an error."""
        return self._save is not None and self._save.work.done() and self._save.work.exception() is not None

    def reserve(self, states: Iterable[StateShard]) -> None:
        """Take the host memory that saving these states in the background needs. Not collective."""
        self._staging.reserve(states)

    def start(
        self,
        states: Iterable[StateShard],
        *,
        step: int,
        facts: dict[str, Any],
        background: bool,
        unproven: bool = False,
    ) -> None:
        """Begin to save; no other save may be in flight. Nothing here waits for a disk or another rank.

        states: what this rank is to write, FlatAdamW.states(owned=True). facts: the manifest's remaining fields.
        background: write a copy of the states, so that they may change once `copied` has returned; else they may not
        until `finish`.
        unproven: it is committed before the loss with these weights is known, so one older is kept in any case.
        """
        assert self._save is None, "finish() comes before the next start()"
        ready: Callable[[], None] = lambda: None  # noqa: E731
        self._copied.clear()
        if background:
            states, ready, ordered = self._staging.copy(states)
            if ordered:
                self._copied.set()
        self._count += 1
        temporary = self.root / f".{step_dir(self.root, step).name}.{self._token}-{self._count}.tmp"
        stop = threading.Event()
        work = self._threads.submit(self._write, list(states), ready, temporary, stop)
        self._save = _Save(step, facts, temporary, stop, work)
        self._save.keep = max(self.keep, 2) if self.keep and unproven else self.keep

    def copied(self) -> None:
        """Return when the states of a save in the background may change. Call before every update. Not collective."""
        if self._save is not None:
            self._copied.wait()

    def advance(self, busy: bool, failed: bool) -> Saved | None:
        """Take the save a phase further if no rank is busy; gives what was saved once it is.

        busy, failed: whether any rank is. Raises on all ranks when any failed; the save is then given up.
        """
        save = self._save
        if save is None or (busy and not failed):
            return None
        if failed:
            self._give_up(save)
        axis, device = self.ctx.world, self.ctx.device
        if not save.committing:
            parts = gather_json(save.work.result(), axis, device)
            save.committing = True
            if self.ctx.rank == 0:
                save.work = self._threads.submit(self._commit, save, parts)
            return None
        notes = gather_json(save.work.result() if self.ctx.rank == 0 else None, axis, device)[0]
        self._save = None
        return Saved(save.step, step_dir(self.root, save.step), tuple(notes))

    def finish(self) -> Saved:
        """Wait until what is in flight is saved."""
        while True:
            assert self._save is not None
            wait([self._save.work], _LOOK_S)
            flags = torch.tensor([float(self.busy), float(self.failed)], device=self.ctx.device)
            busy, failed = all_reduce_(flags, self.ctx.world, "max").tolist()
            if saved := self.advance(bool(busy), bool(failed)):
                return saved

    def _give_up(self, save: _Save) -> NoReturn:
        """End the save on all ranks, remove what was written, raise the first cause."""
        save.stop.set()
        stopped = bool(wait([save.work], _STOP_S).done)
        error = save.work.exception() if stopped else None
        own = None if isinstance(error, _Stopped) else error
        reports = gather_json([None if own is None else str(own), stopped], self.ctx.world, self.ctx.device)
        self._save = None
        if self.ctx.rank == 0 and all(stopped for _, stopped in reports):
            with suppress(OSError):  # it is hidden, and the next save tries again
                remove_tree(self._storage, save.temporary)
        if own is not None:
            raise own
        raise next(
            CheckpointError("checkpoint.save-failed-on-a-rank", f"rank {rank}: {text}")
            for rank, (text, _) in enumerate(reports)
            if text
        )

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _write(
        self, states: list[StateShard], ready: Callable[[], None], temporary: Path, stop: threading.Event
    ) -> dict[str, Any]:
        """This rank's part; returns {"file", "entry", "tensors": {kind: {name: {shape, dtype, slices}}}} as JSON."""

        def proceed() -> None:
            if stop.is_set():
                raise _Stopped

        try:
            ready()
        finally:
            self._copied.set()
        tensors, index = part_of(states, self.ctx)
        file = f"rank{self.ctx.rank:05d}.safetensors"
        wanted = sum(x.numel() * x.element_size() for x in tensors.values())
        try:
            if self.ctx.rank == 0:
                tidy(self._storage, self.root, temporary)
            make_folders(self._storage, self.root)
            with suppress(FileExistsError):  # another rank was quicker
                self._storage.make_folder(temporary)
            if not tensors:
                return {"tensors": {}}
            part = write_part(
                self._storage, temporary / file, tensors, index, block_bytes=self._block_bytes, proceed=proceed
            )
            if self.keep:
                self._prove(part, temporary / file)
        except OSError as fault:
            raise self._explain(fault, temporary / file, wanted) from None
        return part

    def _prove(self, part: dict[str, Any], file: Path) -> None:
        """Read the file back: older checkpoints may go only when this one is known to be good."""
        alone = manifest_of([part], self.ctx.layout, 0, _NO_FACTS, self._block_bytes)
        for damage in file_damages(file, alone, self._storage, fresh=True):
            raise CheckpointError(
                "checkpoint.reads-back-differently",
                f"checkpoint not saved: what was written reads back differently: {damage}; the disk or the memory of "
                "this machine is faulty; earlier checkpoints are untouched",
            )

    def _commit(self, save: _Save, parts: list[dict[str, Any]]) -> list[str]:
        """Rank 0: make it a checkpoint, then clean up. Returns notes."""
        manifest = manifest_of(parts, self.ctx.layout, save.step, save.facts, self._block_bytes)
        data = manifest.encode(self._storage)
        final = step_dir(self.root, save.step)
        try:
            replaced = commit(self._storage, save.temporary, final, data)
        except OSError as fault:
            raise self._explain(fault, final, len(data)) from None
        try:
            notes = set_aside_newer(self._storage, self.root, save.step)
            forget_old(self._storage, self.root, save.step, save.keep, self.keep_every, self.spike)
            if replaced is not None:
                remove_tree(self._storage, replaced)
        except OSError as fault:
            return [f"older checkpoints could not be cleaned up: {fault.filename}: {fault.strerror}"]
        return notes

    def _explain(self, fault: OSError, at: Path, wanted: int) -> CheckpointError:
        free = "an unknown number of"
        with suppress(OSError):
            there = next(p for p in at.parents if self._storage.stat(p) is not None)
            free = f"{self._storage.free_bytes(there):,}"
        return CheckpointError(
            "checkpoint.write-failed",
            f"checkpoint not saved: {fault.filename or at}: {fault.strerror or fault}; {wanted:,} bytes wanted here, "
            f"{free} bytes free; earlier checkpoints are untouched, make room or choose another --run.dir and start "
            "the same command again",
        )


def check_room(root: Path, states: Iterable[StateShard], ctx: ParallelContext, storage: Storage = DISK) -> None:
    """Raise CheckpointError unless a checkpoint of these states can be written under `root` now. Collective."""
    tensors, _ = part_of(states, ctx)
    mine = sum(x.numel() * x.element_size() for x in tensors.values())
    needed = sum(gather_json(mine, ctx.world, ctx.device))

    def look() -> None:
        probe = root / ".step_probe"  # what a kill leaves of it, `tidy` removes
        try:
            make_folders(storage, root)
            with suppress(FileExistsError):
                storage.make_folder(probe)
            storage.remove_folder(probe)
            free = storage.free_bytes(root)
        except OSError as fault:
            raise CheckpointError(
                "checkpoint.folder-not-writable",
                f"{fault.filename or root}: {fault.strerror}: no checkpoint could be saved here. Make {root} writable, "
                "or choose another --run.dir",
            ) from None
        if free < needed:
            raise CheckpointError(
                "checkpoint.disk-too-small",
                f"{root}: a checkpoint of this run takes {needed:,} bytes, {free:,} are free: none could be saved. "
                "Make room, or choose another --run.dir",
            )

    on_first_rank(look, ctx.world, ctx.device)


_NO_FACTS: dict[str, Any] = {"consumed_samples": 0, "consumed_tokens": 0, "config": {}, "data": {}, "versions": {}}


def save(
    root: Path,
    states: Iterable[StateShard],
    ctx: ParallelContext,
    *,
    step: int,
    facts: dict[str, Any],
    keep: int = 0,
    keep_every: int = 0,
    storage: Storage = DISK,
) -> Path:
    """Write the checkpoint of `step` under `root`, wait for it, and return its folder. Collective. See Saver."""
    with Saver(root, ctx, keep=keep, keep_every=keep_every, storage=storage) as saver:
        saver.start(states, step=step, facts=facts, background=False)
        return saver.finish().folder


def part_of(states: Iterable[StateShard], ctx: ParallelContext) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """What it writes: key -> tensor, and kind -> name -> TensorEntry as JSON, its slices without file and digests."""
    tensors: dict[str, Tensor] = {}
    index: dict[str, dict[str, Any]] = {}
    for held in states:
        for piece in held.param.spec.pieces(ctx):
            if not piece.counted:
                continue
            slices: list[dict[str, Any]] = []
            for offset, shape, first in piece.rectangles(held.begin, held.begin + len(held.flat)):
                key = f"{held.kind}/{piece.name}" + (f"#{len(slices)}" if slices else "")
                begin = first - held.begin
                tensors[key] = held.flat[begin : begin + math.prod(shape)].view(shape)
                slices.append({"key": key, "offset": offset, "shape": shape})
            if slices:
                entry = {"shape": piece.global_shape, "dtype": DTYPE_NAMES[held.flat.dtype], "slices": slices}
                index.setdefault(held.kind, {})[piece.name] = entry
    return tensors, index


def write_part(
    storage: Storage,
    file: Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    index: dict[str, dict[str, Any]],
    *,
    block_bytes: int = BLOCK_BYTES,
    proceed: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write a rank's file; returns what the manifest needs to know of it, as JSON."""
    written = write_safetensors(file, tensors, storage=storage, block_bytes=block_bytes, proceed=proceed)
    for entries in index.values():
        for entry in entries.values():
            for part in entry["slices"]:
                part |= {"file": file.name, "digests": written.digests[part["key"]]}
    return {"file": file.name, "entry": {"size": written.size, "header": written.header}, "tensors": index}


def manifest_of(
    parts: list[dict[str, Any]], layout: Layout, step: int, facts: dict[str, Any], block_bytes: int
) -> Manifest:
    """Join what the ranks of a layout wrote."""
    tensors: dict[str, dict[str, TensorEntry]] = {}
    for part in parts:
        for kind, entries in part["tensors"].items():
            table = tensors.setdefault(kind, {})
            for name, raw in entries.items():
                slices = tuple(FileSlice(**one) for one in raw["slices"])
                before = table[name].slices if name in table else ()
                table[name] = TensorEntry(shape=raw["shape"], dtype=raw["dtype"], slices=before + slices)
    files = {part["file"]: FileEntry(**part["entry"]) for part in parts if "file" in part}
    degrees = {axis: getattr(layout, axis) for axis in ("tensor", "pipeline", "data", "context")}
    return Manifest(step=step, tensors=tensors, files=files, layout=degrees, block_bytes=block_bytes, **facts)
