"""Batches of texts to token ids, by gigatoken where it can, by `tokenizers` otherwise.

`tokenizers` is the reference: what it gives is right. gigatoken (BPE only, some fifty times faster) is trusted after it
agreed on a set of awkward strings, and it is asked again about samples of every batch. Where it differs, `Mismatch`
tells the caller to begin again with the reference, as earlier text may differ as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from engine.data.awkward import AWKWARD
from engine.data.tokenizer import Tokenizer

_SAMPLES, _SAMPLE_CHARS = 4, 512  # of a batch: a millisecond of the reference
Encoded = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]


class Mismatch(Exception):
    """gigatoken gave other ids than the reference."""


class Encoder:
    """Encodes for `prepare`, from any number of threads. `name`: the library; `note`: why it is not gigatoken."""

    def __init__(self, tokenizer: Tokenizer, *, fast: bool = True):
        self._tokenizer = tokenizer
        self.name = f"tokenizers {tokenizers.__version__}"
        self.note = "" if fast else "as asked"
        self._fast: Any = self._load_fast() if fast else None
        if self._fast is not None:
            try:
                self.check((*AWKWARD, "\x00\x01\x7f\x85\ufeff", *tokenizer.special_tokens), whole=True)
            except Mismatch as err:
                self._fast, self.note = None, str(err)
            else:
                self.name = f"gigatoken {version('gigatoken')}"

    @property
    def is_fast(self) -> bool:
        return self._fast is not None

    def _load_fast(self) -> Any:
        """The gigatoken tokenizer, or None with the reason in `note`."""
        try:
            import awkward  # noqa: F401  (gigatoken would do without it, and give something else, if this failed later)
            import gigatoken
        except ImportError as err:
            self.note = f"gigatoken is not installed ({err})"
            return None
        try:
            return gigatoken.Tokenizer.from_json(self._tokenizer.text_only_definition())
        except Exception as err:  # whatever it does not support it refuses with errors of its own
            self.note = f"gigatoken does not take this tokenizer: {str(err).splitlines()[0]}"
            return None

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of all texts one after the other, int32 [T], and the length of each, int32 [texts]."""
        if self._fast is not None:
            return self._encode_fast(texts)
        ids = self._tokenizer.encode_batch(texts)
        lengths = np.array([len(piece) for piece in ids], np.int32)
        return (np.concatenate(ids) if ids else np.empty(0, np.int32)), lengths

    def encode_checked(self, texts: Sequence[str]) -> Encoded:
        """As `encode`, and some of `texts` are given to the reference too. Raises Mismatch."""
        if not texts:
            return np.empty(0, np.int32), np.empty(0, np.int32)
        self.check(texts)
        return self.encode(texts)

    def _encode_fast(self, texts: Sequence[str]) -> Encoded:
        # On this thread: several that share one encoder cost half the processor time of the library's own pool.
        layout = self._fast.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return ids.view(np.int32), np.diff(offsets).astype(np.int32)

    def check(self, texts: Sequence[str], whole: bool = False) -> None:
        """Ask gigatoken and the reference about a few of `texts` (`whole`: all). Raises Mismatch."""
        if self._fast is None:
            return
        step = 1 if whole else max(1, len(texts) // _SAMPLES)
        samples = list(texts) if whole else [text[:_SAMPLE_CHARS] for text in texts[::step][:_SAMPLES]]
        ids, lengths = self._encode_fast(samples)
        wanted = [self._tokenizer.encode(text) for text in samples]
        for text, mine, right in zip(samples, np.split(ids, np.cumsum(lengths)[:-1]), wanted):
            if not np.array_equal(mine, right):
                at = next((i for i, (a, b) in enumerate(zip(mine, right)) if a != b), min(len(mine), len(right)))
                raise Mismatch(
                    f"gigatoken {version('gigatoken')} differs from tokenizers at token {at} of {text[:60]!r}: "
                    f"{mine[at : at + 3].tolist()} instead of {right[at : at + 3]}"
                )

    def unknown_bytes(
        self, texts: Sequence[str], ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int64]:
        """Bytes of each text that became the unknown token, int64 [texts]: they are lost to a model."""
        lost, unknown = np.zeros(len(texts), np.int64), self._tokenizer.unknown
        if unknown is not None:
            hits = np.flatnonzero(ids == unknown)
            for i in np.unique(np.searchsorted(np.cumsum(lengths), hits, side="right")):
                lost[i] = self._tokenizer.unknown_bytes(texts[i])
        return lost
