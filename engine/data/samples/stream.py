"""Shuffled stream of the documents of an epoch: one sequence of tokens with random access.

Definition. All integers; N documents, B = `blocks_of(N)` blocks; keys of (seed, purpose, epoch) as in keyed.py.

* Block b is the documents [b * N // B, (b + 1) * N // B): neighbours in the file, 100 to 400 of them in a large corpus.
  Within an epoch it is read in file order, cyclically, starting at its document derive("documents" key, b) % size.
* The blocks are in the order of a keyed permutation ("blocks"): block b at place p(b). The places are divided into
  groups of 1,024, and a group of k blocks into quarters: quarter q is the places [q * k // 4, (q + 1) * k // 4).
* A group is read in passes; each pass takes the next document of every block that has one left. A pass has four rounds,
  one per quarter. Round t (pass t // 4, quarter t % 4) takes the quarter's blocks in the order of a keyed permutation
  of their number (derive(derive("rounds" key, group), t)).
* The stream is the concatenated rounds of all groups: every document once, in one piece.

Consequences:
* Within the length of a sample, documents are shuffled over the whole corpus: each document of a sample comes from a
  different, randomly drawn block anywhere in the file. Documents of one block are at least three quarters of a group,
  768 blocks, apart in the stream (less only in the last pass of a group, where some blocks have none left).
  tools/bench/shuffle.py compares the batches of a sorted corpus with those of a full shuffle.
* Opening reads one pointer per block and needs 8 bytes per group. A group is summed at its first use: one pass over its
  lengths, after which 8 bytes per round (up to 256 documents) and 16 per block are kept. A lookup bisects the groups,
  then the rounds, and walks within the round from the nearer end. No index files exist that could become stale.

Stream is the numpy reference; `csrc/data/order.cpp` computes the same faster; tests check that both are equal.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.data.samples.keyed import Int64Array, derive, derive_each, permute

GROUP_BLOCKS = 1024
QUARTERS = 4
MIN_BLOCKS = 1 << 14
_MIN_SIZE = 100  # documents per block in corpora with more than MIN_BLOCKS blocks

Piece = tuple[int, int, int]  # (document, offset in it, tokens taken)


def blocks_of(documents: int) -> int:
    """Number of blocks: 2^14, or the largest power of four with 100 documents per block; at most one per document.

    A power of four is exactly the domain of its permutation, so no cycle walking is needed.
    """
    blocks = MIN_BLOCKS
    while 4 * blocks * _MIN_SIZE <= documents:
        blocks *= 4
    return min(blocks, documents)


class Stream:
    """Numpy reference. tokens [T], lengths int32 [N] in tokens, pointers int64 [N] in bytes; three keys of the epoch.

    `blocks` and `group_blocks` are part of the definition: blocks_of(N), GROUP_BLOCKS; other values are for tests.
    Raises IndexError or ValueError if the arrays are inconsistent.
    """

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        lengths: npt.NDArray[np.int32],
        pointers: Int64Array,
        blocks: int,
        group_blocks: int,
        block_key: int,
        document_key: int,
        round_key: int,
    ):
        self._tokens, self._lengths, self._pointers = tokens, lengths, pointers
        self._group_blocks, self._document_key, self._round_key = group_blocks, document_key, round_key
        self._first = np.arange(blocks + 1, dtype=np.int64) * len(lengths) // blocks
        self._order = np.argsort(permute(blocks, block_key, np.arange(blocks, dtype=np.int64)))  # place -> block
        starts = np.append(pointers // tokens.itemsize, len(tokens))[self._first]
        ends = np.cumsum(np.diff(starts)[self._order])
        last = np.append(np.arange(group_blocks, blocks, group_blocks), blocks) - 1
        self._prefix = np.concatenate(([0], ends[last]))  # [groups + 1] tokens before each group
        self._group = functools.lru_cache(maxsize=None)(self._make_group)

    def gather(self, positions: Int64Array, count: int, limit: int) -> tuple[Int64Array, Piece]:
        """stream[p : p + count] for each p of `positions` int64 [n]; int64 [n, count].

        The second result is (document, offset, value) of the first token outside [0, limit), at which gathering stops,
        or (-1, -1, 0).
        """
        out = np.zeros((len(positions), count), np.int64)
        for row, position in enumerate(positions.tolist()):
            filled = 0
            for document, skip, take in self.parts(position, count):
                start = int(self._pointers[document]) // self._tokens.itemsize + skip
                part = out[row, filled : filled + take]
                part[:] = self._tokens[start : start + take]
                wrong = (part < 0) | (part >= limit)
                if wrong.any():
                    k = int(np.argmax(wrong))
                    return out, (document, skip + k, int(part[k]))
                filled += take
        return out, (-1, -1, 0)

    def parts(self, position: int, count: int) -> list[Piece]:
        """Pieces of stream[position : position + count], in order."""
        group = int(np.searchsorted(self._prefix, position, side="right")) - 1
        before = self._group(group)[3]
        number = int(np.searchsorted(before, position, side="right")) - 1
        skip, found = position - int(before[number]), []
        while count:
            for document in self._round(group, number):
                length = int(self._lengths[document])
                if skip < length or length < 0:
                    found.append((document, skip, min(length - skip, count)))
                    count -= found[-1][2]
                if not count:
                    break
                skip = max(0, skip - length)
            number += 1
            if number == len(self._group(group)[3]) - 1:
                group, number = group + 1, 0
        return found

    def _make_group(self, number: int) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
        """(first document, size, start offset) of its blocks in order, int64 [k] each; tokens before each round."""
        blocks = self._order[number * self._group_blocks : (number + 1) * self._group_blocks]
        first, size = self._first[blocks], np.diff(self._first)[blocks]
        offset = (derive_each(self._document_key, blocks) % size.astype(np.uint64)).astype(np.int64)
        passes = np.arange(size.max())
        documents = first[:, None] + (offset[:, None] + passes) % size[:, None]
        tokens = np.where(passes < size[:, None], self._lengths[documents], 0).astype(np.int64)
        sums = [tokens[_quarter(quarter, len(blocks))].sum(axis=0) for quarter in range(QUARTERS)]
        ends = self._prefix[number] + np.cumsum(np.stack(sums, axis=1))  # by passes, then quarters
        return first, size, offset, np.concatenate((self._prefix[number : number + 1], ends))

    def _round(self, group: int, number: int) -> list[int]:
        """Documents of a round, in order."""
        first, size, offset = (part[_quarter(number % QUARTERS, len(part))] for part in self._group(group)[:3])
        if not len(first):
            return []
        order = permute(len(first), derive(derive(self._round_key, group), number), np.arange(len(first)))
        documents = first + (offset + number // QUARTERS) % size
        return [int(documents[j]) for j in order if number // QUARTERS < size[j]]


def _quarter(quarter: int, blocks: int) -> slice:
    return slice(quarter * blocks // QUARTERS, (quarter + 1) * blocks // QUARTERS)
