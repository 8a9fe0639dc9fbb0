"""Inspects a corpus: statistics, document lengths, decoded samples with document boundaries, full verification."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from engine.data.samples.fim import FillInTheMiddle
from engine.data.samples.indexed import IndexedDataset, paths_of
from engine.data.samples.order import SampleOrder
from engine.data.samples.sidecar import SIDECAR_DIGEST, entropy, sidecar_digest
from engine.data.tokenize.file_names import is_tokenizer
from engine.data.tokenize.tokenizer import Tokenizer
from engine.errors import DataError

_CHUNK = 1 << 22  # elements read at a time, to bound memory
DOCUMENT_MARK = "⟦document {}⟧"


@dataclass(frozen=True)
class CorpusStatistics:
    """Statistics of a corpus. documents: those with tokens; lengths in tokens; p95: 95th percentile of the lengths.

    text_bytes: from the sidecar, None without it.
    """

    documents: int
    tokens: int
    bytes: int
    dtype: str
    shortest: int
    median: int
    mean: float
    p95: int
    longest: int
    longest_document: int
    text_bytes: int | None


def count(dataset: IndexedDataset) -> CorpusStatistics:
    """Statistics of a corpus. Raises DataError if it has no documents."""
    if not dataset.num_documents:
        raise DataError("samples.corpus-empty", f"{dataset.prefix}: the corpus has no documents")
    lengths = dataset.lengths
    text_bytes = dataset.meta.get("text_bytes")
    return CorpusStatistics(
        documents=dataset.num_documents,
        tokens=dataset.num_tokens,
        bytes=dataset.num_tokens * dataset.dtype.itemsize,
        dtype=dataset.dtype.name,
        shortest=int(lengths.min()),
        median=int(np.median(lengths)),
        mean=dataset.num_tokens / dataset.num_documents,
        p95=int(np.quantile(lengths, 0.95, method="inverted_cdf")),
        longest=int(lengths.max()),
        longest_document=int(np.argmax(lengths)),
        text_bytes=text_bytes if isinstance(text_bytes, int) else None,
    )


def histogram(dataset: IndexedDataset) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(edges [n + 1], documents [n], their tokens [n]) in bins of doubling width: 0, 1, 2-3, 4-7, ... tokens."""
    bits = math.ceil(math.log2(int(dataset.lengths.max()) + 1)) if dataset.num_documents else 0
    edges = np.array([0, *(1 << b for b in range(bits + 1))], np.int64)
    documents, tokens = np.zeros(len(edges) - 1, np.int64), np.zeros(len(edges) - 1, np.int64)
    for low in range(0, dataset.num_documents, _CHUNK):
        lengths = dataset.lengths[low : low + _CHUNK].astype(np.int64)
        at = np.searchsorted(edges, lengths, side="right") - 1
        documents += np.bincount(at, minlength=len(documents))
        tokens += np.bincount(at, weights=lengths, minlength=len(tokens)).astype(np.int64)
    return edges, documents, tokens


def decoded_samples(
    dataset: IndexedDataset,
    tokenizer: Tokenizer,
    seq_len: int,
    count: int,
    seed: int,
    fim: FillInTheMiddle | None = None,
) -> Iterator[str]:
    """Decoded samples as training sees them, drawn by `seed`, with a mark where each document begins or continues.

    With `fim`: the samples after fill-in-the-middle, without marks but with special tokens, and counts of outcomes.
    """
    order = SampleOrder(dataset, seq_len, seed)
    picked = np.random.default_rng(seed).integers(0, order.samples_per_epoch, count)
    for sample in picked.tolist():
        if fim is not None:
            one = np.array([sample], np.int64)
            result = fim.transform(order.gather(one), one, order.sources(one))
            text = tokenizer.decode(result.rows[0, : result.lengths[0]].tolist())
            outcomes = ", ".join(f"{kind} {count}" for kind, count in sorted(result.outcomes.items()) if count)
            yield f"sample {sample} ({outcomes}): {text}"
            continue
        parts = []
        for document, offset, length in order.parts(sample):
            text = tokenizer.decode(dataset[document][offset : offset + length].tolist())
            mark = f"{document}" if not offset else f"{document} from token {offset}"
            parts.append(DOCUMENT_MARK.format(mark) + text)
        dataset.check()
        yield f"sample {sample}: " + "".join(parts)


def verify(dataset: IndexedDataset, tokenizer: Tokenizer | None) -> list[str]:
    """Check what opening a corpus does not: every token, and the sidecar. Returns a line for each check that passed.

    Raises DataError with all differences. Sizes, pointers and boundaries were already checked when the corpus was
    opened.
    """
    bin_path, idx_path, json_path = paths_of(dataset.prefix)
    meta = dataset.meta
    limit = dataset.vocab_size or meta.get("vocab_size") or (tokenizer.vocab_size if tokenizer else 0)
    counts = np.zeros(max(1, limit), np.int64)
    largest, digest = -1, xxhash.xxh3_128()
    for low in range(0, dataset.num_tokens, _CHUNK):
        stored = dataset.tokens[low : low + _CHUNK]
        digest.update(np.ascontiguousarray(stored).view(np.uint8).data)
        dataset.check()
        tokens = stored.astype(np.int64)
        wrong = (tokens < 0) | (tokens >= limit) if limit else tokens < 0
        if wrong.any():
            k = int(np.argmax(wrong))
            document, offset = dataset.locate(low + k)
            raise DataError(
                "samples.token-outside-vocabulary",
                f"{bin_path}: offset {(low + k) * dataset.dtype.itemsize} (document {document}, token {offset}): "
                f"id {tokens[k]} is not in [0, {limit or 'any'}). "
                f"The file is damaged, or was made with another tokenizer.",
            )
        largest = max(largest, int(tokens.max()))
        if limit:
            counts += np.bincount(tokens, minlength=limit)
    passed = [
        f"{idx_path}: {dataset.num_documents:,} lengths, pointers and boundaries fit the size of .bin",
        f"{bin_path}: {dataset.num_tokens:,} tokens are in [0, {limit:,})" if limit else f"{bin_path}: no token < 0",
    ]
    if not meta and json_path.exists():
        raise DataError(
            "samples.sidecar-differs",
            f"{json_path}: describes another file (see the warning). Delete or restore it.",
        )
    if not meta:
        return [*passed, f"{json_path}: does not exist; the tokenizer and the digest of the tokens are unknown"]
    expected: dict[str, Any] = {"num_documents": dataset.num_documents, "max_token": largest}
    expected |= {"dtype": dataset.dtype.name, "bin_digest": digest.hexdigest(), SIDECAR_DIGEST: sidecar_digest(meta)}
    if limit and limit == meta.get("vocab_size"):
        expected["unigram_entropy"] = entropy(counts)
    if tokenizer is not None:
        expected["tokenizer_digest"] = tokenizer.digest
    differences = [
        f"{name} is {meta[name]!r}, but the files have {value!r}"
        for name, value in expected.items()
        if name in meta and not _same(meta[name], value)
    ]
    if differences:
        raise DataError(
            "samples.sidecar-differs",
            f"{json_path}: {'; '.join(differences)}. Write the corpus again, or restore the file.",
        )
    return [*passed, f"{json_path}: {', '.join(name for name in expected if name in meta)} match the files"]


def _same(stored: Any, found: Any) -> bool:
    if isinstance(found, float):
        return isinstance(stored, int | float) and math.isclose(stored, found, rel_tol=1e-9, abs_tol=1e-12)
    return bool(stored == found)


def tokenizer_fits(dataset: IndexedDataset, tokenizer: Tokenizer | None) -> bool | None:
    """Whether the corpus was made with this tokenizer; None if unknown (no tokenizer, or no digest in the sidecar)."""
    made_with = dataset.meta.get("tokenizer_digest")
    return None if tokenizer is None or not made_with else bool(tokenizer.digest == made_with)


def find_tokenizer(prefix: str, given: Path | None) -> Path | None:
    """The tokenizer folder of a corpus: the given one, else PREFIX-tokenizer (also for PREFIX-train, PREFIX-valid and
    PREFIX-test, as `prepare` writes it), else `tokenizer` or `.` in the folder of the corpus. None if there is none.
    """
    if given is not None:
        return given
    folder = Path(prefix).parent
    whole = next((prefix.removesuffix(s) for s in ("-train", "-valid", "-test") if prefix.endswith(s)), prefix)
    places = (Path(f"{prefix}-tokenizer"), Path(f"{whole}-tokenizer"), folder / "tokenizer", folder)
    return next((place for place in places if is_tokenizer(place)), None)
