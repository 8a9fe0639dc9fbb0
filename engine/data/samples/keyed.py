"""Stateless randomness: 64-bit keys derived from a seed and words, and permutations computed from a key.

Keyed permutation: a balanced Feistel network over the smallest domain of an even number of bits that contains [0, n),
with cycle walking (Black & Rogaway 2002: apply it again while the result is >= n; the domain is below 4n, so this takes
< 4 iterations on average). A Feistel network is a bijection for any round function, so "each exactly once" holds by
construction. Four rounds are indistinguishable from random for large halves (Luby & Rackoff 1988), but ours may have
one bit; the additional rounds mix small domains well too. ROUNDS is part of the definition: changing it changes every
order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ROUNDS = 8
MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
# Purposes separate the keys derived from one seed; "split" is used by prepare, "source" by blends.
PURPOSES = {"blocks": 1, "documents": 2, "samples": 3, "split": 4, "source": 5, "fim": 6, "rounds": 7}

Int64Array = npt.NDArray[np.int64]
Uint64Array = npt.NDArray[np.uint64]


def mix64(value: int) -> int:
    """Finaliser of splitmix64, a bijection of 64-bit integers."""
    value = ((value ^ (value >> 30)) * _MIX1) & MASK64
    value = ((value ^ (value >> 27)) * _MIX2) & MASK64
    return value ^ (value >> 31)


def derive(key: int, word: int) -> int:
    """A new 64-bit key from `key` and one more 64-bit word."""
    return mix64(key ^ mix64((word + _GOLDEN) & MASK64))


def derive_key(seed: int, purpose: str, *words: int) -> int:
    """The 64-bit key of (seed, purpose, words...)."""
    key = derive(mix64(seed), PURPOSES[purpose])
    for word in words:
        key = derive(key, word)
    return key


def derive_each(key: int, words: Int64Array) -> Uint64Array:
    """derive(key, word) for each of `words` int64 [k] >= 0; uint64 [k]."""
    return _mix64_each(np.uint64(key) ^ _mix64_each(words.astype(np.uint64) + np.uint64(_GOLDEN)))


def permute(n: int, key: int, indices: Int64Array) -> Int64Array:
    """Numpy reference of the keyed permutation of range(n) at `indices` int64 [k], each in [0, n); int64 [k]."""
    if n == 1:
        return np.zeros_like(indices)
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    round_keys = [np.uint64(mix64((key + (r + 1) * _GOLDEN) & MASK64)) for r in range(ROUNDS)]
    result = indices.astype(np.uint64)
    walking = np.arange(result.size)
    while walking.size:
        x = result[walking]
        left, right = x >> shift, x & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix64_each(right + round_key) & mask)
        result[walking] = (left << shift) | right
        walking = walking[result[walking] >= np.uint64(n)]
    return result.astype(np.int64)


def _mix64_each(value: Uint64Array) -> Uint64Array:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_MIX1)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_MIX2)
    return value ^ (value >> np.uint64(31))
