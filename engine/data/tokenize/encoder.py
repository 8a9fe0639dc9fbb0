"""Encodes batches of texts to token ids, with gigatoken where possible, otherwise with `tokenizers`.

`tokenizers` is the reference: its ids are correct by definition. gigatoken (BPE only, about fifty times faster) is used
if it agrees on a set of edge cases, and is checked again on samples of every batch. If it differs, `Mismatch` makes the
caller start again with the reference, since earlier text may differ as well.

A tokenizer converted from a .model or a file of ranks is also compared with the library the file was made for: on the
first documents of a run completely, later on samples of every batch. If no tokenizer.json reproduces the ids of a
.model, sentencepiece itself encodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from engine.data.tokenize.equivalence import EDGE_CASES, ConversionMismatch, compare
from engine.data.tokenize.tokenizer import Tokenizer
from engine.util.prefetch import run_in_thread

_SAMPLES, _SAMPLE_CHARS = 4, 512  # of a batch; takes the reference a millisecond
_FIRST_CHARS, _FIRST_CHARS_EACH = 1 << 18, 1 << 15  # of a run, compared with the original; takes some 0.1 s
Encoded = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]


class Mismatch(Exception):
    """gigatoken differs from the reference, or (`in_conversion`) a converted tokenizer from its original."""

    def __init__(self, text: str, in_conversion: bool = False):
        super().__init__(text)
        self.in_conversion = in_conversion


class Encoder:
    """Thread-safe encoder for `engine prepare`. `name`: the library used; `note`: why it is not gigatoken."""

    def __init__(self, tokenizer: Tokenizer, *, fast: bool = True):
        self._tokenizer = tokenizer
        self.name = f"tokenizers {tokenizers.__version__}"
        self.note = "" if fast else "as requested"
        self._original = tokenizer.load_original() if tokenizer.load_original is not None else None
        if tokenizer.sentencepiece is not None:
            self.name, self.note = (
                tokenizer.sentencepiece.name,
                f"no tokenizer.json reproduces its ids: {tokenizer.note}",
            )
            fast = fast and tokenizer.exact_without_symbols and tokenizer.special_pattern is None
            self._original = tokenizer.sentencepiece if fast else None
        self._reference = self.name
        self._fast: Any = self._load_fast() if fast else None
        if self._fast is not None:
            try:
                self.check((*EDGE_CASES, "\x00\x01\x7f\x85\ufeff", *tokenizer.special_tokens), whole=True)
            except Mismatch as err:
                self._fast, self.note = None, str(err)
            else:
                exceptions = (
                    f", texts with user-defined symbols by {self.name}" if tokenizer.sentencepiece is not None else ""
                )
                self.name, self.note = f"gigatoken {version('gigatoken')}{exceptions}", ""

        if tokenizer.sentencepiece is not None and self._fast is None:
            self._original = None  # it encodes itself

    @property
    def is_threaded(self) -> bool:
        """Whether a batch uses one thread only; `tokenizers` distributes every batch over its own threads."""
        return self._fast is not None or self._tokenizer.sentencepiece is not None

    def _load_fast(self) -> Any:
        """The gigatoken tokenizer, or None with the reason in `note`."""
        try:
            import gigatoken

            definition = self._tokenizer.text_only_definition()
            loading = run_in_thread(lambda: gigatoken.Tokenizer.from_json(definition))
            import awkward  # noqa: F401  (if gigatoken failed to import it later, it would silently return another type)
        except ImportError as err:
            self.note = f"gigatoken is not installed ({err})"
            return None
        try:
            return loading.result()
        except Exception as err:  # it raises its own exceptions for unsupported tokenizers
            self.note = f"gigatoken does not support this tokenizer: {str(err).splitlines()[0]}"
            return None

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Concatenated ids of all texts, int32 [T], and the number of ids of each text, int32 [texts]."""
        if self._fast is not None:
            return self._encode_near(texts)
        ids = self._tokenizer.encode_batch(texts)
        lengths = np.array([len(piece) for piece in ids], np.int32)
        return (np.concatenate(ids) if ids else np.empty(0, np.int32)), lengths

    def encode_checked(self, texts: Sequence[str], before: int = 0) -> Encoded:
        """Like `encode`, but checks some of `texts` against the reference. Raises Mismatch.

        before: number of input bytes before `texts`. It identifies the first texts of a run, in any order of threads
        and also after a resume.
        """
        if not texts:
            return np.empty(0, np.int32), np.empty(0, np.int32)
        self.check(texts)
        self._check_original(texts, before)
        return self.encode(texts)

    def _encode_near(self, texts: Sequence[str]) -> Encoded:
        """Encode with gigatoken, but texts with user-defined symbols of a .model with sentencepiece."""
        sentencepiece = self._tokenizer.sentencepiece
        if (
            sentencepiece is None
            or sentencepiece.symbols is None
            or not any(having := [bool(sentencepiece.symbols.search(text)) for text in texts])
        ):
            return self._encode_fast(texts)
        plain = [text for text, has in zip(texts, having) if not has]
        ids, lengths = self._encode_fast(plain) if plain else (np.empty(0, np.int32), np.empty(0, np.int32))
        others = iter(np.split(ids, np.cumsum(lengths)[:-1]))
        by_own = iter(sentencepiece.encode_batch([text for text, has in zip(texts, having) if has]))
        pieces = [np.array(next(by_own), np.int32) if has else next(others) for has in having]
        return np.concatenate(pieces), np.array([len(piece) for piece in pieces], np.int32)

    def _encode_fast(self, texts: Sequence[str]) -> Encoded:
        # On this thread: several threads that share one encoder need half the CPU time of the library's own pool.
        layout = self._fast.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return ids.view(np.int32), np.diff(offsets).astype(np.int32)

    def check(self, texts: Sequence[str], whole: bool = False) -> None:
        """Compare gigatoken with the reference on samples of `texts` (`whole`: on all). Raises Mismatch."""
        if self._fast is None:
            return
        step = 1 if whole else max(1, len(texts) // _SAMPLES)
        samples = list(texts) if whole else [text[:_SAMPLE_CHARS] for text in texts[::step][:_SAMPLES]]
        ids, lengths = self._encode_near(samples)
        references = [self._tokenizer.encode(text) for text in samples]
        for text, fast, right in zip(samples, np.split(ids, np.cumsum(lengths)[:-1]), references):
            if not np.array_equal(fast, right):
                at = next((i for i, (a, b) in enumerate(zip(fast, right)) if a != b), min(len(fast), len(right)))
                raise Mismatch(
                    f"gigatoken {version('gigatoken')} differs from {self._reference} at token {at} of {text[:60]!r}: "
                    f"{fast[at : at + 3].tolist()} instead of {right[at : at + 3]}"
                )

    def _check_original(self, texts: Sequence[str], before: int) -> None:
        """Compare with the original library: the first texts of a run, later samples. Raises Mismatch."""
        if self._original is None:
            return
        samples, left = [], _FIRST_CHARS - before
        for text in texts:
            if left <= 0:
                break
            samples.append(text[:_FIRST_CHARS_EACH])
            left -= len(samples[-1]) + 1
        rest = texts[len(samples) :]
        samples += [text[:_SAMPLE_CHARS] for text in rest[:: max(1, len(rest) // _SAMPLES)][:_SAMPLES]]
        if (pattern := self._tokenizer.special_pattern) is not None:  # no original parses special tokens in texts
            samples = [text for text in samples if not pattern.search(text)]
        try:
            compare(self._split, self._original, samples)
        except ConversionMismatch as err:
            converted = self._tokenizer.sentencepiece is None
            raise Mismatch(f"the tokenizer.json converted from the file differs from it: {err}", converted) from err

    def _split(self, texts: Sequence[str]) -> list[list[int]]:
        ids, lengths = self.encode(texts)
        return [piece.tolist() for piece in np.split(ids, np.cumsum(lengths)[:-1])]

    def unknown_bytes(
        self, texts: Sequence[str], ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int64]:
        """Bytes of each text that became the unknown token and are lost for the model, int64 [texts]."""
        lost, unknown = np.zeros(len(texts), np.int64), self._tokenizer.unknown
        if unknown is not None:
            hits = np.flatnonzero(ids == unknown)
            for i in np.unique(np.searchsorted(np.cumsum(lengths), hits, side="right")):
                lost[i] = self._tokenizer.unknown_bytes(texts[i])
        return lost
