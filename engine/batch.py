"""Micro-batches: tokens, labels, the weight of each label, and the document boundaries of packed sequences.

Samples are read as `Rows`. Transforms change rows (masks, fill-in-the-middle); `micro_batches` cuts them.

Document boundaries are computed once, with the batch, on the host: reading a length back from a GPU would make the host
wait for it. Each attention kernel reads the form that it needs: document starts, cu_seqlens, or a mask.

Legend: b micro_batch_size, s seq_len.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """Document boundaries of a micro-batch of packed sequences.

    starts: int64 [b, s], for each position, the index in its row at which its document starts.
    cu_seqlens: int32 [k + 1], ascending: the starts of all k documents in the concatenated rows, then b * s.
    """

    starts: Tensor
    cu_seqlens: Tensor

    @staticmethod
    def from_starts(starts: Tensor) -> Documents:
        """Documents from the start of each position's document, int64 [b, s].

        Synchronizes with a GPU, because the number of documents is the size of a tensor.
        """
        b, s = starts.shape
        position = torch.arange(s, device=starts.device)
        offsets = (starts == position).flatten().nonzero().flatten()
        cu_seqlens = torch.cat((offsets, offsets.new_tensor([b * s]))).to(torch.int32)
        return Documents(starts.contiguous(), cu_seqlens)

    @staticmethod
    def from_eod(tokens: Tensor, eod: int) -> Documents:
        """Documents of rows of tokens, int64 [b, s]: a new one starts after each token `eod` (end of document)."""
        position = torch.arange(tokens.shape[1], device=tokens.device)
        is_start = torch.ones_like(tokens, dtype=torch.bool)
        is_start[:, 1:] = tokens[:, :-1] == eod
        return Documents.from_starts((position * is_start).cummax(1).values)

    def without_mask(self) -> Documents:
        """A copy without the cached mask, for one forward: its mask is then freed with the autograd graph."""
        return Documents(self.starts, self.cu_seqlens)

    @property
    def positions(self) -> Tensor:
        """The position of each token in its document, from 0: int64 [b, s]."""
        return torch.arange(self.starts.shape[1], device=self.starts.device) - self.starts

    @cached_property
    def mask(self) -> Tensor:
        """The causal mask within documents, bool [b, 1, s, s]: True where query i attends to key j. Cached."""
        column = torch.arange(self.starts.shape[1], device=self.starts.device)
        return ((column >= self.starts[..., None]) & (column <= column[:, None]))[:, None]


@dataclass(frozen=True)
class MicroBatch:
    """The data of one forward pass. Read only: `tokens` and `labels` may be overlapping views of one [b, s + 1].

    tokens: int64 [b, s]. labels: int64 [b, s], the next token of each position. weights: float64 [b, s], of each
    label's loss; 0: not counted. samples: int64 [b], global sample numbers. sources: int64 [b], the index of each
    sample's corpus in the data blend. documents: boundaries for document masking; None: each row is one document.
    """

    tokens: Tensor
    labels: Tensor
    weights: Tensor
    samples: Tensor
    sources: Tensor | None = None
    documents: Documents | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same data on a device. To a GPU through pinned memory, as only such copies are asynchronous.

        Tensors are made contiguous first, because torch would stage strided ones in memory that is not pinned.
        """

        def move(x: Tensor) -> Tensor:
            pinned = x.contiguous().pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
            return pinned.to(device, non_blocking=True)

        sources = None if self.sources is None else move(self.sources)
        documents = None
        if self.documents is not None:
            documents = Documents(move(self.documents.starts), move(self.documents.cu_seqlens))
        tokens, labels, weights, samples = map(move, (self.tokens, self.labels, self.weights, self.samples))
        return MicroBatch(tokens, labels, weights, samples, sources, documents)


@dataclass(frozen=True)
class Rows:
    """Samples on their way to micro-batches: what a transform changes. n: any number of samples.

    tokens: int64 [n, s + 1]; the label of position i is token i + 1. weights: float64 [n, s], of each label's loss;
    0: not counted. samples: int64 [n], global sample numbers. sources: int64 [n], index in the data blend. starts:
    int64 [n, s], for each position, the index at which its document starts; None: tokens attend across documents.
    """

    tokens: Tensor
    weights: Tensor
    samples: Tensor
    sources: Tensor
    starts: Tensor | None = None

    @staticmethod
    def from_tokens(tokens: Tensor, samples: Tensor, sources: Tensor) -> Rows:
        """Rows of whole samples: every label has weight 1."""
        n, length = tokens.shape
        return Rows(tokens, torch.ones(n, length - 1, dtype=torch.float64), samples, sources)

    @property
    def labels(self) -> Tensor:
        """int64 [n, s], a view of `tokens`."""
        return self.tokens[:, 1:]


Transform = Callable[[Rows], Rows]


def micro_batches(rows: Rows, size: int, transforms: Sequence[Transform] = ()) -> list[MicroBatch]:
    """Apply the transforms to all rows in order, then cut the rows into micro-batches of `size` samples.

    The only place where rows of tokens become micro-batches, in training and in validation.
    """
    for transform in transforms:
        rows = transform(rows)
    batches = []
    for begin in range(0, len(rows.tokens), size):
        part = slice(begin, begin + size)
        documents = None if rows.starts is None else Documents.from_starts(rows.starts[part])
        tokens, labels = rows.tokens[part, :-1], rows.labels[part]
        batches.append(
            MicroBatch(tokens, labels, rows.weights[part], rows.samples[part], rows.sources[part], documents)
        )
    return batches
