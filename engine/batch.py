"""Micro-batches: tokens, labels, the weight of each label, and the document boundaries of packed sequences.

Samples are read as `Rows`. Transforms change rows (masks, fill-in-the-middle); `micro_batches` cuts them.

Document boundaries are computed once, with the batch, on the host: reading a length back from a GPU would make the host
wait for it. Each attention kernel reads the form that it needs: document starts, cu_seqlens, or a mask.

Legend: b micro_batch_size, s seq_len.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from engine.ops.draws import Key, Places


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
        return Documents.from_starts(document_starts(tokens, eod))


def document_starts(tokens: Tensor, eod: int) -> Tensor:
    """For each position of rows of tokens, int64 [b, s], the index at which its document starts, after an `eod`."""
    position = torch.arange(tokens.shape[1], device=tokens.device)
    is_start = torch.ones_like(tokens, dtype=torch.bool)
    is_start[:, 1:] = tokens[:, :-1] == eod
    return (position * is_start).cummax(1).values


@dataclass(frozen=True, eq=False)
class Draws:
    """What identifies the random numbers of a training step. samples: int64 [b], global sample numbers.

    seed: of the run. step: counts from 1.
    """

    seed: int
    step: int
    samples: Tensor

    def key(self, purpose: str, name: str) -> Key:
        """The key of this step's draws for a purpose, at a named place of the model."""
        return Key.of(self.seed, purpose, self.step, name)


@dataclass(frozen=True, eq=False)
class AttentionDropout:
    """Dropout of a layer's attention weights with probability p. heads: of the whole model; first: first local head."""

    p: float
    name: str
    heads: int
    first: int


@dataclass(frozen=True, eq=False)
class Sequence:
    """What attends to what in a micro-batch: read by RoPE, learned positions and every attention.

    positions: int64 [1 or b, s], the position of each token, for RoPE and learned positions. documents: boundaries for
    document masking; None: each row is one document. causal: tokens attend to themselves and to earlier tokens only.
    window: sliding window, tokens attend only to tokens less than `window` positions away; 0: no limit. An attention
    may have fewer queries than keys: the queries are the last ones. draws: for dropout; None: nothing is drawn, as in
    validation. dropout: of the attention weights in this layer. first, whole_len: if ranks split the positions, this
    rank's tokens are [first, first + s) of whole_len (`part`); 0, 0: it has all.
    """

    positions: Tensor
    documents: Documents | None = None
    causal: bool = True
    window: int = 0
    draws: Draws | None = None
    dropout: AttentionDropout | None = None
    first: int = 0
    whole_len: int = 0
    _derived: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def of_rows(seq_len: int, documents: Documents | None = None, *, device: torch.device | None = None) -> Sequence:
        """A causal sequence with positions 0 .. seq_len - 1 in every row."""
        return Sequence(torch.arange(seq_len, device=device)[None], documents)

    @property
    def length(self) -> int:
        """Number of positions of each sample, over all ranks that split them."""
        return self.whole_len or self.positions.shape[1]

    def part(self, first: int, end: int) -> Sequence:
        """The sequence for queries at the positions [first, end), and keys [0, end): what they can attend to."""
        assert self.causal and not self.whole_len
        documents = None if self.documents is None else Documents.from_starts(self.documents.starts[:, :end])
        positions, length = self.positions[:, first:end], self.length
        return replace(self, positions=positions, documents=documents, first=first, whole_len=length, _derived={})

    def map(self, move: Callable[[Tensor], Tensor]) -> Sequence:
        """The same sequence with each tensor changed by `move`, such as to another device."""
        documents = self.documents
        if documents is not None:
            documents = Documents(move(documents.starts), move(documents.cu_seqlens))
        draws = self.draws and replace(self.draws, samples=move(self.draws.samples))
        return replace(self, positions=move(self.positions), documents=documents, draws=draws, _derived={})

    def for_one_forward(self) -> Sequence:
        """A copy that caches masks by itself: they are then freed with the autograd graph of one forward."""
        return replace(self, _derived={})

    def with_window(self, window: int) -> Sequence:
        """The sequence as a layer with this sliding window sees it. Cached, so that such layers share their masks."""
        if window == self.window:
            return self
        return self._cached(lambda: replace(self, window=window, _derived={}), "window", window)

    def with_dropout(self, dropout: AttentionDropout) -> Sequence:
        """The sequence as a layer with dropout of attention weights sees it; itself where nothing is drawn."""
        if self.draws is None or not dropout.p:
            return self
        return replace(self, dropout=dropout)  # shares the masks

    def places(self, first: int, count: int, features: int, offset: int, width: int) -> Places:
        """The places (ops.draws) of elements [sample, position, feature], in rows as of a tensor [count, b, width].

        The positions are [first, first + count) of this sequence, the features [offset, offset + width) of `features`.
        Cached.
        """
        return self._cached(
            lambda: self._places(first, count, features, offset, width), "places", first, count, features, offset, width
        )

    def _places(self, first: int, count: int, features: int, offset: int, width: int) -> Places:
        assert self.draws is not None
        position = torch.arange(first, first + count, device=self.draws.samples.device) + self.first
        token = self.draws.samples * self.length + position[:, None]
        return Places((token * features + offset).flatten(), width)

    def attention_places(self, heads: int, queries: int, keys: int) -> Places:
        """The places of attention weights [sample, head, query, key], in rows as of a tensor [b, heads, queries, keys].

        Cached, because all layers have the same.
        """
        return self._cached(lambda: self._attention_places(heads, queries, keys), "weights", heads, queries, keys)

    def _attention_places(self, heads: int, queries: int, keys: int) -> Places:
        assert self.draws is not None and self.dropout is not None
        device = self.draws.samples.device
        head = torch.arange(self.dropout.first, self.dropout.first + heads, device=device)
        query = torch.arange(keys - queries, keys, device=device)
        row = (self.draws.samples[:, None] * self.dropout.heads + head)[..., None] * self.length + query
        return Places((row * self.length).flatten(), keys)

    def attention_draw(self) -> tuple[Key, float]:
        """The key and the probability of this layer's dropout of attention weights."""
        assert self.draws is not None and self.dropout is not None
        return self.draws.key("dropout", self.dropout.name), self.dropout.p

    def mask(self, queries: int, keys: int) -> Tensor:
        """The attention mask, bool [1 or b, 1, queries, keys]: True where query i attends to key j. Cached."""
        return self._cached(lambda: self._mask(keys - queries, keys), "mask", queries, keys)

    def _mask(self, before: int, keys: int) -> Tensor:
        key = torch.arange(keys, device=self.positions.device)
        distance = key[before:, None] - key  # from the key to the query
        seen = (distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool))[None]
        if self.window:
            seen = seen & (distance.abs() < self.window)
        if self.documents is not None:
            starts = self.documents.starts
            seen = seen & (starts[:, before:, None] == starts[:, None])
        return seen[:, None]

    def first_keys(self, batch: int, queries: int, keys: int) -> Tensor | None:
        """The first key that each query attends to: int64 [batch, queries]; None if it is key 0 for all. Cached."""
        return self._cached(lambda: self._first_keys(batch, queries, keys), "first key", queries, keys)

    def _first_keys(self, batch: int, queries: int, keys: int) -> Tensor | None:
        starts = None if self.documents is None else self.documents.starts[:, keys - queries :]
        if not self.window:
            return starts if starts is None else starts.contiguous()
        query = torch.arange(keys - queries, keys, device=self.positions.device)
        first = (query - (self.window - 1)).clamp_min(0)
        return first.expand(batch, -1).contiguous() if starts is None else torch.maximum(starts, first)

    def cu_seqlens(self, batch: int, seq_len: int) -> Tensor:
        """The starts of all documents (of all rows, without document masking) in the concatenated rows: int32 [k + 1].

        The last entry is batch * seq_len.
        """
        if self.documents is not None:
            return self.documents.cu_seqlens
        device = self.positions.device
        return torch.arange(0, (batch + 1) * seq_len, seq_len, dtype=torch.int32, device=device)

    def _cached(self, make: Callable[[], Any], *key: Any) -> Any:
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]


@dataclass(frozen=True)
class MicroBatch:
    """The data of one forward pass. Read only: `tokens` and `labels` may be overlapping views of one [b, s + 1].

    tokens: int64 [b, s]. labels: int64 [b, s], the next token of each position. weights: float64 [b, s], of each
    label's loss; 0: not counted. samples: int64 [b], global sample numbers. sequence: positions, and what attends to
    what. sources: int64 [b], the index of each sample's corpus in the data blend. shares: float64 [b, s], of each label
    in a mean over all counted labels, for auxiliary losses; None: the weights.
    """

    tokens: Tensor
    labels: Tensor
    weights: Tensor
    samples: Tensor
    sequence: Sequence
    sources: Tensor | None = None
    shares: Tensor | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of its tensors, from which those at the boundaries of stages follow."""
        return (tuple(self.tokens.shape),)

    def to(self, device: torch.device) -> MicroBatch:
        """The same data on a device. To a GPU through pinned memory, as only such copies are asynchronous.

        Tensors are made contiguous first, because torch would stage strided ones in memory that is not pinned.
        """

        def move(x: Tensor) -> Tensor:
            pinned = x.contiguous().pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
            return pinned.to(device, non_blocking=True)

        sources = None if self.sources is None else move(self.sources)
        tokens, labels, weights, samples = map(move, (self.tokens, self.labels, self.weights, self.samples))
        shares = None if self.shares is None else move(self.shares)
        return MicroBatch(tokens, labels, weights, samples, self.sequence.map(move), sources, shares)

    def part(self, rank: int, size: int) -> MicroBatch:
        """The positions of a rank, if `size` ranks split those of every sample: equal runs, in order."""
        if size == 1:
            return self
        run = self.tokens.shape[1] // size
        mine = slice(rank * run, (rank + 1) * run)
        tokens, labels, weights = (x[:, mine] for x in (self.tokens, self.labels, self.weights))
        shares, sequence = self.shares, self.sequence.part(mine.start, mine.stop)
        shares = None if shares is None else shares[:, mine]
        return replace(self, tokens=tokens, labels=labels, weights=weights, shares=shares, sequence=sequence)

    def drawing(self, seed: int, step: int) -> MicroBatch:
        """The same data for a training step that draws random numbers. seed: of the run; step: counts from 1."""
        draws = Draws(seed, step, self.samples)
        return replace(self, sequence=replace(self.sequence, draws=draws, _derived={}))


@dataclass(frozen=True)
class Rows:
    """Samples on their way to micro-batches: what a transform changes. n: any number of samples.

    tokens: int64 [n, s + 1]; the label of position i is token i + 1. weights: float64 [n, s], of each label's loss;
    0: not counted. samples: int64 [n], global sample numbers. sources: int64 [n], index in the data blend. starts:
    int64 [n, s], for each position, the index at which its document starts; None: tokens attend across documents.
    positions: int64 [n, s], for RoPE and learned positions; None: 0 .. s - 1 in every row.
    """

    tokens: Tensor
    weights: Tensor
    samples: Tensor
    sources: Tensor
    starts: Tensor | None = None
    positions: Tensor | None = None

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


def micro_batches(rows: Rows, size: int, transforms: Iterable[Transform] = ()) -> list[MicroBatch]:
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
        sequence = Sequence.of_rows(tokens.shape[1], documents)
        if rows.positions is not None:
            sequence = replace(sequence, positions=rows.positions[part])
        batches.append(MicroBatch(tokens, labels, rows.weights[part], rows.samples[part], sequence, rows.sources[part]))
    return batches
