"""Samples of a run whose sequence length changes.

Each length has an order of its samples, as defined in order.py for this length. From the sample at which a length
begins, every source starts a new epoch in that order. Samples and epochs are numbered on, so no shuffle is used twice.
The rest of the epoch before is not read; a message at the start of the run says how much that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.data.samples.blend import BlendedOrder, BlendPhase
from engine.data.samples.keyed import Int64Array
from engine.data.samples.order import SampleOrder
from engine.errors import DataError


@dataclass(frozen=True)
class Length:
    """From global sample `start` on, samples have `seq_len` tokens, until the next length."""

    start: int
    seq_len: int


class StagedOrder:
    """The samples of several lengths by global number. Same interface as SampleOrder, for samples of one length.

    sources: an order of any length for each source. phases: of the blend, () for one source. lengths: the first starts
    at sample 0.
    """

    def __init__(self, sources: Sequence[SampleOrder], phases: Sequence[BlendPhase], lengths: Sequence[Length]):
        self.lengths = tuple(lengths)
        self._starts = np.array([length.start for length in lengths], np.int64)
        self.stages: list[SampleOrder | BlendedOrder] = []
        self._sources: list[list[SampleOrder]] = []
        counted = BlendedOrder(sources, phases) if phases else None
        epochs, before = [0] * len(sources), [0] * len(sources)
        for length in lengths:
            orders = [SampleOrder(source.dataset, length.seq_len, source.seed) for source in sources]
            begin = counted.counts(length.start).tolist() if counted else [length.start]
            if self._sources:
                read = [end - start for start, end in zip(before, begin)]
                epochs = [e + -(-n // o.samples_per_epoch) for e, n, o in zip(epochs, read, self._sources[-1])]
            for order, sample, epoch in zip(orders, begin, epochs):
                order.begin_at(sample, epoch)
            before = begin
            self._sources.append(orders)
            self.stages.append(BlendedOrder(orders, phases) if phases else orders[0])

    def begin_at(self, sample: int) -> None:
        """Start the epoch in which `sample` is at this sample; earlier samples cannot be read."""
        number = self._number(sample)
        if sample > self.lengths[number].start:
            self.stages[number].begin_at(sample)

    def epochs(self, samples: int) -> list[float]:
        """How often the first `samples` samples read each source."""
        found = [0.0] * len(self._sources[0])
        ends = [*(length.start for length in self.lengths[1:]), samples]
        for length, end, orders, stage in zip(self.lengths, ends, self._sources, self.stages):
            for k, order in enumerate(orders):
                counts = [
                    n if isinstance(stage, SampleOrder) else int(stage.counts(n)[k])
                    for n in (length.start, min(end, samples))
                ]
                found[k] += max(0, counts[1] - counts[0]) / order.samples_per_epoch
        return found

    def gather(self, samples: Int64Array) -> Int64Array:
        """Tokens of global samples int64 [n] of one length; int64 [n, seq_len + 1]. Raises like SampleOrder.gather."""
        return self._stage(samples).gather(samples)

    def sources(self, samples: Int64Array) -> Int64Array:
        """Source of each of global samples int64 [n] of one length, int64 [n]."""
        return self._stage(samples).sources(samples)

    def _number(self, sample: int) -> int:
        return max(0, int(np.searchsorted(self._starts, sample, side="right")) - 1)

    def _stage(self, samples: Int64Array) -> SampleOrder | BlendedOrder:
        numbers = {self._number(int(sample)) for sample in (samples.min(), samples.max())} if len(samples) else {0}
        if len(numbers) > 1:
            raise DataError(
                "samples.lengths-mixed", f"samples {samples.min()} to {samples.max()} have different sequence lengths"
            )
        return self.stages[numbers.pop()]
