"""Transforms of rows that the config names: skipped samples, document masking, the loss mask.

A transform is a pure function `Rows -> Rows` of the samples alone, so the layout changes nothing. All rows that a rank
reads at once are transformed together. `samples.fim` is a transform too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from engine.batch import Rows, document_starts
from engine.config.skips import Ranges, contains


@dataclass(frozen=True)
class SkipSamples:
    """Samples that count nothing (data.skip_samples), by global number: their weights and tokens become 0.

    Not only their weights: a token that makes an activation infinite would do so with weight 0 too.
    """

    ranges: Ranges

    def __call__(self, rows: Rows) -> Rows:
        skipped = torch.tensor([contains(self.ranges, sample) for sample in rows.samples.tolist()])[:, None]
        return replace(rows, tokens=rows.tokens.masked_fill(skipped, 0), weights=rows.weights.masked_fill(skipped, 0))


@dataclass(frozen=True)
class SeparateDocuments:
    """Document masking (data.separate_documents): a new document starts after each token `eod` (end of document).

    restart: positions restart in each document, for learned positions. RoPE does not need it: its scores depend on the
    difference of two positions.
    """

    eod: int
    restart: bool = False

    def __call__(self, rows: Rows) -> Rows:
        starts = document_starts(rows.tokens[:, :-1], self.eod)
        positions = torch.arange(starts.shape[1]) - starts if self.restart else None
        return replace(rows, starts=starts, positions=positions)


@dataclass(frozen=True)
class LossMask:
    """Labels that do not count, by token id: those that follow a token of `after`, and those in `labels`.

    From data.mask_eod and data.mask_tokens.
    """

    after: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()

    def __call__(self, rows: Rows) -> Rows:
        weights = rows.weights
        for values, excluded in ((rows.tokens[:, :-1], self.after), (rows.labels, self.labels)):
            if excluded:
                weights = weights.masked_fill(torch.isin(values, torch.tensor(excluded)), 0)
        return replace(rows, weights=weights)
