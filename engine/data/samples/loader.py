"""Data loader: the micro-batches of one data-parallel rank, prefetched by one background thread.

The global batch after `consumed` samples is the samples [consumed, consumed + global_batch_size) in every layout. Data
rank r takes the r-th contiguous slice of it and splits the slice into micro-batches, in order. So `consumed_samples` is
the only state needed to resume, also with another data-parallel size or micro-batch size.

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
from engine.data.samples.keyed import Int64Array
from engine.errors import DataError


class Order(Protocol):
    """Samples by global number: a SampleOrder or a BlendedOrder."""

    seq_len: int

    def gather(self, samples: Int64Array) -> Int64Array:
        """Tokens of samples int64 [n]; int64 [n, seq_len + 1]."""

    def sources(self, samples: Int64Array) -> Int64Array:
        """Source in the blend of each of samples int64 [n]; int64 [n]."""


@dataclass(frozen=True)
class RankShare:
    """One data rank's slice of every global batch, and the transforms of its rows, in order."""

    order: Order
    global_batch_size: int
    micro_batch_size: int
    data_rank: int
    data_size: int
    transforms: tuple[Transform, ...] = ()

    def read(self, consumed: int) -> list[MicroBatch]:
        """This rank's micro-batches of the global batch [consumed, consumed + global_batch_size)."""
        local = self.global_batch_size // self.data_size
        first = consumed + self.data_rank * local
        samples = np.arange(first, first + local, dtype=np.int64)
        columns = self.order.gather(samples), samples, self.order.sources(samples)
        return micro_batches(Rows.from_tokens(*map(torch.from_numpy, columns)), self.micro_batch_size, self.transforms)


@dataclass(frozen=True)
class _BatchQueue:
    """Queue from the worker to the loader. `slots`: batches that may still be produced, so neither side polls."""

    slots: threading.Semaphore
    ready: queue.SimpleQueue[list[MicroBatch] | BaseException]
    stop: threading.Event

    def close(self) -> None:
        self.stop.set()
        self.slots.release()


def _produce(share: RankShare, consumed: int, batches: _BatchQueue) -> None:
    """Worker thread. It has no reference to the Loader, so that garbage collection of a Loader stops its worker."""
    try:
        while True:
            batches.slots.acquire()
            if batches.stop.is_set():
                return
            batches.ready.put(share.read(consumed))
            consumed += share.global_batch_size
    except BaseException as err:  # any exception must be raised in the training thread
        batches.ready.put(err)


class Loader:
    """Infinite iterator over global batches: each `next()` returns this data rank's list[MicroBatch].

    The worker starts with the first `next()` (so a Loader may be created before a fork) and keeps up to `prefetch`
    batches ready. An exception of the worker is raised by this and every later `next()`. Raises DataError for sizes
    that do not divide.
    """

    def __init__(self, share: RankShare, *, start_sample: int = 0, prefetch: int = 2):
        whole, micro, ranks = share.global_batch_size, share.micro_batch_size, share.data_size
        if min(whole, micro, ranks, prefetch) < 1 or start_sample < 0:
            raise DataError(
                "samples.sizes-out-of-range",
                f"global_batch_size = {whole}, micro_batch_size = {micro}, data_size = "
                f"{ranks}, prefetch = {prefetch}, start_sample = {start_sample}: sizes must be at least 1 and "
                f"start_sample at least 0",
            )
        if not 0 <= share.data_rank < ranks:
            raise DataError(
                "samples.data-rank-out-of-range",
                f"data_rank = {share.data_rank}: expected to be in [0, data_size = {ranks})",
            )
        if whole % (micro * ranks) != 0:
            raise DataError(
                "samples.batch-not-divisible",
                f"global_batch_size = {whole} is not a multiple of micro_batch_size * data_size = "
                f"{micro} * {ranks} = {micro * ranks}. Change one of the three.",
            )
        self._share = share
        self._consumed = start_sample
        self._batches = _BatchQueue(threading.Semaphore(prefetch), queue.SimpleQueue(), threading.Event())
        self._worker: threading.Thread | None = None
        self._failure: BaseException | None = None
        weakref.finalize(self, self._batches.close)

    @property
    def consumed_samples(self) -> int:
        """Global samples of all batches returned, including start_sample; prefetched batches do not count."""
        return self._consumed

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._failure is not None:
            raise self._failure
        if self._batches.stop.is_set():
            raise DataError(
                "samples.loader-closed",
                "the data loader is closed: create a new one with start_sample = consumed_samples",
            )
        if self._worker is None:
            arguments = (self._share, self._consumed, self._batches)
            self._worker = threading.Thread(target=_produce, args=arguments, name="data-prefetch", daemon=True)
            self._worker.start()
        result = self._batches.ready.get()
        if isinstance(result, BaseException):
            self._failure = result
            raise result
        self._batches.slots.release()
        self._consumed += self._share.global_batch_size
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
