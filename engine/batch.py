"""Micro-batches: tokens, labels, the loss mask, and the document boundaries of packed sequences.

`Collator` is the only place where rows of tokens become micro-batches, in training and in validation.

Document boundaries are computed once, with the batch, on the host: reading a length back from a GPU would make the host
wait for it. Each attention kernel reads the form that it needs: document starts, cu_seqlens, or a mask.

Legend: b micro_batch_size, s seq_len.
"""

from __future__ import annotations

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
    """The data of one forward pass. Read only: `tokens` and `labels` may be overlapping views of one [b, s + 1]."""

    tokens: Tensor  # int64 [b, s]
    labels: Tensor  # int64 [b, s], the next token of each position
    mask: Tensor  # bool [b, s], the loss mask: True where the label counts in the loss
    sources: Tensor | None = None  # int64 [b], the index of each sample's corpus in the data blend
    documents: Documents | None = None  # boundaries for document masking; None: each row is one document

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
        return MicroBatch(move(self.tokens), move(self.labels), move(self.mask), sources, documents)


@dataclass(frozen=True)
class LossMask:
    """Labels to exclude from the loss, by token id: those that follow a token of `after`, and those in `labels`."""

    after: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()

    def __call__(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The loss mask of tokens and labels int64 [b, s]: bool [b, s], True where the label counts."""
        mask = torch.ones_like(tokens, dtype=torch.bool)
        for values, excluded in ((tokens, self.after), (labels, self.labels)):
            if excluded:
                mask &= ~torch.isin(values, torch.tensor(excluded))
        return mask


@dataclass(frozen=True)
class Collator:
    """Turns rows of tokens into micro-batches.

    separate_eod: the token that ends a document, for document masking; None: tokens attend across documents.
    """

    mask: LossMask = LossMask()
    separate_eod: int | None = None

    def __call__(self, rows: Tensor, present: Tensor, sources: Tensor | None = None) -> MicroBatch:
        """rows int64 [b, s + 1]; present bool [b, s], False where the label is padding; sources int64 [b]."""
        tokens, labels = rows[:, :-1], rows[:, 1:]
        documents = None if self.separate_eod is None else Documents.from_eod(tokens, self.separate_eod)
        return MicroBatch(tokens, labels, self.mask(tokens, labels) & present, sources, documents)
