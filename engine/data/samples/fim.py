"""Fill-in-the-middle (Bavarian et al. 2022) as a pure function of (seed, global sample number, row).

A row of seq_len + 1 tokens is split at the end-of-document token into segments. With probability `rate` a segment's
text is cut at two characters into prefix p, middle m and suffix s, which are encoded separately, and becomes

    PSM   <prefix> p <suffix> s <middle> m        or, with probability `spm_rate` of those,
    SPM   <prefix> <suffix> s <middle> p m

Cuts are between characters, not tokens: when code is completed, the cursor is often in the middle of a token. The row
keeps its length: a longer result is truncated, a shorter one is padded with the end-of-document token from position
`FimResult.lengths` (labels there have weight 0).

All random numbers come from derive_key(seed, "fim", sample, segment), so the result does not depend on which rank reads
a sample or in which order (Megatron draws from one generator in the order of access, so more workers or a resume change
the data).

Text is never altered. A segment is left unchanged if its tokens cannot be encoded again:
* it contains a special token (whose spelling would be encoded as text), or one of the three sentinels;
* its tokens do not decode to valid text. A sample boundary may split a UTF-8 character; the tokens of such a character
  (at most 3 at either end) are kept as tokens, before p and after s, and only the text between them is cut. If U+FFFD
  remains in the text, the segment is left unchanged;
* the three parts do not decode to the segment's text, which is checked each time.

A tokenizer that adds a space before a text (sentencepiece) would add one in the middle of words. The parts are then
encoded and decoded after a newline that is removed again. If this file is wrong, nothing fails visibly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import Rows
from engine.data.samples.keyed import Int64Array, derive, derive_key
from engine.data.tokenize.tokenizer import Tokenizer

_MOST_SPLIT = 3  # most tokens of a split character: 3 of its 4 bytes
_LOST = "\ufffd"
_PROBE = ("if A:\n    b", " = c(d)  # e\n")


@dataclass(frozen=True)
class Sentinels:
    """Ids of the three sentinel tokens."""

    prefix: int
    suffix: int
    middle: int


@dataclass
class FimResult:
    """rows int64 [n, seq_len + 1]; lengths int64 [n]: without the padding; outcomes: number of segments by kind."""

    rows: Int64Array
    lengths: Int64Array
    outcomes: Counter[str] = field(default_factory=Counter)


@dataclass
class _Segment:
    """Tokens [begin, end) of a row, with the key of its random numbers.

    head, tail: tokens of split characters at either end; text: that between them; cuts: two positions in it.
    """

    row: int
    begin: int
    end: int
    key: int
    head: int = 0
    tail: int = 0
    text: str = ""
    cuts: tuple[int, int] = (0, 0)

    def pieces(self) -> tuple[str, str, str]:
        a, b = self.cuts
        return self.text[:a], self.text[a:b], self.text[b:]


class SpanCodec:
    """Encodes and decodes spans from inside documents, so that concatenated spans are concatenated tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        one = tokenizer.encode("a")
        self._guard = "" if tokenizer.decode([*one, *one]) == "aa" else "\n"
        self._ids = tokenizer.encode(self._guard) if self._guard else []
        a, b = self.encode(_PROBE)
        together = None if a is None or b is None else self.decode([[*a, *b]])[0]
        self.round_trips = together == "".join(_PROBE)  # False: texts are lost, for example lowercased

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32] | None]:
        """Tokens of each text, int32 [length]; None if the guard before the text merged with it."""
        n = len(self._ids)
        found = self._tokenizer.encode_batch([self._guard + text for text in texts])
        return [ids[n:] if ids[:n].tolist() == self._ids else None for ids in found]

    def decode(self, pieces: Sequence[Sequence[int] | Int64Array]) -> list[str]:
        """Text of each piece; it begins with U+FFFD if a split character merged with the guard."""
        n = len(self._guard)
        texts = self._tokenizer.decode_batch([[*self._ids, *map(int, ids)] for ids in pieces])
        return [text[n:] if text.startswith(self._guard) else _LOST + text for text in texts]


class FillInTheMiddle:
    """The stateless transform. `active`: for each source of a blend, whether it applies to its samples."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sentinels: Sentinels,
        eod: int,
        *,
        rate: float,
        spm_rate: float,
        seed: int,
        active: Sequence[bool] = (True,),
        bos: int | None = None,
    ):
        self.sentinels, self.eod, self.rate, self.spm_rate, self.seed = sentinels, eod, rate, spm_rate, seed
        self._bos = bos  # begins documents; it stays in place, before the segment
        self._pieces = SpanCodec(tokenizer)
        self._active = np.array(active, bool)
        reserved = tokenizer.special_ids | {eod, sentinels.prefix, sentinels.suffix, sentinels.middle}
        self._reserved = np.array(sorted(reserved), np.int64)

    def __call__(self, rows: Rows) -> Rows:
        """The transform of rows: labels in the padding of a shorter row do not count."""
        result = self.transform(rows.tokens.numpy(), rows.samples.numpy(), rows.sources.numpy())
        padding = np.arange(1, result.rows.shape[1]) >= result.lengths[:, None]
        weights = rows.weights.masked_fill(torch.from_numpy(padding), 0)
        return replace(rows, tokens=torch.from_numpy(result.rows), weights=weights)

    def transform(self, rows: Int64Array, samples: Int64Array, sources: Int64Array) -> FimResult:
        """Transformed copy of the rows int64 [n, seq_len + 1] of global samples int64 [n] from sources int64 [n]."""
        outcomes: Counter[str] = Counter()
        active = self._active[sources]
        chosen = [
            s for row in np.flatnonzero(active).tolist() for s in self._choose(rows[row], row, samples[row], outcomes)
        ]
        readable = self._read(rows, chosen, outcomes)
        changed: dict[int, list[tuple[_Segment, Int64Array]]] = {}
        for segment, tokens in self._write(rows, readable, outcomes):
            changed.setdefault(segment.row, []).append((segment, tokens))
        result = FimResult(rows.copy(), np.full(len(rows), rows.shape[1], np.int64), outcomes)
        for row, parts in changed.items():
            line = self._join(rows[row], parts)[: rows.shape[1]]
            result.rows[row, : len(line)], result.rows[row, len(line) :] = line, self.eod
            result.lengths[row] = len(line)
        return result

    def _choose(self, row: Int64Array, number: int, sample: int, outcomes: Counter[str]) -> list[_Segment]:
        """The segments of a row to transform: one draw each, keyed by their number in the row."""
        ends = [*np.flatnonzero(row == self.eod).tolist(), len(row)]
        chosen, begin = [], 0
        for at, end in enumerate(ends):
            if begin < end and row[begin] == self._bos:
                begin += 1
            if end > begin:
                key = derive_key(self.seed, "fim", int(sample), at)
                take = derive(key, 0) < self.rate * 2**64
                outcomes["chosen" if take else "plain"] += 1
                if take:
                    chosen.append(_Segment(number, begin, end, key))
            begin = end + 1
        return chosen

    def _read(self, rows: Int64Array, segments: list[_Segment], outcomes: Counter[str]) -> list[_Segment]:
        """The segments whose tokens are valid text, with their texts and cuts."""
        pure = [s for s in segments if not np.isin(rows[s.row, s.begin : s.end], self._reserved).any()]
        outcomes["left: special token"] += len(segments) - len(pure)
        for segment, text in zip(pure, self._pieces.decode([rows[s.row, s.begin : s.end] for s in pure])):
            segment.text = text if _LOST not in text else self._trim(rows[segment.row], segment, text)
            n = len(segment.text) + 1
            a, b = (derive(segment.key, k) % n for k in (2, 3))
            segment.cuts = min(a, b), max(a, b)
        readable = [s for s in pure if s.text and _LOST not in s.text]
        outcomes["left: not a whole text"] += len(pure) - len(readable)
        return readable

    def _trim(self, row: Int64Array, segment: _Segment, text: str) -> str:
        """Remove split characters at the ends with as few tokens as possible; returns the remaining text, or `text`."""
        ends = sorted(((h, t) for h in range(_MOST_SPLIT + 1) for t in range(_MOST_SPLIT + 1)), key=sum)
        texts = self._pieces.decode([row[segment.begin + h : segment.end - t] for h, t in ends])
        for (h, t), rest in zip(ends, texts):
            if _LOST not in rest:
                segment.head, segment.tail = h, t
                return rest
        return text

    def _write(
        self, rows: Int64Array, segments: list[_Segment], outcomes: Counter[str]
    ) -> list[tuple[_Segment, Int64Array]]:
        """(segment, new tokens) for the segments whose parts decode to the original text again."""
        ids = self._pieces.encode([piece for segment in segments for piece in segment.pieces()])
        triples = [(p, m, s) for p, m, s in zip(ids[::3], ids[1::3], ids[2::3])]
        whole = [
            (seg, p, m, s)
            for seg, (p, m, s) in zip(segments, triples)
            if p is not None and m is not None and s is not None
        ]
        again = self._pieces.decode([np.concatenate(parts).astype(np.int64) for _, *parts in whole])
        done = []
        for (segment, p, m, s), text in zip(whole, again):
            if text != segment.text:
                continue
            row, begin, end = rows[segment.row], segment.begin, segment.end
            p = np.concatenate((row[begin : begin + segment.head], p))
            s = np.concatenate((s, row[end - segment.tail : end]))
            spm = derive(segment.key, 1) < self.spm_rate * 2**64
            outcomes["SPM" if spm else "PSM"] += 1
            t = self.sentinels
            order = (
                ([t.prefix, t.suffix], s, [t.middle], p, m) if spm else ([t.prefix], p, [t.suffix], s, [t.middle], m)
            )
            done.append((segment, np.concatenate(order).astype(np.int64)))
        outcomes["left: pieces give another text"] += len(segments) - len(done)
        return done

    def _join(self, row: Int64Array, parts: list[tuple[_Segment, Int64Array]]) -> Int64Array:
        """The row with some segments replaced, in order; any length."""
        line, at = [], 0
        for segment, tokens in parts:
            line += [row[at : segment.begin], tokens]
            at = segment.end
        return np.concatenate([*line, row[at:]])
