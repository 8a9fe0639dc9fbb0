"""Data blend: mixes several corpora into one stream; the source of sample i is a pure function of (weights, i).

Definition. Source k has the integer weight W_k; the weights sum to M; its share is w_k = W_k / M. Each sample i belongs
to one source, and c_k(n) is the number of samples of source k among the first n samples. For every n and k

    floor(n * w_k) <= c_k(n) <= ceil(n * w_k),

that is, every source is within one sample of its share at every prefix, for a run of any length. (Megatron's greedy
choice of the largest deficit does not guarantee this, and has to be replayed from the start.)

Algorithm. By this condition the j-th sample of source k is in the window [floor(j / w_k), ceil((j + 1) / w_k)). Unit
jobs with windows on one machine can be scheduled by earliest deadline first if any schedule exists, and here one does
(Liu & Layland 1973; Baruah et al. 1996, "proportionate progress"). For random access the stream is divided into blocks
of a power of two of slots, at least as long as two windows. At a block boundary n every source has completed at least
floor(n * w_k) jobs. Another r(n) = n - sum(floor(n * w_k)) jobs must be complete: some of those whose window is open.
The choice depends only on n, so that each block can be computed independently. It has to satisfy two conditions:

* forward: at any later b, at most r(b) jobs done ahead at n may have windows still open; this favours early deadlines.
* backward: at any earlier a with o(a) open windows, at most o(a) - r(a) jobs not done at n may have windows already
  open; this favours early releases.

Doing the fraction frac(n * w_k) of each open job satisfies both, as fractions only grow until a deadline. The two
families of conditions are chains, so the fractional solution can be rounded. `block_state` does so: it walks the open
jobs in the order of their releases, and whenever the sum of fractions passes an integer it chooses, among the jobs
walked past, the one with the earliest deadline, which leaves the fewest late deadlines. Hall's condition then holds on
the block between two boundaries, and earliest deadline first finds the schedule. `csrc/data/blend.cpp` does the same;
tests check that the two are equal and count every prefix.

Memory: two blocks. Time: microseconds to milliseconds per block; nothing is replayed from the start.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from engine.data.samples.keyed import Int64Array
from engine.data.samples.native_index import select_index
from engine.data.samples.order import SampleOrder
from engine.errors import DataError

MAX_TOTAL = 1 << 40  # sum of integer weights; rounding changes one sample in 10^12
MIN_BLOCK = 1 << 10
MAX_BLOCK = 1 << 22  # slots; hence the smallest share is one sample in 2^21

Int32Array = npt.NDArray[np.int32]
Block = tuple[Int64Array, Int32Array, Int32Array]


def integer_weights(shares: Sequence[Fraction]) -> list[int]:
    """Integers in the same proportions: exact if their sum is at most 2^40, else rounded to that. `shares` > 0."""
    scale = math.lcm(*(share.denominator for share in shares))
    whole = [int(share * scale) for share in shares]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    total = sum(whole)
    if total > MAX_TOTAL:
        whole = [max(1, weight * (MAX_TOTAL - len(whole)) // total) for weight in whole]
    return whole


def block_state(weights: Sequence[int], total: int, n: int) -> tuple[list[int], list[int], list[int]]:
    """Per source at block boundary n: (samples before n, n * weight mod total, 1 if its open job is done)."""
    counts = [n * weight // total for weight in weights]
    part = [n * weight % total for weight in weights]
    ahead = [0] * len(weights)
    under_way = sorted((-_ceil_div(p, w), k) for k, (p, w) in enumerate(zip(part, weights)) if p)
    candidates: list[tuple[int, int]] = []
    passed = chosen = 0
    for _, k in under_way:
        heapq.heappush(candidates, (_ceil_div(total - part[k], weights[k]), k))
        passed += part[k]
        if passed // total > chosen:
            _, best = heapq.heappop(candidates)
            ahead[best], counts[best], chosen = 1, counts[best] + 1, chosen + 1
    return counts, part, ahead


def blend_block(weights: Int64Array, start: int, length: int) -> Block:
    """Reference: (counts int64 [K] before start, sources int32 [length], ordinals int32 [length]) of a block.

    Slot i of the block is sample counts[sources[i]] + ordinals[i] of its source. Raises ValueError if a share is too
    small for the length.
    """
    values = [int(weight) for weight in weights]
    total, length = sum(values), int(length)
    counts, part, ahead = block_state(values, total, start)
    last, _, _ = block_state(values, total, start + length)
    sources, ordinals = np.empty(length, np.int32), np.empty(length, np.int32)
    done = [0] * len(values)
    releases: list[list[int]] = [[] for _ in range(length)]  # slot -> sources whose next job is released there

    def release_next(k: int, not_before: int) -> None:
        if counts[k] + done[k] < last[k]:
            slot = max(not_before, ((ahead[k] + done[k]) * total - part[k]) // values[k])
            if slot >= length:
                raise ValueError("blend_block: a share is too small for this block length")
            releases[slot].append(k)

    for k in range(len(values)):
        release_next(k, 0)
    waiting: list[tuple[int, int]] = []
    for i in range(length):
        for k in releases[i]:
            end = _ceil_div((ahead[k] + done[k] + 1) * total - part[k], values[k])
            heapq.heappush(waiting, (min(end, length), k))
        if not waiting or waiting[0][0] <= i:
            raise ValueError("blend_block: a share is too small for this block length")
        _, k = heapq.heappop(waiting)
        sources[i], ordinals[i] = k, done[k]
        done[k] += 1
        release_next(k, i + 1)
    return np.array(counts, np.int64), sources, ordinals


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class SourceAssignment:
    """Assigns each sample to a source, for fixed weights (integers >= 1, from `integer_weights`).

    `native`: as for SampleOrder. Safe to use from several threads.
    """

    def __init__(self, weights: Sequence[int], *, native: bool | None = None):
        total = sum(weights)
        if not weights or min(weights) < 1 or total > MAX_TOTAL:
            raise DataError(
                "samples.blend-weights", "weights of a blend: expected integers of at least 1 that sum to at most 2^40"
            )
        windows = 2 * _ceil_div(total, min(weights))
        if windows > MAX_BLOCK:
            raise DataError(
                "samples.blend-weights",
                f"weights of a blend: {min(weights)} of {total} is less than one sample in 2^21",
            )
        self.weights = np.array(weights, np.int64)
        self.block = max(MIN_BLOCK, 1 << (windows - 1).bit_length())
        module = select_index(native)
        self._make = module.blend_block if module else blend_block
        self._recent: dict[int, Block] = {}

    def locate(self, samples: Int64Array) -> tuple[Int64Array, Int64Array]:
        """(source, sample number within it), int64 [n] each, of samples int64 [n] >= 0."""
        sources, numbers = np.empty(len(samples), np.int64), np.empty(len(samples), np.int64)
        blocks, slots = np.divmod(samples, self.block)
        for number in np.unique(blocks):
            rows = np.flatnonzero(blocks == number)
            counts, block_sources, ordinals = self._block(int(number))
            sources[rows] = block_sources[slots[rows]]
            numbers[rows] = counts[sources[rows]] + ordinals[slots[rows]]
        return sources, numbers

    def counts(self, n: int) -> Int64Array:
        """Samples of each source among the first n, int64 [K]."""
        before, block_sources, _ = self._block(n // self.block)
        return before + np.bincount(block_sources[: n % self.block], minlength=len(before))

    def _block(self, number: int) -> Block:
        block = self._recent.get(number)
        if block is None:
            block = self._make(self.weights, number * self.block, self.block)
            kept = dict(list(self._recent.items())[-1:])
            self._recent = {**kept, number: block}  # one assignment: other threads see the old or the new dict
        return block


@dataclass(frozen=True)
class BlendPhase:
    """From global sample `start` until the next phase, source k has weight weights[k] (0: not used)."""

    start: int
    weights: tuple[int, ...]


class BlendedOrder:
    """Samples of a blend of several sources by global number. Same interface as SampleOrder.

    Each source is read in its own SampleOrder, epoch after epoch, also across changes of weights. Within a phase each
    source is within one sample of its share at every prefix.
    """

    def __init__(self, orders: Sequence[SampleOrder], phases: Sequence[BlendPhase], *, native: bool | None = None):
        starts = [phase.start for phase in phases]
        if not starts or starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
            raise DataError(
                "samples.blend-phases",
                f"phases of a blend: they start at samples {starts}, expected 0 and then increasing numbers",
            )
        if any(len(phase.weights) != len(orders) for phase in phases):
            raise DataError(
                "samples.blend-weights", f"phases of a blend: expected one weight for each of {len(orders)} sources"
            )
        if len({order.seq_len for order in orders}) != 1:
            raise DataError("samples.blend-lengths", "the sources of a blend have samples of different lengths")
        self.orders = list(orders)
        self.seq_len = orders[0].seq_len
        self._starts = np.array(starts, np.int64)
        self._active = [np.flatnonzero(phase.weights) for phase in phases]
        self._assignments = [SourceAssignment([w for w in phase.weights if w], native=native) for phase in phases]
        self._before = [np.zeros(len(orders), np.int64)]
        for at, end in enumerate(starts[1:]):
            self._before.append(self._counts(at, end))

    def _counts(self, phase: int, n: int) -> Int64Array:
        counts = self._before[phase].copy()
        counts[self._active[phase]] += self._assignments[phase].counts(n - int(self._starts[phase]))
        return counts

    def begin_at(self, sample: int) -> None:
        """Start epoch 0 of every source at its first sample from `sample` on; earlier samples cannot be read."""
        for order, count in zip(self.orders, self.counts(sample).tolist()):
            order.begin_at(count)

    def counts(self, n: int) -> Int64Array:
        """Samples of each source among the first n, int64 [sources]."""
        return self._counts(int(np.searchsorted(self._starts, n, side="right")) - 1, n)

    def locate(self, samples: Int64Array) -> tuple[Int64Array, Int64Array]:
        """(source, sample number within it) of global samples int64 [n], int64 [n] each."""
        samples = np.ascontiguousarray(samples, dtype=np.int64)
        if samples.ndim != 1 or (samples < 0).any():
            raise DataError(
                "samples.sample-numbers",
                f"sample numbers: expected int64 [n], each >= 0, got shape {samples.shape}: {samples}",
            )
        sources, numbers = np.empty_like(samples), np.empty_like(samples)
        phases = np.searchsorted(self._starts, samples, side="right") - 1
        for phase in np.unique(phases):
            rows = np.flatnonzero(phases == phase)
            source, number = self._assignments[phase].locate(samples[rows] - self._starts[phase])
            sources[rows] = self._active[phase][source]
            numbers[rows] = number + self._before[phase][sources[rows]]
        return sources, numbers

    def sources(self, samples: Int64Array) -> Int64Array:
        """Source of each of the global samples int64 [n], int64 [n]."""
        return self.locate(samples)[0]

    def gather(self, samples: Int64Array) -> Int64Array:
        """Tokens of global samples int64 [n] in any order; int64 [n, seq_len + 1]. Raises like SampleOrder.gather."""
        sources, numbers = self.locate(samples)
        out = np.empty((len(sources), self.seq_len + 1), np.int64)
        for source in np.unique(sources):
            rows = np.flatnonzero(sources == source)
            out[rows] = self.orders[source].gather(numbers[rows])
        return out
