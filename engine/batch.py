"""Which document each position of a micro-batch belongs to: what attention and learned positions need to know of it.

One representation, made once where the batch is made (on the host, so that no GPU has to be asked for a length), from
which every attention kernel takes what it wants: begins, borders (cu_seqlens), or a mask.
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
    borders: Tensor

    @staticmethod
    def of(begin: Tensor) -> Documents:
        """From begins [b, s]. On a GPU this waits for it: the number of documents is the size of a tensor."""
        b, s = begin.shape
        position = torch.arange(s, device=begin.device)
        starts = (begin == position).flatten().nonzero().flatten()
        borders = torch.cat((starts, starts.new_tensor([b * s]))).to(torch.int32)
        return Documents(begin.contiguous(), borders)

    @staticmethod
    def ended_by(tokens: Tensor, eod: int) -> Documents:
        """Documents of rows of tokens [b, s] in which each but the last of a row ends with the token `eod`."""
        position = torch.arange(tokens.shape[1], device=tokens.device)
        begins = torch.ones_like(tokens, dtype=torch.bool)
        begins[:, 1:] = tokens[:, :-1] == eod
        return Documents.of((position * begins).cummax(1).values)

    def again(self) -> Documents:
        """The same without what was made for it, a mask: for one forward, so that it goes with its graph."""
        return Documents(self.begin, self.borders)

    @property
    def positions(self) -> Tensor:
        """int64 [b, s]: the position of each token in its document, from 0."""
        return torch.arange(self.begin.shape[1], device=self.begin.device) - self.begin

    @cached_property
    def mask(self) -> Tensor:
        """bool [b, 1, s, s], True where a row sees a column; made when first asked for and kept."""
        column = torch.arange(self.begin.shape[1], device=self.begin.device)
        return ((column >= self.begin[..., None]) & (column <= column[:, None]))[:, None]
