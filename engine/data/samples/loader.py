"""From sample numbers to the micro-batches of one data-parallel rank, prefetched by one background thread.

The global batch that follows `consumed` samples is the samples [consumed, consumed + global_batch_size), whatever the
layout. Data rank r takes the r-th contiguous slice of it and cuts the slice into micro-batches, in order. So
`consumed_samples` is all there is to resume from, also with another data-parallel size or micro-batch size.

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

from engine.batch import Documents
from engine.config.skips import Ranges, holds
from engine.data.samples.fim import FillInTheMiddle
from engine.data.samples.keyed import Int64Array
from engine.errors import DataError


class Order(Protocol):
    """Samples by global number: a SampleOrder or a BlendedOrder."""

    seq_len: int

    def gather(self, samples: Int64Array) -> Int64Array:
        """Tokens of samples int64 [n]; int64 [n, seq_len + 1]."""

    def sources(self, samples: Int64Array) -> Int64Array:
        """Which source of a blend each of samples int64 [n] comes from."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward's worth of data. `tokens` and `labels` may be overlapping views of one [b, s + 1]: read only."""

    tokens: torch.Tensor  # int64 [b, s]
    labels: torch.Tensor  # int64 [b, s], the token after each of `tokens`
    mask: torch.Tensor  # bool [b, s], True where the label counts in the loss
    sources: torch.Tensor | None = None  # int64 [b], where each sample comes from in a blend
    documents: Documents | None = None  # of [b, s]: which document of its row each token is of; None: all one

    def to(self, device: torch.device) -> MicroBatch:
        """The same data on a device. To a GPU by pinned memory: from elsewhere every copy would be waited for.

        And from rows that lie one after another: others torch first copies to memory that is not pinned.
        """

        def move(x: torch.Tensor) -> torch.Tensor:
            pinned = x.contiguous().pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
            return pinned.to(device, non_blocking=True)

        sources = None if self.sources is None else move(self.sources)
        apart = None
        if self.documents is not None:
            apart = Documents(move(self.documents.begin), move(self.documents.borders))
        return MicroBatch(move(self.tokens), move(self.labels), move(self.mask), sources, apart)


@dataclass(frozen=True)
class LossMask:
    """Which labels do not count: those that follow one of `after`, and those that are one of `labels` (token ids)."""

    after: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()

    def __call__(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """True where the label counts; bool [b, s] for tokens and labels int64 [b, s]."""
        mask = torch.ones_like(tokens, dtype=torch.bool)
        for found, numbers in ((tokens, self.after), (labels, self.labels)):
            if numbers:
                mask &= ~torch.isin(found, torch.tensor(numbers))
        return mask


@dataclass(frozen=True)
class Slice:
    """This rank's share of every global batch, and how to read it."""

    order: Order
    global_batch_size: int
    micro_batch_size: int
    data_rank: int
    data_size: int
    mask: LossMask = LossMask()
    separate_eod: int | None = None
    fim: FillInTheMiddle | None = None
    skip: Ranges = ()

    def read(self, consumed: int) -> list[MicroBatch]:
        """This rank's micro-batches of the global batch [consumed, consumed + global_batch_size)."""
        local = self.global_batch_size // self.data_size
        first = consumed + self.data_rank * local
        samples = np.arange(first, first + local, dtype=np.int64)
        rows, sources = self.order.gather(samples), self.order.sources(samples)
        lengths = np.full(local, rows.shape[1])
        if self.fim is not None:  # all micro-batches at once: one call of the tokenizer
            changed = self.fim(rows, samples, sources)
            rows, lengths = changed.rows, changed.lengths
        skipped = np.array([holds(self.skip, sample) for sample in samples.tolist()])
        rows[skipped] = 0  # not only masked: what makes a number infinite would do so with no weight as well
        batches = []
        for low in range(0, local, self.micro_batch_size):
            part = slice(low, low + self.micro_batch_size)
            line = torch.from_numpy(rows[part])
            tokens, labels = line[:, :-1], line[:, 1:]
            mask = self.mask(tokens, labels) & ~torch.from_numpy(skipped[part])[:, None]
            if self.fim is not None:  # its filling does not count
                mask &= torch.arange(1, line.shape[1]) < torch.from_numpy(lengths[part])[:, None]
            documents = None if self.separate_eod is None else Documents.ended_by(tokens, self.separate_eod)
            batches.append(MicroBatch(tokens, labels, mask, torch.from_numpy(sources[part]), documents))
        return batches


@dataclass(frozen=True)
class _Pipe:
    """Between the worker and the loader. `slots` counts batches that may still be made, so nothing ever polls."""

    slots: threading.Semaphore
    ready: queue.SimpleQueue[list[MicroBatch] | BaseException]
    stop: threading.Event

    def close(self) -> None:
        self.stop.set()
        self.slots.release()


def _produce(part: Slice, consumed: int, pipe: _Pipe) -> None:
    """The worker. Knows no Loader, so that a forgotten Loader can be collected and end it."""
    try:
        while True:
            pipe.slots.acquire()
            if pipe.stop.is_set():
                return
            pipe.ready.put(part.read(consumed))
            consumed += part.global_batch_size
    except BaseException as err:  # whatever it is, it has to surface in the training thread
        pipe.ready.put(err)


class Loader:
    """Iterator over global batches: each `next()` is this data rank's list[MicroBatch], without end.

    The worker starts with the first `next()` (so a Loader may be made before a fork) and keeps up to `prefetch` batches
    ready. `mask`: which labels count; `separate_eod`: number the documents that it ends; `fim`: permute some of them
    first; `skip`: samples that count nothing. The worker's exception is raised by `next()`, and by every later one.
    Raises DataError for sizes that do not divide.
    """

    def __init__(
        self,
        order: Order,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        start_sample: int = 0,
        prefetch: int = 2,
        mask: LossMask = LossMask(),
        separate_eod: int | None = None,
        fim: FillInTheMiddle | None = None,
        skip: Ranges = (),
    ):
        if min(global_batch_size, micro_batch_size, data_size, prefetch) < 1 or start_sample < 0:
            raise DataError(
                f"global_batch_size = {global_batch_size}, micro_batch_size = {micro_batch_size}, data_size = "
                f"{data_size}, prefetch = {prefetch}, start_sample = {start_sample}: sizes must be at least 1 and "
                f"start_sample at least 0"
            )
        if not 0 <= data_rank < data_size:
            raise DataError(f"data_rank = {data_rank}: expected to be in [0, data_size = {data_size})")
        if global_batch_size % (micro_batch_size * data_size) != 0:
            raise DataError(
                f"global_batch_size = {global_batch_size} is not a multiple of micro_batch_size * data_size = "
                f"{micro_batch_size} * {data_size} = {micro_batch_size * data_size}. Change one of the three."
            )
        self._part = Slice(
            order, global_batch_size, micro_batch_size, data_rank, data_size, mask, separate_eod, fim, skip
        )
        self._consumed = start_sample
        self._pipe = _Pipe(threading.Semaphore(prefetch), queue.SimpleQueue(), threading.Event())
        self._worker: threading.Thread | None = None
        self._failure: BaseException | None = None
        weakref.finalize(self, self._pipe.close)

    @property
    def consumed_samples(self) -> int:
        """Global samples of all batches handed out, start_sample included; batches only prefetched do not count."""
        return self._consumed

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._failure is not None:
            raise self._failure
        if self._pipe.stop.is_set():
            raise DataError("the data loader is closed: make a new one with start_sample = consumed_samples")
        if self._worker is None:
            arguments = (self._part, self._consumed, self._pipe)
            self._worker = threading.Thread(target=_produce, args=arguments, name="data-prefetch", daemon=True)
            self._worker.start()
        result = self._pipe.ready.get()
        if isinstance(result, BaseException):
            self._failure = result
            raise result
        self._pipe.slots.release()
        self._consumed += self._part.global_batch_size
        return result

    def close(self) -> None:
        """Stop the worker, at most one batch later. Harmless twice."""
        self._pipe.close()
        if self._worker is not None:
            self._worker.join(timeout=10.0)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
