"""Writes tokenised corpora atomically in Megatron's .bin/.idx format, with a sidecar."""

from __future__ import annotations

import array
import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import xxhash

from engine.data.samples.index_file import CHUNK, IntArray, write_index
from engine.data.samples.indexed import paths_of
from engine.data.samples.sidecar import sidecar_bytes, sidecar_of
from engine.errors import DataError
from engine.util.files import sync_file, sync_folder, writing

UINT16_VOCAB_LIMIT = 65500  # Megatron's rule for writers; readers use the dtype code in the header
MAX_SEQUENCE_TOKENS = 2**31 - 1


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Token dtype that Megatron's writer selects for a vocabulary size."""
    return np.dtype("<u2") if vocab_size < UINT16_VOCAB_LIMIT else np.dtype("<i4")


class IndexedWriter:
    """Writes PREFIX.bin, .idx and .json; they are renamed to these names only after all of them are complete.

    Data is written to temporary files in the same folder and synced before the renames; the sidecar is renamed last.
    Leaving the `with` block by an exception, or without `finish`, removes the temporary files and changes nothing else.
    Memory: 4 bytes per document and a buffer of a few MiB. `counts` int64 [vocab_size] is the histogram of the tokens.
    """

    def __init__(self, prefix: str | Path, vocab_size: int):
        if vocab_size < 1:
            raise DataError(
                "samples.vocabulary-empty",
                f"{prefix}: vocab_size = {vocab_size}: expected at least 1. Give the tokenizer's size.",
            )
        self.prefix = str(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.counts = np.zeros(vocab_size, np.int64)
        self.num_tokens = 0
        self._digest = xxhash.xxh3_128()
        self._targets = paths_of(prefix)
        self._temporaries = tuple(p.with_name(f".{p.name}.{os.getpid()}.tmp") for p in self._targets)
        self._lengths = array.array("i")
        self._num_empty = 0
        self._pending: list[IntArray] = []
        self._pending_tokens = 0
        self._finished = False
        with self._disk(self._temporaries[0]):
            self._targets[0].parent.mkdir(parents=True, exist_ok=True)
            self._bin: IO[bytes] = open(self._temporaries[0], "wb")  # noqa: SIM115  (closed by finish or abort)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            self.abort()
            if kind is None:
                raise DataError(
                    "samples.writer-not-finished",
                    f"{self.prefix}: the writer was closed without finish(meta), so nothing was written",
                )

    @property
    def num_documents(self) -> int:
        """Number of sequences so far: documents with at least one token."""
        return len(self._lengths) - self._num_empty

    def add(self, tokens: IntArray) -> None:
        """Append one document, integers [length]. As in Megatron, an empty one repeats a boundary and has no sequence.

        Raises DataError for an id outside [0, vocab_size), a wrong dtype or shape, or more than 2^31 - 1 tokens.
        """
        number = len(self._lengths)
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise DataError(
                "samples.tokens-not-integers",
                f"{self.prefix}: document {number}: expected integers [n], got {tokens.dtype}{tokens.shape}",
            )
        if tokens.size > MAX_SEQUENCE_TOKENS:
            raise DataError(
                "samples.document-too-long",
                f"{self.prefix}: document {number} has {tokens.size} tokens; the format allows at most 2^31 - 1",
            )
        if tokens.size:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.vocab_size:
                wrong = low if low < 0 else high
                raise DataError(
                    "samples.token-outside-vocabulary",
                    f"{self.prefix}: document {number}: id {wrong} is not in [0, {self.vocab_size}). "
                    f"Pass the vocab_size of the tokenizer that made these ids.",
                )
            self._pending.append(tokens.astype(self.dtype))
            self._pending_tokens += tokens.size
            if self._pending_tokens >= CHUNK:
                self._flush()
        else:
            self._num_empty += 1
        self._lengths.append(tokens.size)

    def finish(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Complete and publish the three files; returns the sidecar. `meta`: additional fields of the sidecar."""
        self._flush()
        with self._disk(self._targets[0]):
            sync_file(self._bin)
            self._bin.close()
            meta = {**meta, "bin_digest": self._digest.hexdigest()}
            sidecar = sidecar_of(meta, self.dtype, self.counts, self.num_documents, self._num_empty)
            with open(self._temporaries[1], "wb") as idx:
                lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.empty(0, np.int32)
                write_index(idx, self.dtype, lengths)
                sync_file(idx)
            with open(self._temporaries[2], "wb") as out:
                out.write(sidecar_bytes(sidecar))
                sync_file(out)
            # Remove .idx and sidecar of an older corpus first, so that no crash leaves them next to the new .bin.
            for target in self._targets[:0:-1]:
                target.unlink(missing_ok=True)
            for temporary, target in zip(self._temporaries, self._targets):
                os.replace(temporary, target)
            sync_folder(self._targets[0].parent)
        self._finished = True
        return sidecar

    def abort(self) -> None:
        """Remove everything written so far. May be called twice."""
        self._pending.clear()
        with contextlib.suppress(OSError):  # close() flushes, which fails again on a full disk
            self._bin.close()
        for path in self._temporaries:
            path.unlink(missing_ok=True)

    def _flush(self) -> None:
        """Write the pending documents at once: a bincount over the vocabulary per document would dominate the time."""
        if not self._pending:
            return
        tokens = np.concatenate(self._pending)
        with self._disk(self._temporaries[0]):
            self._bin.write(tokens.data)
        self._digest.update(tokens.data)
        self.counts += np.bincount(tokens, minlength=self.vocab_size)
        self.num_tokens += tokens.size
        self._pending.clear()
        self._pending_tokens = 0

    def _disk(self, path: Path) -> contextlib.AbstractContextManager[None]:
        """Convert a full disk or a missing permission to a DataError that names the file."""
        needed = self._pending_tokens * self.dtype.itemsize + 20 * len(self._lengths)
        return writing(path, lambda: "Nothing was published, and the temporary files are removed.", lambda: needed)
