"""Sample order: the tokens of sample i as a pure function (seed, epoch, i) -> tokens.

No shuffled index is held in memory or cached on disk.

Definition. T tokens, S = seq_len; keys and keyed permutations as in keyed.py.

* The stream of epoch e contains all documents, each once and in one piece, shuffled as defined in stream.py: T tokens.
* An epoch has n = (T - 1) // S samples. Sample j of epoch e is stream[k * S : k * S + S + 1] with k = the keyed
  permutation of range(n) (key: seed, "samples", e) at j. Neighbours in the stream share one token: a label of the first
  and an input of the second.
* The tail of an epoch, the last (T - 1) % S tokens of its stream, is in none of its samples; the tails of other epochs
  are other documents. Evaluation, which has to see every token once, also uses `gather_tail`.
* Global sample i is sample i % n of epoch i // n.

Consequences:
* Resuming needs one integer, the number of consumed samples. Extending a run never changes its past, as epochs are
  independent. (Megatron's order depends on the number of requested samples: extending a run may reshuffle its past.)
* The samples of a global batch do not depend on data-parallel size, micro-batch size, workers or restarts.

ORDER_VERSION numbers the definitions. Another version has other tokens at a sample number, so a run that resumes from a
checkpoint of another version (which engine.checkpoint.lineage has to allow) starts epoch 0 at that sample: `begin_at`.
If this file is wrong, nothing fails visibly.
"""

from __future__ import annotations

import numpy as np
import xxhash

from engine.data.samples.indexed import IndexedDataset
from engine.data.samples.keyed import MASK64, Int64Array, derive_key, permute
from engine.data.samples.native_index import select_index
from engine.data.samples.stream import GROUP_BLOCKS, Piece, Stream, blocks_of
from engine.errors import DataError

ORDER_VERSION = 2  # 1 permuted documents only within blocks of 1,024 neighbours
_MAX_INT64 = (1 << 63) - 1
_DIGEST_SAMPLES = 256  # samples gathered at a time by digest(): bounds its memory


class SampleOrder:
    """The samples of `dataset` for a seed, as defined at the top of this file.

    `native`: None uses the C++ extension if available, else numpy with a warning; True requires it, False disables it.
    Attributes: `dataset`, `seq_len`, `seed`, `samples_per_epoch`, `tail` (labels of an epoch that are in no sample),
    `native`. Thread-safe.
    Raises DataError if the corpus is too short for one sample (with `short`: for one label), or arguments are invalid.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        seq_len: int,
        seed: int,
        *,
        native: bool | None = None,
        short: bool = False,
        blocks: int | None = None,  # like group_blocks part of the definition; other values are for tests
        group_blocks: int = GROUP_BLOCKS,
    ):
        if seq_len < 1 or not 0 <= seed <= MASK64 or group_blocks < 1:
            raise DataError(
                "samples.order-arguments",
                f"seq_len = {seq_len}, seed = {seed}: expected seq_len >= 1 and 0 <= seed < 2^64",
            )
        module = select_index(native)
        self.dataset = dataset
        self.seq_len = seq_len
        self.seed = seed
        self.native = module is not None
        self.samples_per_epoch, self.tail = divmod(dataset.num_tokens - 1, seq_len)
        if dataset.num_tokens < (2 if short else seq_len + 1):
            needs = "a label needs a token before it" if short else f"it needs seq_len + 1 = {seq_len + 1}"
            fix = "Use a larger corpus" + ("." if short else " or a smaller seq_len.")
            unit = "label" if short else "sample"
            raise DataError(
                "samples.corpus-too-small",
                f"{dataset.prefix}: {dataset.num_tokens} tokens are too few for one {unit}: {needs}. {fix}",
            )
        self._permute = module.permute if module else permute
        self._make: type[Stream] = module.Stream if module else Stream
        self._blocks = min(blocks or blocks_of(len(dataset)), len(dataset))
        self._group_blocks = group_blocks
        self._begin = self._first_epoch = 0
        self._recent: dict[int, Stream] = {}

    def begin_at(self, sample: int, epoch: int | None = None) -> None:
        """Make sample number `sample` the first of an epoch, usually 0; earlier samples cannot be read."""
        self._begin = sample
        self._first_epoch = self._first_epoch if epoch is None else epoch

    def gather(self, samples: Int64Array) -> Int64Array:
        """Tokens of global samples int64 [n] in any order and of any epochs; int64 [n, seq_len + 1].

        Raises DataError for a sample number before the first and for a token outside the dataset's vocabulary.
        """
        samples = np.ascontiguousarray(samples, dtype=np.int64) - self._begin
        if samples.ndim != 1 or (samples < 0).any():
            raise DataError(
                "samples.sample-numbers",
                f"sample numbers: expected int64 [n], each >= {self._begin}, got shape {samples.shape}: "
                f"{samples + self._begin}",
            )
        epochs = samples // self.samples_per_epoch + self._first_epoch
        if len(samples) and epochs.min() == epochs.max():  # the usual case, without another copy
            epoch = int(epochs[0])
            return self._read(epoch, self._positions(epoch, samples % self.samples_per_epoch), self.seq_len + 1)
        out = np.empty((len(samples), self.seq_len + 1), np.int64)
        for epoch in np.unique(epochs):
            rows = np.flatnonzero(epochs == epoch)
            positions = self._positions(int(epoch), samples[rows] % self.samples_per_epoch)
            out[rows] = self._read(int(epoch), positions, self.seq_len + 1)
        return out

    def gather_tail(self, epoch: int = 0) -> Int64Array:
        """Last tokens of an epoch's stream, int64 [tail + 1]: the last label of its samples and the tokens after it."""
        start = np.array([self.samples_per_epoch * self.seq_len], np.int64)
        return self._read(epoch, start, self.tail + 1)[0]

    def parts(self, sample: int) -> list[Piece]:
        """Pieces of a global sample: (document, offset in it, number of tokens) in order. For inspection; not fast."""
        epoch, number = divmod(sample - self._begin, self.samples_per_epoch)
        (position,) = self._positions(epoch + self._first_epoch, np.array([number], np.int64)).tolist()
        return self._stream(epoch + self._first_epoch).parts(position, self.seq_len + 1)

    def sources(self, samples: Int64Array) -> Int64Array:
        """Source of each of samples int64 [n]: all 0, as there is only one; int64 [n]."""
        return np.zeros(len(samples), np.int64)

    def digest(self, start: int, count: int) -> str:
        """xxh3-128 hex of the tokens of samples [start, start + count), as little-endian int64 in order."""
        state = xxhash.xxh3_128()
        for low in range(start, start + count, _DIGEST_SAMPLES):
            samples = np.arange(low, min(low + _DIGEST_SAMPLES, start + count), dtype=np.int64)
            state.update(self.gather(samples).astype("<i8").tobytes())
        return state.hexdigest()

    def _positions(self, epoch: int, samples: Int64Array) -> Int64Array:
        """Positions in the stream where the samples int64 [n] of an epoch begin, int64 [n]."""
        key = derive_key(self.seed, "samples", epoch)
        chunks: Int64Array = self._permute(self.samples_per_epoch, key, samples)
        return chunks * self.seq_len

    def _read(self, epoch: int, positions: Int64Array, count: int) -> Int64Array:
        """stream[p : p + count] of an epoch for each p of `positions` int64 [n]; int64 [n, count]."""
        data = self.dataset
        limit = _MAX_INT64 if data.vocab_size is None else data.vocab_size
        try:
            tokens, (document, offset, value) = self._stream(epoch).gather(positions, count, limit)
        except (IndexError, ValueError) as err:
            data.check()
            raise DataError(
                "samples.corpus-changed",
                f"{data.prefix}: reading samples of epoch {epoch} failed: {err}. "
                f"Did the files change after they were opened? Write them again, then restart.",
            ) from err
        data.check()
        if document >= 0:
            raise data.token_error(document, offset, value)
        return tokens

    def _stream(self, epoch: int) -> Stream:
        """Stream of an epoch, numpy or C++. Two are cached, as a global batch may span two epochs."""
        stream = self._recent.get(epoch)
        if stream is None:
            data = self.dataset
            keys = [derive_key(self.seed, purpose, epoch) for purpose in ("blocks", "documents", "rounds")]
            stream = self._make(data.tokens, data.lengths, data.pointers, self._blocks, self._group_blocks, *keys)
            kept = dict(list(self._recent.items())[-1:])
            self._recent = {**kept, epoch: stream}  # one assignment: other threads see the old or the new dict
        return stream
