"""Which tokens make sample i: a pure function (seed, epoch, i) -> tokens.

Nothing is shuffled in memory, stored or cached on disk.

Definition. All arithmetic is 64-bit; N documents, T tokens, S = seq_len, B blocks.

* Documents, in file order, are grouped in blocks of 1024. The stream of epoch e is the blocks in the order of a keyed
  permutation of range(B) (key: seed, "blocks", e), and within a block its documents in the order of a keyed permutation
  of range(documents in it) (key: seed, "documents", e, block), all concatenated: T tokens, every document once.
* n = (T - 1) // S samples an epoch. Sample j of epoch e is stream[k * S : k * S + S + 1] with k = the keyed permutation
  of range(n) (key: seed, "samples", e) at j. Neighbours in the stream share one token: a label here, an input there.
* Global sample i is sample i % n of epoch i // n.

What follows from it:
* Resume needs one integer, the samples consumed; extending a run never changes its past, as no epoch knows of another.
  (Megatron's order depends on the number of requested samples: extending a run may reshuffle everything before.)
* The samples of a global batch do not depend on data-parallel size, micro-batch size, workers or restarts.
* Opening is cheap at any size: per epoch only prefix sums over *blocks*, from pointer differences (N / 1024 reads).
  A lookup bisects those, then walks the at most 1024 documents of one block. No index files, so none can be stale.
* Documents of a block stay within 1024 documents' worth of tokens of each other in the stream. That costs no randomness
  of batches, since samples are permuted over the whole epoch; it only decides which documents share a sample.

Keyed permutation: a balanced Feistel network over the smallest domain of an even number of bits that holds [0, n), with
cycle walking (Black & Rogaway 2002: apply again while the result is >= n; the domain is below 4n, so < 4 turns on
average). Any Feistel network is a bijection whatever its round function, so "each exactly once" holds by construction.
Four rounds are indistinguishable from random for big halves (Luby & Rackoff 1988), but ours may have one bit; the extra
ones make small domains mix too. ROUNDS is part of the definition: changing it changes every order.

`csrc/index.cpp` computes the same faster; tests hold the two equal. What breaks if this file is wrong: nothing visibly.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from engine.built import why_not
from engine.data.indexed import NATIVE_INTERFACE, IndexedDataset
from engine.errors import DataError

BLOCK_DOCUMENTS = 1024
ROUNDS = 8
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_MAX_INT64 = (1 << 63) - 1
# Purposes separate the streams of keys drawn from one seed; "split" is used by prepare, "source" for blends.
PURPOSES = {"blocks": 1, "documents": 2, "samples": 3, "split": 4, "source": 5, "fim": 6}
_DIGEST_SAMPLES = 256  # samples gathered at a time by digest(): bounds its memory

Int64Array = npt.NDArray[np.int64]


def mix64(value: int) -> int:
    """The finaliser of splitmix64, a bijection of 64-bit integers."""
    value = ((value ^ (value >> 30)) * _MIX1) & _MASK64
    value = ((value ^ (value >> 27)) * _MIX2) & _MASK64
    return value ^ (value >> 31)


def derive(key: int, word: int) -> int:
    """A new 64-bit key from `key` and one more 64-bit word."""
    return mix64(key ^ mix64((word + _GOLDEN) & _MASK64))


def derive_key(seed: int, purpose: str, *words: int) -> int:
    """The 64-bit key of (seed, purpose, words...)."""
    key = derive(mix64(seed), PURPOSES[purpose])
    for word in words:
        key = derive(key, word)
    return key


def permute(n: int, key: int, indices: Int64Array) -> Int64Array:
    """Numpy reference of the keyed permutation of range(n) at `indices` int64 [k], each in [0, n); int64 [k]."""
    if n == 1:
        return np.zeros_like(indices)
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    round_keys = [np.uint64(mix64((key + (r + 1) * _GOLDEN) & _MASK64)) for r in range(ROUNDS)]
    result = indices.astype(np.uint64)
    walking = np.arange(result.size)
    while walking.size:
        x = result[walking]
        left, right = x >> shift, x & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix64_array(right + round_key) & mask)
        result[walking] = (left << shift) | right
        walking = walking[result[walking] >= np.uint64(n)]
    return result.astype(np.int64)


def _mix64_array(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_MIX1)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_MIX2)
    return value ^ (value >> np.uint64(31))


def block_prefix(block_tokens: Int64Array, key: int) -> tuple[Int64Array, Int64Array]:
    """Numpy reference: (order int64 [B] of the blocks, prefix int64 [B + 1] of tokens before each in that order)."""
    order = permute(len(block_tokens), key, np.arange(len(block_tokens), dtype=np.int64))
    prefix = np.zeros(len(order) + 1, np.int64)
    np.cumsum(block_tokens[order], out=prefix[1:])
    return order, prefix


def gather(
    tokens: npt.NDArray[Any],
    lengths: npt.NDArray[np.int32],
    pointers: Int64Array,
    order: Int64Array,
    prefix: Int64Array,
    key: int,
    block_documents: int,
    positions: Int64Array,
    count: int,
    limit: int,
) -> tuple[Int64Array, tuple[int, int, int]]:
    """Numpy reference: stream[p : p + count] for each p of `positions` int64 [n]; int64 [n, count].

    `key` is that of (seed, "documents", epoch). The second result is (document, offset, value) of the first token
    outside [0, limit), where gathering stops, or (-1, -1, 0).
    """
    out = np.zeros((len(positions), count), np.int64)
    for row, position in enumerate(positions):
        at = int(np.searchsorted(prefix, position, side="right")) - 1
        skip, filled = int(position - prefix[at]), 0
        while filled < count:
            first = int(order[at]) * block_documents
            inside = min(block_documents, len(lengths) - first)
            block_key = derive(key, int(order[at]))
            documents = first + permute(inside, block_key, np.arange(inside, dtype=np.int64))
            ends = np.cumsum(lengths[documents], dtype=np.int64)
            i = int(np.searchsorted(ends, skip, side="right"))
            skip -= int(ends[i - 1]) if i else 0
            for document in documents[i:]:
                start = int(pointers[document]) // tokens.itemsize + skip
                take = min(int(lengths[document]) - skip, count - filled)
                part = out[row, filled : filled + take]
                part[:] = tokens[start : start + take]
                wrong = (part < 0) | (part >= limit)
                if wrong.any():
                    k = int(np.argmax(wrong))
                    return out, (int(document), skip + k, int(part[k]))
                filled, skip = filled + take, 0
                if filled == count:
                    break
            at += 1
    return out, (-1, -1, 0)


def load() -> tuple[ModuleType | None, str]:
    """(engine._index or None, what there is to say about it): not built, or built from another definition."""
    try:
        module = importlib.import_module("engine._index")
        index = np.arange(100, dtype=np.int64)
        same = np.array_equal(module.permute(1000, 42, index), permute(1000, 42, index))
        if not same or getattr(module, "interface", 0) != NATIVE_INTERFACE:
            raise ImportError("it was built from another version of csrc/index.cpp")
    except (ImportError, AttributeError, TypeError) as err:
        return None, f"engine._index is not available ({why_not('engine._index') or err})"
    return module, "engine._index, which gives the same order as numpy"


@functools.cache
def _extension() -> ModuleType | None:
    """engine._index, or None after one warning."""
    module, why = load()
    if module is None:
        warnings.warn(
            f"{why}: the sample order runs in numpy, the same but slower. "
            f"Build it: pip install --no-build-isolation --no-deps -e .",
            stacklevel=3,
        )
    return module


def extension(native: bool | None) -> ModuleType | None:
    """The C++ module: None takes it if it is there, True insists (DataError), False refuses it."""
    module = None if native is False else _extension()
    if native and module is None:
        raise DataError("engine._index is required but not built: pip install --no-build-isolation --no-deps -e .")
    return module


@dataclass(frozen=True)
class _Epoch:
    """What an epoch needs to be read: block order [B], tokens before each block [B + 1], and two keys."""

    order: Int64Array
    prefix: Int64Array
    document_key: int
    sample_key: int


class SampleOrder:
    """The samples of `dataset` for a seed, as defined at the top of this file.

    `native` None takes the C++ extension if it is there, else numpy with one warning; True insists, False refuses it.
    Attributes: `dataset`, `seq_len`, `seed`, `samples_per_epoch`, `native`. Safe to use from several threads.
    Raises DataError when the corpus is too short for one sample, or the arguments make no sense.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        seq_len: int,
        seed: int,
        *,
        native: bool | None = None,
        block_documents: int = BLOCK_DOCUMENTS,  # part of the definition; other values are for tests
    ):
        if seq_len < 1 or not 0 <= seed <= _MASK64 or block_documents < 1:
            raise DataError(f"seq_len = {seq_len}, seed = {seed}: expected seq_len >= 1 and 0 <= seed < 2^64")
        module = extension(native)
        self.dataset = dataset
        self.seq_len = seq_len
        self.seed = seed
        self.native = module is not None
        self.samples_per_epoch = (dataset.num_tokens - 1) // seq_len
        if self.samples_per_epoch < 1:
            raise DataError(
                f"{dataset.prefix}: {dataset.num_tokens} tokens make no sample: one needs seq_len + 1 = {seq_len + 1}. "
                f"Use a larger corpus or a smaller seq_len."
            )
        self._permute = module.permute if module else permute
        self._block_prefix = module.block_prefix if module else block_prefix
        self._gather = module.gather if module else gather
        self._block_documents = block_documents
        starts = dataset.pointers[::block_documents] // dataset.dtype.itemsize
        self._block_tokens: Int64Array = np.diff(starts, append=dataset.num_tokens).astype(np.int64)
        self._recent: dict[int, _Epoch] = {}

    def gather(self, samples: Int64Array) -> Int64Array:
        """Tokens of global samples int64 [n], any order, any epochs; int64 [n, seq_len + 1].

        Raises DataError for a negative sample number and for a token outside the dataset's vocabulary.
        """
        samples = np.ascontiguousarray(samples, dtype=np.int64)
        if samples.ndim != 1 or (samples < 0).any():
            raise DataError(f"sample numbers: expected int64 [n], each >= 0, got shape {samples.shape}: {samples}")
        epochs = samples // self.samples_per_epoch
        if len(samples) and epochs.min() == epochs.max():  # nearly always: nothing to copy together
            return self._gather_epoch(int(epochs[0]), samples % self.samples_per_epoch)
        out = np.empty((len(samples), self.seq_len + 1), np.int64)
        for epoch in np.unique(epochs):
            rows = np.flatnonzero(epochs == epoch)
            out[rows] = self._gather_epoch(int(epoch), samples[rows] % self.samples_per_epoch)
        return out

    def parts(self, sample: int) -> list[tuple[int, int, int]]:
        """What a global sample is made of: (document, offset in it, tokens taken) in order. To look at, not fast."""
        state = self._epoch(sample // self.samples_per_epoch)
        index = np.array([sample % self.samples_per_epoch], np.int64)
        position = int(self._permute(self.samples_per_epoch, state.sample_key, index)[0]) * self.seq_len
        at = int(np.searchsorted(state.prefix, position, side="right")) - 1
        skip, left, parts = position - int(state.prefix[at]), self.seq_len + 1, []
        while left:
            first = int(state.order[at]) * self._block_documents
            inside = min(self._block_documents, len(self.dataset) - first)
            key = derive(state.document_key, int(state.order[at]))
            for document in (first + permute(inside, key, np.arange(inside, dtype=np.int64))).tolist():
                length = int(self.dataset.lengths[document])
                take = min(max(0, length - skip), left)
                if take:
                    parts.append((document, skip, take))
                skip, left = max(0, skip - length), left - take
            at += 1
        return parts

    def sources(self, samples: Int64Array) -> Int64Array:
        """Which source each of samples int64 [n] comes from: there is one here; int64 [n]."""
        return np.zeros(len(samples), np.int64)

    def digest(self, start: int, count: int) -> str:
        """xxh3-128 hex of the tokens of samples [start, start + count), as little-endian int64 in order."""
        state = xxhash.xxh3_128()
        for low in range(start, start + count, _DIGEST_SAMPLES):
            samples = np.arange(low, min(low + _DIGEST_SAMPLES, start + count), dtype=np.int64)
            state.update(self.gather(samples).astype("<i8").tobytes())
        return state.hexdigest()

    def _gather_epoch(self, epoch: int, samples: Int64Array) -> Int64Array:
        state = self._epoch(epoch)
        data = self.dataset
        limit = _MAX_INT64 if data.vocab_size is None else data.vocab_size
        try:
            chunks = self._permute(self.samples_per_epoch, state.sample_key, samples)
            tokens, (document, offset, value) = self._gather(
                data.tokens,
                data.lengths,
                data.pointers,
                state.order,
                state.prefix,
                state.document_key,
                self._block_documents,
                chunks * self.seq_len,
                self.seq_len + 1,
                limit,
            )
        except (IndexError, ValueError) as err:
            data.check()
            raise DataError(
                f"{data.prefix}: reading samples of epoch {epoch} failed: {err}. "
                f"Did the files change after they were opened? Write them again, then restart."
            ) from err
        data.check()
        if document >= 0:
            raise data.refuse_token(document, offset, value)
        return tokens

    def _epoch(self, epoch: int) -> _Epoch:
        """The state of an epoch. Two are kept, as a global batch may span the end of one."""
        state = self._recent.get(epoch)
        if state is None:
            order, prefix = self._block_prefix(self._block_tokens, derive_key(self.seed, "blocks", epoch))
            state = _Epoch(
                order, prefix, derive_key(self.seed, "documents", epoch), derive_key(self.seed, "samples", epoch)
            )
            kept = dict(list(self._recent.items())[-1:])
            self._recent = {**kept, epoch: state}  # one assignment: readers in other threads see old or new
        return state
