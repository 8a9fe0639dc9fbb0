"""Saving: all ranks write their parts in parallel; rank 0 writes the manifest and renames the folder into place.

Each value is written exactly once: by a rank that counts it (`Piece.counted`), and among data ranks by the owner of its
flat range, which is at most three rectangles of a tensor.

A save has two phases, each in one thread per rank, while the main threads may continue training:

    write    every rank writes and syncs its file, and reads it back if older checkpoints will be deleted afterwards
    commit   rank 0 writes and syncs the manifest, renames the folder, and deletes older checkpoints

Only main threads call collectives: the ranks agree whether any of them is busy or has failed, at each training step
(`advance`) or in a loop (`finish`). So all ranks call collectives in the same order, and a rank with little to write
never waits inside a collective for a rank with much. A failure on one rank is an error on all ranks, and then nothing
is renamed. At most one save is in flight.
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
    find_file_damage,
    step_dir,
)
from engine.checkpoint.retention import commit, delete_old, remove_leftovers, rename_newer
from engine.checkpoint.staging import Staging
from engine.checkpoint.storage import DISK, Storage, make_folders, remove_tree
from engine.checkpoint.tensorfile import BLOCK_BYTES, DTYPE_NAMES, LazyTensor, write_safetensors
from engine.distributed.collectives import all_reduce_, gather_json, on_first_rank
from engine.distributed.context import ParallelContext
from engine.distributed.layout import Layout
from engine.errors import CheckpointError
from engine.optim.optimizer import StateShard

_POLL_S = 0.05  # interval at which a rank that waits for its thread polls the other ranks
_STOP_S = 5.0  # time for a stopped thread to end: it may be inside one slow write


class _Stopped(Exception):
    """This rank's write was stopped because another rank's write failed."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete and durable checkpoint. notes: messages for the user about other folders."""

    step: int
    folder: Path
    notes: tuple[str, ...] = ()


@dataclass
class _Save:
    step: int
    metadata: dict[str, Any]
    temporary: Path
    stop: threading.Event
    work: Future[Any]
    committing: bool = False
    keep: int = 0


class Saver:
    """Saves checkpoints under `root`, one at a time. All ranks make the same calls; `advance`, `finish` are collective.

    keep: number of newest checkpoints to keep, 0 for all. keep_every: also keep steps that are multiples of it.
    spike: step of a loss spike, 0 for none; the last checkpoint before it is kept too.
    When an exception ends the `with` block, a save in flight is aborted.
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
        """Step of the save in flight, the same on all ranks; None if there is none."""
        return None if self._save is None else self._save.step

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is still working on the current phase."""
        return self._save is not None and not self._save.work.done()

    @property
    def failed(self) -> bool:
        """Whether this rank's thread has ended with an error."""
        return self._save is not None and self._save.work.done() and self._save.work.exception() is not None

    def reserve(self, states: Iterable[StateShard]) -> None:
        """Allocate the host buffers for background saves of these states. Not collective."""
        self._staging.reserve(states)

    def start(
        self,
        states: Iterable[StateShard],
        *,
        step: int,
        metadata: dict[str, Any],
        background: bool,
        loss_unknown: bool = False,
    ) -> None:
        """Start a save; no other save may be in flight. Does not wait for the disk or other ranks.

        states: the shards that this rank writes, Optimizer.states(owned=True). metadata: the manifest's other fields.
        background: write a copy, so that the states may change once `wait_copied` returns; otherwise they must not
        change until `finish` returns.
        loss_unknown: the loss with these weights is not known before the commit, so an older checkpoint is kept too.
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
        self._save = _Save(step, metadata, temporary, stop, work)
        self._save.keep = max(self.keep, 2) if self.keep and loss_unknown else self.keep

    def wait_copied(self) -> None:
        """Wait until the states of a background save may change. Call before every update. Not collective."""
        if self._save is not None:
            self._copied.wait()

    def advance(self, busy: bool, failed: bool) -> SavedCheckpoint | None:
        """Start the next phase if no rank is busy. Returns the checkpoint once it is complete, otherwise None.

        busy, failed: whether any rank is busy, or has failed: then the save is aborted and all ranks raise.
        """
        save = self._save
        if save is None or (busy and not failed):
            return None
        if failed:
            self._abort(save)
        axis, device = self.ctx.world, self.ctx.device
        if not save.committing:
            parts = gather_json(save.work.result(), axis, device)
            save.committing = True
            if self.ctx.rank == 0:
                save.work = self._threads.submit(self._commit, save, parts)
            return None
        notes = gather_json(save.work.result() if self.ctx.rank == 0 else None, axis, device)[0]
        self._save = None
        return SavedCheckpoint(save.step, step_dir(self.root, save.step), tuple(notes))

    def finish(self) -> SavedCheckpoint:
        """Wait until the save in flight is complete."""
        while True:
            assert self._save is not None
            wait([self._save.work], _POLL_S)
            flags = torch.tensor([float(self.busy), float(self.failed)], device=self.ctx.device)
            busy, failed = all_reduce_(flags, self.ctx.world, "max").tolist()
            if saved := self.advance(bool(busy), bool(failed)):
                return saved

    def _abort(self, save: _Save) -> NoReturn:
        """Stop the save on all ranks, remove its files, and raise the first error."""
        save.stop.set()
        stopped = bool(wait([save.work], _STOP_S).done)
        error = save.work.exception() if stopped else None
        own = None if isinstance(error, _Stopped) else error
        reports = gather_json([None if own is None else str(own), stopped], self.ctx.world, self.ctx.device)
        self._save = None
        if self.ctx.rank == 0 and all(stopped for _, stopped in reports):
            with suppress(OSError):  # the folder is hidden, and the next save removes it
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
        """Write this rank's file; returns JSON {"file", "entry", "tensors": {kind: {name: {shape, dtype, slices}}}}."""

        def proceed() -> None:
            if stop.is_set():
                raise _Stopped

        try:
            ready()
        finally:
            self._copied.set()
        tensors, index = build_part(states, self.ctx)
        file = f"rank{self.ctx.rank:05d}.safetensors"
        wanted = sum(x.numel() * x.element_size() for x in tensors.values())
        try:
            if self.ctx.rank == 0:
                remove_leftovers(self._storage, self.root, temporary)
            make_folders(self._storage, self.root)
            with suppress(FileExistsError):  # another rank was faster
                self._storage.make_folder(temporary)
            if not tensors:
                return {"tensors": {}}
            part = write_part(
                self._storage, temporary / file, tensors, index, block_bytes=self._block_bytes, proceed=proceed
            )
            if self.keep:
                self._read_back(part, temporary / file)
        except OSError as error:
            raise self._write_error(error, temporary / file, wanted) from None
        return part

    def _read_back(self, part: dict[str, Any], file: Path) -> None:
        """Read the file back: older checkpoints may be deleted only if this one is good."""
        manifest = build_manifest([part], self.ctx.layout, 0, _NO_METADATA, self._block_bytes)
        for damage in find_file_damage(file, manifest, self._storage, uncached=True):
            raise CheckpointError(
                "checkpoint.reads-back-differently",
                f"checkpoint not saved: the file reads back differently: {damage}; the disk or the memory of this "
                "machine is faulty; earlier checkpoints are unchanged",
            )

    def _commit(self, save: _Save, parts: list[dict[str, Any]]) -> list[str]:
        """On rank 0: commit the checkpoint, then clean up older ones. Returns notes for the user."""
        manifest = build_manifest(parts, self.ctx.layout, save.step, save.metadata, self._block_bytes)
        data = manifest.encode(self._storage)
        final = step_dir(self.root, save.step)
        try:
            replaced = commit(self._storage, save.temporary, final, data)
        except OSError as error:
            raise self._write_error(error, final, len(data)) from None
        try:
            notes = rename_newer(self._storage, self.root, save.step)
            delete_old(self._storage, self.root, save.step, save.keep, self.keep_every, self.spike)
            if replaced is not None:
                remove_tree(self._storage, replaced)
        except OSError as error:
            return [f"older checkpoints could not be cleaned up: {error.filename}: {error.strerror}"]
        return notes

    def _write_error(self, error: OSError, at: Path, wanted: int) -> CheckpointError:
        free = "an unknown number of"
        with suppress(OSError):
            there = next(p for p in at.parents if self._storage.stat(p) is not None)
            free = f"{self._storage.free_bytes(there):,}"
        return CheckpointError(
            "checkpoint.write-failed",
            f"checkpoint not saved: {error.filename or at}: {error.strerror or error}; {wanted:,} bytes needed here, "
            f"{free} bytes free; earlier checkpoints are unchanged. Free some space or choose another --run.dir, and "
            "start the same command again",
        )


def check_space(root: Path, states: Iterable[StateShard], ctx: ParallelContext, storage: Storage = DISK) -> None:
    """Raise CheckpointError unless `root` is writable and has space for a checkpoint of these states. Collective."""
    tensors, _ = build_part(states, ctx)
    mine = sum(x.numel() * x.element_size() for x in tensors.values())
    needed = sum(gather_json(mine, ctx.world, ctx.device))

    def probe_disk() -> None:
        probe = root / ".step_probe"  # if the process is killed here, `remove_leftovers` deletes it
        try:
            make_folders(storage, root)
            with suppress(FileExistsError):
                storage.make_folder(probe)
            storage.remove_folder(probe)
            free = storage.free_bytes(root)
        except OSError as error:
            raise CheckpointError(
                "checkpoint.folder-not-writable",
                f"{error.filename or root}: {error.strerror}: checkpoints cannot be saved here. Make {root} writable, "
                "or choose another --run.dir",
            ) from None
        if free < needed:
            raise CheckpointError(
                "checkpoint.disk-too-small",
                f"{root}: a checkpoint of this run needs {needed:,} bytes, but only {free:,} are free. Free some "
                "space, or choose another --run.dir",
            )

    on_first_rank(probe_disk, ctx.world, ctx.device)


_NO_METADATA: dict[str, Any] = {"consumed_samples": 0, "consumed_tokens": 0, "config": {}, "data": {}, "versions": {}}


def save(
    root: Path,
    states: Iterable[StateShard],
    ctx: ParallelContext,
    *,
    step: int,
    metadata: dict[str, Any],
    keep: int = 0,
    keep_every: int = 0,
    storage: Storage = DISK,
) -> Path:
    """Save the checkpoint of `step` under `root` and wait for it. Returns its folder. Collective. See Saver."""
    with Saver(root, ctx, keep=keep, keep_every=keep_every, storage=storage) as saver:
        saver.start(states, step=step, metadata=metadata, background=False)
        return saver.finish().folder


def build_part(
    states: Iterable[StateShard], ctx: ParallelContext
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """This rank's part: (key -> tensor, kind -> name -> TensorEntry as JSON, its slices without file and digests)."""
    tensors: dict[str, Tensor] = {}
    index: dict[str, dict[str, Any]] = {}
    for shard in states:
        for piece in shard.param.spec.pieces(ctx):
            if not piece.counted:
                continue
            slices: list[dict[str, Any]] = []
            for offset, shape, first in piece.rectangles(shard.begin, shard.begin + len(shard.flat)):
                key = f"{shard.kind}/{piece.name}" + (f"#{len(slices)}" if slices else "")
                begin = first - shard.begin
                tensors[key] = shard.flat[begin : begin + math.prod(shape)].view(shape)
                slices.append({"key": key, "offset": offset, "shape": shape})
            if slices:
                entry = {"shape": piece.global_shape, "dtype": DTYPE_NAMES[shard.flat.dtype], "slices": slices}
                index.setdefault(shard.kind, {})[piece.name] = entry
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
    """Write a rank's file. Returns its manifest entries as JSON."""
    written = write_safetensors(file, tensors, storage=storage, block_bytes=block_bytes, proceed=proceed)
    for entries in index.values():
        for entry in entries.values():
            for part in entry["slices"]:
                part |= {"file": file.name, "digests": written.digests[part["key"]]}
    return {"file": file.name, "entry": {"size": written.size, "header": written.header}, "tensors": index}


def build_manifest(
    parts: list[dict[str, Any]], layout: Layout, step: int, metadata: dict[str, Any], block_bytes: int
) -> Manifest:
    """Build the manifest from the parts of all ranks."""
    tensors: dict[str, dict[str, TensorEntry]] = {}
    for part in parts:
        for kind, entries in part["tensors"].items():
            table = tensors.setdefault(kind, {})
            for name, raw in entries.items():
                slices = tuple(FileSlice(**one) for one in raw["slices"])
                before = table[name].slices if name in table else ()
                table[name] = TensorEntry(shape=raw["shape"], dtype=raw["dtype"], slices=before + slices)
    files = {part["file"]: FileEntry(**part["entry"]) for part in parts if "file" in part}
    return Manifest(step=step, tensors=tensors, files=files, layout=layout.degrees, block_bytes=block_bytes, **metadata)
