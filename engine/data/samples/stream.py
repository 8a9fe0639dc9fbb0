"""The documents of a corpus in the order of an epoch, as one stream of tokens in random access.

Definition. All integers; N documents, B = `blocks_of(N)` blocks; keys of (seed, purpose, epoch) as in keyed.py.

* Block b is the documents [b * N // B, (b + 1) * N // B): neighbours in the file, 100 to 400 of them in a large corpus.
  Within an epoch it is read in file order from its document number derive("documents" key, b) % size on, and round.
* The blocks stand in the order of a keyed permutation ("blocks"): block b at place p(b). The places are cut in groups
  of 1,024, and a group with k blocks in quarters: quarter q has those at [q * k // 4, (q + 1) * k // 4) of the group.
* A group is read in passes, each taking the next document of every block that has one left; a pass is four rounds, one
  for each quarter. Round t (pass t // 4, quarter t % 4) takes the quarter's blocks in the order of a keyed permutation
  of their number (derive(derive("rounds" key, group), t)).
* The stream is the rounds of all groups, one after the other: every document once, in one piece.

What follows from it:
* As far as a sample can tell, documents are shuffled over the whole corpus: those it holds come from as many blocks,
  drawn anew, anywhere in the file. Documents of one block are at least three quarters of a group, 768 blocks, apart in
  the stream (fewer only in a group's last pass, where some blocks have none left). What a sorted corpus does to batches
  is measured beside a full shuffle (tools/bench/shuffle.py).
* Opening reads a pointer a block, and needs 8 bytes a group. A group is added up when it is first looked at: one pass
  over its lengths, 8 bytes a round (up to 256 documents) kept and 16 a block. A lookup bisects groups, then rounds, and
  walks to its place in the round from the nearer end. Nothing is stored in files, so nothing can be stale.

Stream is the numpy reference; `csrc/data/order.cpp` computes the same faster; tests hold the two equal.
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
_MIN_SIZE = 100  # documents a block, where there are more blocks than that

Piece = tuple[int, int, int]  # (document, offset in it, tokens taken)


def blocks_of(documents: int) -> int:
    """Blocks of a corpus: 2^14, or the largest power of four with 100 documents each; a document each if too few.

    A power of four is the whole domain of its permutation: no cycle walking.
    """
    blocks = MIN_BLOCKS
    while 4 * blocks * _MIN_SIZE <= documents:
        blocks *= 4
    return min(blocks, documents)


class Stream:
    """Numpy reference. tokens [T], lengths int32 [N] in tokens, pointers int64 [N] in bytes; three keys of the epoch.

    `blocks` and `group_blocks` are part of the definition: blocks_of(N), GROUP_BLOCKS; others are for tests.
    Raises IndexError or ValueError where the arrays do not fit each other.
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
        begins = np.append(pointers // tokens.itemsize, len(tokens))[self._first]
        ends = np.cumsum(np.diff(begins)[self._order])
        last = np.append(np.arange(group_blocks, blocks, group_blocks), blocks) - 1
        self._prefix = np.concatenate(([0], ends[last]))  # [groups + 1] tokens before each
        self._group = functools.lru_cache(maxsize=None)(self._make_group)

    def gather(self, positions: Int64Array, count: int, limit: int) -> tuple[Int64Array, Piece]:
        """stream[p : p + count] for each p of `positions` int64 [n]; int64 [n, count].

        The second result is (document, offset, value) of the first token outside [0, limit), where gathering stops, or
        (-1, -1, 0).
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
        """What stream[position : position + count] is made of, in order."""
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
        """Of its blocks int64 [k] in order: first document, size, where passes begin; then tokens before each round."""
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
        """The documents of a round, in order."""
        first, size, offset = (part[_quarter(number % QUARTERS, len(part))] for part in self._group(group)[:3])
        if not len(first):
            return []
        order = permute(len(first), derive(derive(self._round_key, group), number), np.arange(len(first)))
        documents = first + (offset + number // QUARTERS) % size
        return [int(documents[j]) for j in order if number // QUARTERS < size[j]]


def _quarter(quarter: int, blocks: int) -> slice:
    return slice(quarter * blocks // QUARTERS, (quarter + 1) * blocks // QUARTERS)
