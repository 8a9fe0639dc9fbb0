"""Several corpora in one stream of samples: whose turn sample i is, as a pure function of (weights, i).

Definition. Source k has the integer weight W_k, all of them sum to M, its share is w_k = W_k / M. Sample i belongs to
one source; c_k(n) counts those of source k among the first n samples. For every n and k

    floor(n * w_k) <= c_k(n) <= ceil(n * w_k),

that is, every source is within one sample of its share at every prefix, for as long as the run may be. (Greedy choice
by the largest deficit, as Megatron has it, does not promise that, and has to be played from the beginning.)

How. The condition says that the j-th sample of source k lies in the window [floor(j / w_k), ceil((j + 1) / w_k)). Unit
jobs with windows on one machine are scheduled by earliest deadline first, if they can be scheduled at all, and these
can (Liu & Layland 1973; Baruah et al. 1996, "proportionate progress"). For random access the stream is cut in blocks
of a power of two of slots, at least as long as two windows. At a border n every source has done floor(n * w_k) jobs for
certain, and of the r = n - sum(floor(n * w_k)) jobs that must be done besides, some of those whose window is open.
Which ones is decided by n alone, so that each block can be computed by itself. Both sides have to work out:

* forward: at any later b no more done-ahead windows may still be open than r(b); so early deadlines should be done.
* backward: at any earlier a no more not-done windows may be open already than the rest; so early releases should be.

Taking of each open job the fraction frac(n * w_k) satisfies both, as fractions only grow until a deadline. The two
families of conditions are chains, so the fractional solution can be rounded. `block_state` does so: it walks the open
jobs in the order of their releases, and whenever the sum of fractions passes an integer it chooses, among the jobs
walked past, the one with the earliest deadline, which leaves the fewest late deadlines. Hall's condition then holds on
the block between two boundaries, and earliest deadline first finds the schedule. `csrc/data/blend.cpp` does the same;
tests check that the two are equal and count every prefix.

Memory: two blocks. Time: a block is some microseconds to milliseconds; nothing is played from the beginning.
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

MAX_TOTAL = 1 << 40  # of integer weights: what is rounded away is a sample in 10^12
MIN_BLOCK = 1 << 10
MAX_BLOCK = 1 << 22  # hence the smallest share, one sample in 2^21

Int32Array = npt.NDArray[np.int32]
Block = tuple[Int64Array, Int32Array, Int32Array]


def integer_weights(shares: Sequence[Fraction]) -> list[int]:
    """Integers in the same proportions, exact if they sum to at most 2^40, else rounded to that. `shares` > 0."""
    scale = math.lcm(*(share.denominator for share in shares))
    whole = [int(share * scale) for share in shares]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    total = sum(whole)
    if total > MAX_TOTAL:
        whole = [max(1, weight * (MAX_TOTAL - len(whole)) // total) for weight in whole]
    return whole


def smallest_share(shares: Sequence[Fraction]) -> Fraction:
    """The least share a source may have beside the others: 2^-21 of them all, so that two windows fit in a block."""
    return sum(shares, Fraction(0)) * 2 / MAX_BLOCK


def block_state(weights: Sequence[int], total: int, n: int) -> tuple[list[int], list[int], list[int]]:
    """At sample n, for each source: samples before n, n * weight mod total, and 1 if its open job is done."""
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
    """Reference: (counts int64 [K] before start, sources int32 [length], ordinals int32 [length]).

    Slot i of the block is sample counts[sources[i]] + ordinals[i] of its source. ValueError where a share is too small
    for the length.
    """
    values = [int(weight) for weight in weights]
    total, length = sum(values), int(length)
    counts, part, ahead = block_state(values, total, start)
    last, _, _ = block_state(values, total, start + length)
    sources, ordinals = np.empty(length, np.int32), np.empty(length, np.int32)
    made = [0] * len(values)
    begins: list[list[int]] = [[] for _ in range(length)]

    def file(k: int, not_before: int) -> None:
        if counts[k] + made[k] < last[k]:
            slot = max(not_before, ((ahead[k] + made[k]) * total - part[k]) // values[k])
            if slot >= length:
                raise ValueError("blend_block: a share is too small for this block length")
            begins[slot].append(k)

    for k in range(len(values)):
        file(k, 0)
    waiting: list[tuple[int, int]] = []
    for i in range(length):
        for k in begins[i]:
            end = _ceil_div((ahead[k] + made[k] + 1) * total - part[k], values[k])
            heapq.heappush(waiting, (min(end, length), k))
        if not waiting or waiting[0][0] <= i:
            raise ValueError("blend_block: a share is too small for this block length")
        _, k = heapq.heappop(waiting)
        sources[i], ordinals[i] = k, made[k]
        made[k] += 1
        file(k, i + 1)
    return np.array(counts, np.int64), sources, ordinals


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class SourceAssignment:
    """Whose turn each sample is, for fixed weights (integers >= 1, as `integer_weights` makes them).

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
        """(source, number of the sample within it), int64 [n] each, of samples int64 [n] >= 0."""
        sources, numbers = np.empty(len(samples), np.int64), np.empty(len(samples), np.int64)
        blocks, slots = np.divmod(samples, self.block)
        for number in np.unique(blocks):
            rows = np.flatnonzero(blocks == number)
            counts, turn, ordinals = self._block(int(number))
            sources[rows] = turn[slots[rows]]
            numbers[rows] = counts[sources[rows]] + ordinals[slots[rows]]
        return sources, numbers

    def counts(self, n: int) -> Int64Array:
        """Samples of each source among the first n, int64 [K]."""
        before, turn, _ = self._block(n // self.block)
        return before + np.bincount(turn[: n % self.block], minlength=len(before))

    def _block(self, number: int) -> Block:
        made = self._recent.get(number)
        if made is None:
            made = self._make(self.weights, number * self.block, self.block)
            kept = dict(list(self._recent.items())[-1:])
            self._recent = {**kept, number: made}  # one assignment: readers in other threads see old or new
        return made


@dataclass(frozen=True)
class Phase:
    """From global sample `start` on, source k has weight weights[k] (0: none of it), until the next phase."""

    start: int
    weights: tuple[int, ...]


class BlendedOrder:
    """The samples of several sources by global number: as SampleOrder, and `sources` tells where each comes from.

    Each source goes through its own SampleOrder in its own order, epoch after epoch, also across changes of weights.
    Within a phase each source is within one sample of its share at every prefix.
    """

    def __init__(self, orders: Sequence[SampleOrder], phases: Sequence[Phase], *, native: bool | None = None):
        starts = [phase.start for phase in phases]
        if not starts or starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
            raise DataError(
                "samples.blend-phases",
                f"phases of a blend: they start at samples {starts}, expected 0 and then rising numbers",
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
        """Let every source begin with epoch 0 at its first sample from `sample` on; there are none before it."""
        for order, count in zip(self.orders, self.counts(sample).tolist()):
            order.begin_at(count)

    def counts(self, n: int) -> Int64Array:
        """Samples of each source among the first n, int64 [sources]."""
        return self._counts(int(np.searchsorted(self._starts, n, side="right")) - 1, n)

    def locate(self, samples: Int64Array) -> tuple[Int64Array, Int64Array]:
        """(source, number of the sample within it), int64 [n] each."""
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
            turn, number = self._assignments[phase].locate(samples[rows] - self._starts[phase])
            sources[rows] = self._active[phase][turn]
            numbers[rows] = number + self._before[phase][sources[rows]]
        return sources, numbers

    def sources(self, samples: Int64Array) -> Int64Array:
        """Which source each of samples int64 [n] comes from, int64 [n]."""
        return self.locate(samples)[0]

    def gather(self, samples: Int64Array) -> Int64Array:
        """Tokens of global samples int64 [n], any order; int64 [n, seq_len + 1]. Raises as SampleOrder does."""
        sources, numbers = self.locate(samples)
        out = np.empty((len(sources), self.seq_len + 1), np.int64)
        for source in np.unique(sources):
            rows = np.flatnonzero(sources == source)
            out[rows] = self.orders[source].gather(numbers[rows])
        return out
