"""Data loader: the micro-batches of one data-parallel rank, prefetched by one background thread.

The samples of a step and the sizes of its batch follow from the phases of the run (engine.config.phases), in every
layout. Data rank r takes the r-th contiguous slice of the global batch and splits it into micro-batches, in order. So
the step is the only state needed to resume, also with another data-parallel size or micro-batch size.

Legend: b micro_batch_size, s seq_len.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np
import torch

from engine.batch import MicroBatch, Rows, Transform, micro_batches
from engine.config.phases import Phases
from engine.data.samples.keyed import Int64Array
from engine.errors import DataError


class Order(Protocol):
    """Samples by global number: a SampleOrder, a BlendedOrder or a StagedOrder."""

    def gather(self, samples: Int64Array) -> Int64Array:
        """Tokens of samples int64 [n]; int64 [n, seq_len + 1]."""

    def sources(self, samples: Int64Array) -> Int64Array:
        """Source in the blend of each of samples int64 [n]; int64 [n]."""


@dataclass(frozen=True)
class RankShare:
    """One data rank's slice of every global batch, and the transforms of its rows, in order."""

    order: Order
    phases: Phases
    data_rank: int
    data_size: int
    transforms: tuple[Transform, ...] = ()

    def read(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of an optimizer step."""
        whole, micro = self.phases.samples(step), self.phases.at(step).micro_batch_size
        local = len(whole) // self.data_size
        first = whole.start + self.data_rank * local
        samples = np.arange(first, first + local, dtype=np.int64)
        columns = self.order.gather(samples), samples, self.order.sources(samples)
        return micro_batches(Rows.from_tokens(*map(torch.from_numpy, columns)), micro, self.transforms)


@dataclass(frozen=True)
class _BatchQueue:
    """Queue from the worker to the loader. `slots`: batches that may still be produced, so neither side polls."""

    slots: threading.Semaphore
    ready: queue.SimpleQueue[list[MicroBatch] | BaseException]
    stop: threading.Event

    def close(self) -> None:
        self.stop.set()
        self.slots.release()


def _produce(share: RankShare, step: int, batches: _BatchQueue) -> None:
    """Worker thread. It has no reference to the Loader, so that garbage collection of a Loader stops its worker."""
    try:
        while True:
            batches.slots.acquire()
            if batches.stop.is_set():
                return
            step += 1
            batches.ready.put(share.read(step))
    except BaseException as err:  # any exception must be raised in the training thread
        batches.ready.put(err)


class Loader:
    """Infinite iterator over global batches: each `next()` returns this data rank's list[MicroBatch].

    The first is that of the step after the origin of the phases. The worker starts with the first `next()` (so a Loader
    may be created before a fork) and keeps up to `prefetch` batches ready. An exception of the worker is raised by this
    and every later `next()`. Raises DataError for sizes that do not divide.
    """

    def __init__(self, share: RankShare, *, prefetch: int = 2):
        ranks = share.data_size
        sizes = [size for phase in share.phases.phases for size in (phase.global_batch_size, phase.micro_batch_size)]
        if min(*sizes, ranks, prefetch) < 1:
            raise DataError(
                "samples.sizes-out-of-range",
                f"batch sizes {sizes}, data_size = {ranks}, prefetch = {prefetch}: sizes must be at least 1",
            )
        if not 0 <= share.data_rank < ranks:
            raise DataError(
                "samples.data-rank-out-of-range",
                f"data_rank = {share.data_rank}: expected to be in [0, data_size = {ranks})",
            )
        for phase in share.phases.phases:
            slice_ = phase.micro_batch_size * ranks
            if phase.global_batch_size % slice_:
                raise DataError(
                    "samples.batch-not-divisible",
                    f"global_batch_size = {phase.global_batch_size} is not a multiple of micro_batch_size * "
                    f"data_size = {phase.micro_batch_size} * {ranks} = {slice_}. Change one of the three.",
                )
        self._share = share
        self._step = share.phases.origin.step
        self._batches = _BatchQueue(threading.Semaphore(prefetch), queue.SimpleQueue(), threading.Event())
        self._worker: threading.Thread | None = None
        self._failure: BaseException | None = None
        weakref.finalize(self, self._batches.close)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._failure is not None:
            raise self._failure
        if self._batches.stop.is_set():
            raise DataError(
                "samples.loader-closed",
                "the data loader is closed: create a new one that begins at its position",
            )
        if self._worker is None:
            arguments = (self._share, self._step, self._batches)
            self._worker = threading.Thread(target=_produce, args=arguments, name="data-prefetch", daemon=True)
            self._worker.start()
        result = self._batches.ready.get()
        if isinstance(result, BaseException):
            self._failure = result
            raise result
        self._batches.slots.release()
        self._step += 1
        return result

    def close(self) -> None:
        """Stop the worker, after at most one more batch. May be called twice."""
        self._batches.close()
        if self._worker is not None:
            self._worker.join(timeout=10.0)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
