"""The work of `prepare`: batches of documents are read, encoded and appended to shards by concurrent threads.

Reading (orjson, decompression), encoding (one batch per thread) and appending (end tokens, histogram, digest, write,
sync) run concurrently on successive batches. At most about num_threads + 5 batches are in memory. Batches are appended
in input order; an error of an earlier step is raised when its batch is due in that order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.data.prepare.job import RERUN, SPLITS, PrepareJob, stop_at_errors
from engine.data.prepare.pack import begin_documents
from engine.data.prepare.report import PrepareReport, SplitReport, SplitTotals, Totals
from engine.data.prepare.shards import Shards
from engine.data.read.document_batch import DocumentBatch, DroppedItem
from engine.data.read.progress import ProgressEvent
from engine.data.samples.indexed import paths_of
from engine.data.tokenize.encoder import Encoder, Mismatch
from engine.data.tokenize.tokenizer import Tokenizer
from engine.errors import DataError
from engine.util.files import write_synced
from engine.util.prefetch import map_ahead
from engine.util.signals import Stopped

EncodedBatch = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int64]]
SHARD_BYTES = 256 << 20  # a shard is committed after this many bytes of data
SHARD_S = 30.0  # or this many seconds, whichever comes first; a kill loses only the uncommitted rest
MAX_THREADS = 8  # default limit: one reader feeds no more encoder threads, and each of them holds a batch


class CorpusEncoder:
    """Encodes all documents that the shards do not contain yet, commits them in shards and writes the final files."""

    def __init__(self, job: PrepareJob, shards: Shards, tokenizer: Tokenizer):
        self.job, self.options, self.shards, self.tokenizer = job, job.options, shards, tokenizer
        self.eod = tokenizer.eod if self.options.append_eod else None
        self.bos = self._bos_token() if self.options.prepend_bos else None
        shards.open(tokenizer.vocab_size)
        for text in shards.warnings:
            warnings.warn(text, stacklevel=2)
        self.totals = self._start()
        if self.totals.by_original:
            self.tokenizer = tokenizer.with_original_ids(self.totals.fallback)
        if shards.state is not None:
            done = f"{self.totals.documents:,} documents in {shards.num_shards} shards"
            job.note(f"resuming {job.parts_folder}: {done} are done")
        with job.stop.deferred():  # gigatoken calls back into Python and panics if that raises Stopped
            self.encoder = Encoder(self.tokenizer, fast=self.options.encoder == "auto" and not self.totals.fallback)
        self.encoder.note = self.totals.fallback or self.encoder.note
        shards.bytes_needed = self._bytes_needed
        job.stop.resume_hint = self._resume_hint

    def _bos_token(self) -> int:
        if self.tokenizer.bos == self.eod:
            raise DataError(
                "prepare.bos-is-eod",
                f"prepend_bos: token {self.eod} of {self.options.tokenizer} is both BOS and end-of-document, so it "
                f"would occur twice between two documents. Omit --prepend-bos, or give --no-append-eod too.",
            )
        return self.tokenizer.bos

    def _start(self) -> Totals:
        if self.shards.state is not None:
            return Totals.of(self.shards.state)
        return Totals(splits={split: SplitTotals() for split in self.job.splits})

    def run(self) -> dict[str, Any]:
        """Encode the remaining documents; returns the content of publish.json."""
        try:
            self._encode()
        except Mismatch as err:
            self._fall_back(str(err), err.in_conversion)
            self._encode()
        self._reject_empty()
        return self._finish()

    def _fall_back(self, difference: str, original: bool) -> None:
        """Encode all again with the reference encoder (`original`: sentencepiece), as all ids so far may be wrong."""
        if original:
            self.tokenizer = self.tokenizer.with_original_ids(difference)
        self.shards.restart()
        if self.job.reads_stdin:
            again = "give it as a file" if original else "give it again with --encoder tokenizers"
            raise DataError(
                "prepare.input-read-only-once",
                f"{difference}. All documents have to be encoded again, but standard input can be read only once: "
                f"{again}.",
            )
        right = (
            "sentencepiece itself"
            if self.tokenizer.sentencepiece is not None
            else "the slower but correct `tokenizers`"
        )
        text = f"{difference}. All documents are encoded again by {right}. Please report this text."
        warnings.warn(text, stacklevel=3)
        self.totals = self._start()
        self.totals.fallback, self.totals.by_original = difference, original
        self.encoder = Encoder(self.tokenizer, fast=False)
        self.encoder.note = difference

    def _encode(self) -> None:
        began, before = time.monotonic(), self.totals.elapsed_s
        start = (self.totals.consumed, sum(split.tokens for split in self.totals.splits.values()))
        committed_at = began
        stop = self.job.stop
        batches = self._with_starts(self.job.source.batches(self.totals.cursor))
        encoded_batches = map_ahead(self._encode_batch, batches, self._num_threads(), stop.check)
        try:
            with stop.deferred(), contextlib.closing(encoded_batches):
                for (batch, _), encoded in encoded_batches:
                    self._stop_at_errors(batch)
                    self._add(batch, *encoded)
                    now = time.monotonic()
                    self.totals.elapsed_s = before + now - began
                    if self.shards.uncommitted_bytes >= SHARD_BYTES or now - committed_at >= SHARD_S:
                        self._commit_shard()
                        committed_at = now
                    self._report(start, now - began)
        except Stopped:
            if self.shards.uncommitted_bytes:
                self._commit_shard()
            raise
        self._commit_shard()

    def _commit_shard(self) -> None:
        """Commit all appended data as a shard."""
        with self.job.stop.committing():
            self.shards.commit(dataclasses.asdict(self.totals))

    def _resume_hint(self) -> str:
        """Message after a signal: which work is kept, and how to resume."""
        job, state = self.job, self.shards.state
        again = RERUN + ", with the same input," * job.reads_stdin
        if state is None:
            return f"nothing is kept yet; {again}"
        if not job.parts_folder.exists():
            return f"{self.options.output} is complete"
        return f"{state['documents']:,} documents are kept in {job.parts_folder}; {again} to resume after them"

    def _with_starts(self, batches: Iterator[DocumentBatch]) -> Iterator[tuple[DocumentBatch, int]]:
        """Each batch with the number of input bytes (as stored) before it."""
        before = self.totals.consumed
        for batch in batches:
            yield batch, before
            before = batch.consumed

    def _encode_batch(self, batch_and_start: tuple[DocumentBatch, int]) -> EncodedBatch:
        """Encode a batch; raises Mismatch if the fast encoder differs from the reference.

        Returns ids int32 [T] of the concatenated documents, lengths int32 [documents], and the number of bytes of each
        document that the vocabulary cannot represent, int64 [documents].
        """
        batch, before = batch_and_start
        ids, lengths = self.encoder.encode_checked(batch.texts, before)
        return ids, lengths, self.encoder.unknown_bytes(batch.texts, ids, lengths)

    def _num_threads(self) -> int:
        """Number of encoder threads: as requested, else one per core, at most MAX_THREADS."""
        if not self.encoder.is_threaded:
            return 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.options.workers or min(cores, MAX_THREADS)

    def _stop_at_errors(self, batch: DocumentBatch) -> None:
        try:
            stop_at_errors(self.job, batch)
        except DataError:
            if self.shards.num_shards:
                self._commit_shard()
            raise

    def _add(
        self,
        batch: DocumentBatch,
        ids: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int32],
        unknown: npt.NDArray[np.int64],
    ) -> None:
        """Append an encoded batch to its splits and update all counts."""
        totals = self.totals
        for note in totals.account.add(batch):
            self.job.note(f"note: {note}")
        for drop in batch.drops:
            if drop.reason != "blank line":
                self.shards.add_skipped(_drop_line(drop))
        if batch.texts:
            split_of = self.job.split_numbers(totals.documents, len(batch.texts))
            for k, split in enumerate(SPLITS):
                selected = split_of == k
                if selected.any():
                    totals.splits[split].unknown_bytes += int(unknown[selected].sum())
                if selected.all():
                    self._append(split, batch.texts, batch.where, ids, lengths)
                elif selected.any():
                    numbers = np.flatnonzero(selected)
                    texts, where = [batch.texts[i] for i in numbers], [batch.where[i] for i in numbers]
                    self._append(split, texts, where, ids[np.repeat(selected, lengths)], lengths[selected])
        totals.documents += len(batch.texts)
        totals.cursor, totals.consumed = batch.cursor, batch.consumed

    def _append(
        self,
        split: str,
        texts: Sequence[str],
        where: Sequence[tuple[int, int]],
        ids: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int32],
    ) -> None:
        totals = self.totals.splits[split]
        if self.bos is not None:
            ids, lengths = begin_documents(ids, lengths, self.bos)
        lengths = self.shards.add(split, ids, lengths, self.eod)
        filled = int(np.count_nonzero(lengths))
        totals.documents += filled
        totals.empty_documents += len(texts) - filled
        totals.tokens += int(lengths.sum(dtype=np.int64))
        totals.text_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        longest = int(np.argmax(lengths))
        if lengths[longest] > totals.longest_document_tokens:
            file, record = where[longest]
            place = f":{record}" if record else ""
            totals.longest_document_tokens = int(lengths[longest])
            totals.longest_document = f"{self.job.source.files[file].name}{place}"

    def _report(self, start: tuple[int, int], elapsed_s: float) -> None:
        if self.job.progress is None:
            return
        totals, tokens = self.totals, sum(split.tokens for split in self.totals.splits.values())
        new_bytes, new_tokens = totals.consumed - start[0], tokens - start[1]  # by this process
        done = (totals.consumed, max(self.job.total, totals.consumed), totals.documents, tokens)
        self.job.progress(ProgressEvent("encode", *done, elapsed_s, new_bytes, new_tokens))

    def _bytes_needed(self) -> int:
        """Estimate for the rest of the work, extrapolated; per document, .idx takes 12 bytes, its boundary 8."""
        done = max(1, self.totals.consumed)
        written = self.shards.total_bytes + 20 * self.totals.documents
        rest = written * max(0, self.job.total - done) // done
        return rest + self.shards.uncommitted_bytes + 20 * self.totals.documents

    def _reject_empty(self) -> None:
        if not sum(totals.documents for totals in self.totals.splits.values()):
            self.shards.discard()
            empty = f" All {self.totals.documents:,} documents are empty." if self.totals.documents else ""
            raise self.totals.account.error(self.job.source, empty)
        for split, totals in self.totals.splits.items():
            if totals.documents == 0:
                self.shards.discard()
                o = self.options
                shares = f"valid_fraction = {o.valid_fraction}, test_fraction = {o.test_fraction}"
                raise DataError(
                    "prepare.empty-split",
                    f"{self.job.prefix(split)}: the {split} split ({shares}) got no text from "
                    f"{self.totals.documents:,} documents. Documents are never divided between splits: give more "
                    f"documents, or change the fractions (0: no split) or the seed.",
                )

    def _finish(self) -> dict[str, Any]:
        """Write index files, sidecars, the report and the tokenizer's copy; returns the content of publish.json."""
        job, shards, output = self.job, self.shards, Path(self.options.output)
        reports: dict[str, SplitReport] = {}
        for split in job.splits:
            totals = self.totals.splits[split]
            meta = {"tokenizer_digest": self.tokenizer.digest, "eod": self.eod, "text_bytes": totals.text_bytes}
            meta |= {"bos": self.bos} if self.bos is not None else {}
            sidecar = shards.write_corpus(split, meta, totals.documents, totals.empty_documents)
            reports[split] = SplitReport(
                prefix=job.prefix(split),
                bytes_per_token=totals.text_bytes / max(1, totals.tokens),
                unigram_entropy=sidecar["unigram_entropy"],
                dtype=sidecar["dtype"],
                **dataclasses.asdict(totals),
            )
        cross_entropies = {s: _cross_entropy(shards.counts[s], shards.counts["train"]) for s in reports if s != "train"}
        report = PrepareReport(
            train=reports["train"],
            valid=reports.get("valid"),
            test=reports.get("test"),
            valid_unigram_cross_entropy=cross_entropies.get("valid"),
            test_unigram_cross_entropy=cross_entropies.get("test"),
            tokenizer=str(self.options.tokenizer),
            tokenizer_digest=self.tokenizer.digest,
            vocab_size=self.tokenizer.vocab_size,
            bos=self.bos,
            eod=self.eod,
            documents_in=self.totals.documents,
            bytes_in=self.totals.consumed,
            dropped=dict(sorted(self.totals.account.dropped.items())),
            noticed=dict(sorted(self.totals.account.noticed.items())),
            examples=dict(sorted(self.totals.account.examples.items())),
            skipped=f"{output}-skipped.jsonl" if (shards.folder / "skipped.jsonl").stat().st_size else "",
            encoder=self.encoder.name,
            encoder_note=self.encoder.note,
            elapsed_s=self.totals.elapsed_s,
        )
        self.tokenizer.save(shards.folder / "tokenizer")
        write_synced(shards.folder / "report.json", json.dumps(dataclasses.asdict(report), indent=1).encode() + b"\n")
        moves: list[tuple[str, Path]] = []
        if (copy_folder := job.tokenizer_copy) is not None:
            moves += [
                (f"tokenizer/{path.name}", copy_folder / path.name) for path in (shards.folder / "tokenizer").iterdir()
            ]
        for split in job.splits:
            names = (f"{split}.bin", f"{split}.idx", f"{split}.json")
            moves += zip(names, paths_of(job.prefix(split)))
        if (shards.folder / "skipped.jsonl").stat().st_size:
            moves.append(("skipped.jsonl", Path(f"{output}-skipped.jsonl")))
        moves.append(("report.json", Path(f"{output}-report.json")))
        return {"moves": [[name, str(target)] for name, target in moves]}


def _drop_line(drop: DroppedItem) -> bytes:
    return json.dumps(dataclasses.asdict(drop), ensure_ascii=True).encode() + b"\n"


def _cross_entropy(counts: npt.NDArray[np.int64], train_counts: npt.NDArray[np.int64]) -> float:
    """Cross entropy, nats/token, of `counts` int64 [V] under add-one smoothed unigrams of `train_counts` int64 [V]."""
    log_p = np.log((train_counts + 1) / (train_counts.sum() + train_counts.size))
    return float(-(counts * log_p).sum() / counts.sum())
