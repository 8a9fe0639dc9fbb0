"""What a step eats: micro-batches, which of their labels count, and where their documents begin.

Rows of tokens become micro-batches in one place, `Collator`, in training and in validation.

Document boundaries are one representation, made once with the batch (on the host, so that no GPU has to be asked for a
length), from which every attention kernel takes what it wants: begins, borders (cu_seqlens), or a mask.

Legend: b micro_batch_size, s seq_len.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """begin int64 [b, s]: where, in its row, the document of each position begins.

    borders int32 [k + 1]: where documents begin when the b rows are laid one after another, rising, and b * s at last.
    """

    begin: Tensor
    cu_seqlens: Tensor

    @staticmethod
    def of(begin: Tensor) -> Documents:
        """From begins [b, s]. On a GPU this waits for it: the number of documents is the size of a tensor."""
        b, s = begin.shape
        position = torch.arange(s, device=begin.device)
        starts = (begin == position).flatten().nonzero().flatten()
        cu_seqlens = torch.cat((starts, starts.new_tensor([b * s]))).to(torch.int32)
        return Documents(begin.contiguous(), cu_seqlens)

    @staticmethod
    def ended_by(tokens: Tensor, eod: int) -> Documents:
        """Documents of rows of tokens [b, s] in which each but the last of a row ends with the token `eod`."""
        position = torch.arange(tokens.shape[1], device=tokens.device)
        begins = torch.ones_like(tokens, dtype=torch.bool)
        begins[:, 1:] = tokens[:, :-1] == eod
        return Documents.of((position * begins).cummax(1).values)

    def again(self) -> Documents:
        """The same without what was made for it, a mask: for one forward, so that it goes with its graph."""
        return Documents(self.begin, self.cu_seqlens)

    @property
    def positions(self) -> Tensor:
        """int64 [b, s]: the position of each token in its document, from 0."""
        return torch.arange(self.begin.shape[1], device=self.begin.device) - self.begin

    @cached_property
    def mask(self) -> Tensor:
        """bool [b, 1, s, s], True where a row sees a column; made when first asked for and kept."""
        column = torch.arange(self.begin.shape[1], device=self.begin.device)
        return ((column >= self.begin[..., None]) & (column <= column[:, None]))[:, None]


@dataclass(frozen=True)
class MicroBatch:
    """One forward's worth of data. `tokens` and `labels` may be overlapping views of one [b, s + 1]: read only."""

    tokens: Tensor  # int64 [b, s]
    labels: Tensor  # int64 [b, s], the token after each of `tokens`
    mask: Tensor  # bool [b, s], True where the label counts in the loss
    sources: Tensor | None = None  # int64 [b], where each sample comes from in a blend
    documents: Documents | None = None  # of [b, s]: which document of its row each token is of; None: all one

    def to(self, device: torch.device) -> MicroBatch:
        """The same data on a device. To a GPU by pinned memory: from elsewhere every copy would be waited for.

        And from rows that lie one after another: others torch first copies to memory that is not pinned.
        """

        def move(x: Tensor) -> Tensor:
            pinned = x.contiguous().pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
            return pinned.to(device, non_blocking=True)

        sources = None if self.sources is None else move(self.sources)
        apart = None
        if self.documents is not None:
            apart = Documents(move(self.documents.begin), move(self.documents.cu_seqlens))
        return MicroBatch(move(self.tokens), move(self.labels), move(self.mask), sources, apart)


@dataclass(frozen=True)
class LossMask:
    """Which labels do not count: those that follow one of `after`, and those that are one of `labels` (token ids)."""

    after: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()

    def __call__(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """True where the label counts; bool [b, s] for tokens and labels int64 [b, s]."""
        mask = torch.ones_like(tokens, dtype=torch.bool)
        for found, numbers in ((tokens, self.after), (labels, self.labels)):
            if numbers:
                mask &= ~torch.isin(found, torch.tensor(numbers))
        return mask


@dataclass(frozen=True)
class Collator:
    """Makes micro-batches of rows of tokens. mask: which labels count; separate_eod: the token that ends documents
    which attention keeps apart, None: the documents of a row see each other."""

    mask: LossMask = LossMask()
    separate_eod: int | None = None

    def __call__(self, rows: Tensor, present: Tensor, sources: Tensor | None = None) -> MicroBatch:
        """From rows int64 [b, s + 1], of which the labels present bool [b, s] are no filling; sources int64 [b]."""
        tokens, labels = rows[:, :-1], rows[:, 1:]
        documents = None if self.separate_eod is None else Documents.ended_by(tokens, self.separate_eod)
        return MicroBatch(tokens, labels, self.mask(tokens, labels) & present, sources, documents)
