"""Reads tokenised corpora in Megatron's .bin/.idx format, byte compatible in both directions.

`PREFIX.bin` contains concatenated token ids without header or padding. See index_file.py for `PREFIX.idx` and
indexed_writer.py for writing.

The format has no checksum, token count or tokenizer id, so a reader that trusts it may silently train on garbage. Two
measures prevent this: opening checks everything that the bytes allow to check, and our writer adds a sidecar
`PREFIX.json` with the fields that the format lacks (largest token, tokenizer digest, entropy). A corpus without the
sidecar, as Megatron writes it, is accepted too; checking its vocabulary then takes one scan of .bin.

As in Megatron's GPT code, one *sequence* is one document; the document boundaries are checked and written, but not
used.
Legend: N sequences, D boundaries, T tokens in all.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.data.samples.index_file import DTYPES, HEADER, MAGIC, IntArray, chunks
from engine.data.samples.mapped import MappedFile
from engine.data.samples.native_index import native_index
from engine.data.samples.sidecar import SIDECAR_VERSION
from engine.errors import DataError
from engine.util.files import read_json


def paths_of(prefix: str | Path) -> tuple[Path, Path, Path]:
    """(.bin, .idx, .json) of a prefix. The suffixes are appended, as a prefix may contain dots."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def _damaged(path: Path, where: str, found: str, expected: str) -> DataError:
    return DataError(
        "samples.corpus-damaged",
        f"{path}: {where}: found {found}, expected {expected}. "
        f"The file is damaged, truncated or not Megatron's; write it again with `engine prepare` or copy it again.",
    )


class IndexedDataset:
    """A memory-mapped .bin/.idx corpus, checked for consistency when opened.

    Attributes: `prefix` (str), `dtype`, `lengths` int32 [N] in tokens, `pointers` int64 [N] in bytes, `boundaries`
    int64 [D], `modes` int8 [N] if multimodal, else [0], `tokens` dtype [T], `num_documents` (= N), `num_tokens` (= T),
    `vocab_size` (as given), `meta` (the sidecar or {}). The arrays are views of read-only memory maps (see `check`).
    `lengths`, `pointers` and `boundaries` are not aligned, as the header has 34 bytes: numpy handles this, but native
    code has to load them bytewise.

    Raises DataError for any inconsistency, checked in the order of `__init__`.
    """

    def __init__(self, prefix: str | Path, vocab_size: int | None = None):
        if sys.byteorder != "little":
            raise DataError(
                "samples.big-endian",
                "the .bin/.idx format is little-endian, but this machine is big-endian; use another machine",
            )
        self.prefix = str(prefix)
        self.vocab_size = vocab_size
        bin_path, idx_path, json_path = paths_of(prefix)
        native = native_index()
        self._files = MappedFile(idx_path, native), MappedFile(bin_path, native)
        raw, raw_bin = (file.bytes for file in self._files)
        self.dtype, num_sequences, num_boundaries = _read_header(idx_path, raw)
        self.lengths = np.frombuffer(raw, "<i4", num_sequences, HEADER.size)
        self.pointers = np.frombuffer(raw, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
        self.boundaries = np.frombuffer(raw, "<i8", num_boundaries, HEADER.size + 12 * num_sequences)
        self.modes = raw[HEADER.size + 12 * num_sequences + 8 * num_boundaries :].view(np.int8)
        _check_sequences(idx_path, bin_path, self.lengths, self.pointers, self.dtype.itemsize, raw_bin.size)
        _check_boundaries(idx_path, self.boundaries, num_sequences)
        self.tokens: IntArray = raw_bin.view(self.dtype)
        self.num_documents = num_sequences
        self.num_tokens = int(self.tokens.size)
        self.meta = self._read_sidecar(json_path)
        if vocab_size is not None:
            self._check_vocabulary(vocab_size)
        self.check()

    def check(self) -> None:
        """Raise DataError if a file was truncated while open: the data read is then not the corpus."""
        for file in self._files:
            file.check()

    def __len__(self) -> int:
        return self.num_documents

    def __getitem__(self, index: int) -> IntArray:
        """Tokens of document `index`, dtype [length]: a view. IndexError past the end, as for a list."""
        if not -self.num_documents <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents} in {self.prefix}")
        start = int(self.pointers[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[index])]

    def locate(self, position: int) -> tuple[int, int]:
        """(document, offset in it) of the token at index `position` of .bin."""
        byte = position * self.dtype.itemsize
        # side="right": of documents that start at the same byte, all but the last are empty.
        document = int(np.searchsorted(self.pointers, byte, side="right")) - 1
        return document, (byte - int(self.pointers[document])) // self.dtype.itemsize

    def token_error(self, document: int, offset: int, value: int) -> DataError:
        """The error for an id outside the vocabulary, used when opening and when gathering samples."""
        return DataError(
            "samples.token-outside-vocabulary",
            f"{self.prefix}.bin: document {document}, token {offset}: id {value} is not in [0, {self.vocab_size}). "
            f"The corpus was made with another tokenizer, or is damaged: prepare it with this model's tokenizer, or "
            f"set model.vocab_size to that of the corpus.",
        )

    def _read_sidecar(self, path: Path) -> dict[str, Any]:
        if not path.exists():
            return {}
        try:
            meta = read_json(path)
        except (OSError, ValueError) as err:
            raise DataError(
                "samples.sidecar-unreadable",
                f"{path}: not readable as JSON ({err}). Delete it (it is optional) or restore it.",
            ) from err
        if not isinstance(meta, dict) or meta.get("version") != SIDECAR_VERSION:
            raise DataError(
                "samples.sidecar-unreadable",
                f'{path}: expected a JSON object with "version": {SIDECAR_VERSION}. Delete or restore it.',
            )
        size = self.num_tokens * self.dtype.itemsize
        if meta.get("num_tokens") != self.num_tokens or meta.get("bin_bytes") != size:
            warnings.warn(
                f"{path} describes another file ({meta.get('num_tokens')} tokens, not {self.num_tokens}); ignored",
                stacklevel=3,
            )
            return {}
        return meta

    def _check_vocabulary(self, vocab_size: int) -> None:
        max_token = self.meta.get("max_token")
        if isinstance(max_token, int) and max_token < vocab_size:
            return  # a wrong sidecar is detected when gathering samples
        for part in chunks(self.num_tokens):
            tokens = self.tokens[part]
            if int(tokens.max()) >= vocab_size or int(tokens.min()) < 0:
                first = part.start + int(np.argmax((tokens >= vocab_size) | (tokens < 0)))
                raise self.token_error(*self.locate(first), int(self.tokens[first]))


def _read_header(path: Path, raw: npt.NDArray[np.uint8]) -> tuple[np.dtype[Any], int, int]:
    """(token dtype, N, D), after checking the magic, version, dtype code and exact file size."""
    if raw.size < HEADER.size:
        raise _damaged(path, "size", f"{raw.size} bytes", f"at least the {HEADER.size} of the header")
    magic, version, code, num_sequences, num_boundaries = HEADER.unpack(raw[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise _damaged(path, "offset 0 (magic)", repr(magic), repr(MAGIC))
    if version != 1:
        raise _damaged(path, "offset 9 (version)", str(version), "1")
    if code not in DTYPES:
        raise _damaged(path, "offset 17 (dtype code)", str(code), f"an integer type, one of {sorted(DTYPES)}")
    if num_boundaries < 1:
        raise _damaged(path, "offset 26 (boundaries)", "0", "documents + 1")
    size = HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if raw.size not in (size, size + num_sequences):  # the latter with multimodal modes, which are not used
        expected = f"{size} bytes for {num_sequences} sequences and {num_boundaries} boundaries"
        raise _damaged(path, "size", f"{raw.size} bytes", expected)
    return np.dtype(DTYPES[code]), num_sequences, num_boundaries


def _check_sequences(
    idx_path: Path, bin_path: Path, lengths: IntArray, pointers: IntArray, itemsize: int, bin_bytes: int
) -> None:
    """Check that lengths are not negative, pointers are their running sum in bytes, and the sum is the size of .bin."""
    if module := native_index():
        i, end = module.check_sequences(lengths, pointers, itemsize, bin_bytes, _threads(len(lengths)))
    else:
        i, end = check_sequences(lengths, pointers, itemsize, bin_bytes)
    if i >= 0 and end < 0:
        raise _damaged(idx_path, f"offset {HEADER.size + 4 * i} (length of sequence {i})", str(lengths[i]), ">= 0")
    if i >= 0:
        offset = HEADER.size + 4 * len(lengths) + 8 * i
        raise _damaged(idx_path, f"offset {offset} (pointer of sequence {i})", str(pointers[i]), str(end))
    if end != bin_bytes:
        raise _damaged(bin_path, "size", f"{bin_bytes} bytes", f"{'>= ' if end > bin_bytes else ''}{end} by {idx_path}")


def _check_boundaries(path: Path, boundaries: IntArray, num_sequences: int) -> None:
    base = HEADER.size + 12 * num_sequences
    if boundaries[0] != 0:
        raise _damaged(path, f"offset {base} (first document boundary)", str(boundaries[0]), "0")
    if boundaries[-1] != num_sequences:
        offset = base + 8 * (len(boundaries) - 1)
        raise _damaged(path, f"offset {offset} (last document boundary)", str(boundaries[-1]), str(num_sequences))
    module = native_index()
    i = module.check_rising(boundaries, _threads(len(boundaries))) if module else check_rising(boundaries)
    if i >= 0:
        expected = f">= {boundaries[i - 1]}, the one before"
        raise _damaged(path, f"offset {base + 8 * i} (document boundary {i})", str(boundaries[i]), expected)


def check_sequences(lengths: IntArray, pointers: IntArray, itemsize: int, most: int) -> tuple[int, int]:
    """Reference: (first wrong sequence, -1 for a negative length or else the expected pointer).

    Or (-1, total bytes), if no sequence is wrong before the sum exceeds `most` bytes.
    """
    end = 0
    for part in chunks(len(lengths)):
        bytes_ = lengths[part].astype(np.int64) * itemsize
        starts = end + np.cumsum(bytes_) - bytes_  # 2^22 sequences of 2^34 bytes: no overflow before the check below
        wrong = (bytes_ < 0) | (pointers[part] != starts)
        stop = np.flatnonzero(starts > most)[:1]
        if wrong.any() and not (stop.size and stop[0] <= np.argmax(wrong)):
            k = int(np.argmax(wrong))
            return part.start + k, -1 if bytes_[k] < 0 else int(starts[k])
        if stop.size:
            return -1, int(starts[stop[0]])
        end = int(starts[-1] + bytes_[-1])
    return -1, end


def check_rising(boundaries: IntArray) -> int:
    """Reference: the first boundary that is less than the one before it, or -1."""
    for part in chunks(len(boundaries) - 1):
        falls = boundaries[part.start + 1 : part.stop + 1] < boundaries[part]
        if falls.any():
            return part.start + int(np.argmax(falls)) + 1
    return -1


def _threads(count: int) -> int:
    """Threads to check `count` numbers: one per million, at most the cores and 4, which saturate memory bandwidth."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4, 1 + count // (1 << 20))
