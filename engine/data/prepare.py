"""Raw text to PREFIX-train and PREFIX-valid: choose the split, train the tokenizer if asked, encode, count.

The split is by document, by a keyed hash of its number: spread over the corpus (a tail split measures whatever was
appended last), stable when documents are added at the end, and no document is in both. A tokenizer is trained on the
train documents only. Everything streams: memory is a few batches of text and their encodings, not the corpus.

Reading (a thread) -> encoding (all cores) -> data files in PREFIX.parts/ (engine/data/parts.py says how these outlive a
kill) -> published under their names when all is there. The order of documents is the input order.
"""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.data.ahead import read_ahead
from engine.data.encoder import Encoder, Mismatch
from engine.data.indexed import paths_of
from engine.data.order import derive_key
from engine.data.parts import Parts, publish, read_json
from engine.data.report import PrepareReport, ProgressEvent, SplitReport, SplitTotals, Totals
from engine.data.sources import MAX_DOCUMENT_BYTES, Batch, Drop, Source
from engine.data.tokenizer import Tokenizer
from engine.errors import DataError
from engine.files import sync_folder, write_synced

SHARD_BYTES = 256 << 20  # of data written: what a kill can cost at most, or
SHARD_S = 30.0  # seconds, whichever comes first
_SETTINGS_VERSION = 1


@dataclass(frozen=True)
class Job:
    """What to do: the checked arguments of `prepare`."""

    source: Source
    output: str
    tokenizer: Path
    train_vocab_size: int | None
    valid_fraction: float
    append_eod: bool
    parse_special: bool
    seed: int
    skip_errors: bool
    fast: bool
    parallel: bool | None
    suffixes: tuple[str, str]
    overwrite: bool
    progress: Callable[[ProgressEvent], None] | None
    note: Callable[[str], None]

    @property
    def parts(self) -> Path:
        return Path(f"{self.output}.parts")

    def prefix(self, split: str) -> str:
        return self.output + self.suffixes[split == "valid"]

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "valid") if self.valid_fraction > 0 else ("train",)

    @property
    def total(self) -> int:
        return sum(file.num_bytes for file in self.source.files)

    def is_valid(self, first: int, count: int) -> npt.NDArray[np.bool_]:
        """Which of the documents from number `first` on are for valid, bool [count]."""
        if not self.valid_fraction:
            return np.zeros(count, np.bool_)
        threshold = int(self.valid_fraction * 2.0**64)
        hashes = (derive_key(self.seed, "split", number) for number in range(first, first + count))
        return np.fromiter((value < threshold for value in hashes), np.bool_, count)

    def targets(self) -> list[Path]:
        """Everything that is written, whatever the options."""
        corpora = [path for split in ("train", "valid") for path in paths_of(self.prefix(split))]
        return [*corpora, Path(f"{self.output}-skipped.jsonl"), Path(f"{self.output}-report.json")]


def prepare(
    inputs: Sequence[str | Path],
    output: str,
    *,
    tokenizer: Path,
    train_vocab_size: int | None = None,
    valid_fraction: float = 0.0,
    append_eod: bool = True,
    parse_special: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    json_key: Sequence[str] = ("text",),
    format: str = "",
    on_error: str = "stop",
    seed: int = 0,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    fast: bool = True,
    parallel: bool | None = None,
    suffixes: tuple[str, str] = ("-train", "-valid"),
    overwrite: bool = False,
    progress: Callable[[ProgressEvent], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> PrepareReport:
    """Tokenise `inputs` into `output`-train and, when `valid_fraction` > 0, `output`-valid.

    `tokenizer` is what Tokenizer.load takes; with `train_vocab_size` it is created there first. Killed at any moment,
    the same call goes on where the last shard ended. Raises DataError for bad input (with `on_error` "skip" it is
    counted and listed), for outputs that exist unless `overwrite`, and for a split without documents.
    """
    if not 0.0 <= valid_fraction < 1.0:
        raise DataError(f"valid_fraction = {valid_fraction}: expected 0 <= valid_fraction < 1; 0 means no valid split")
    if on_error not in ("stop", "skip"):
        raise DataError(f"on_error = {on_error!r}: expected stop or skip")
    keys = (json_key,) if isinstance(json_key, str) else tuple(json_key)
    how = {"keys": keys, "format": format, "max_document_bytes": max_document_bytes}
    source = Source.of(inputs, include, exclude, **how)
    if train_vocab_size is not None and any(file.name == "-" for file in source.files):
        raise DataError("standard input (-) can be read only once: train the tokenizer on a file, or give one")
    job = Job(
        source,
        output,
        tokenizer,
        train_vocab_size,
        valid_fraction,
        append_eod,
        parse_special,
        seed,
        on_error == "skip",
        fast,
        parallel,
        suffixes,
        overwrite,
        progress,
        note,
    )
    if not job.total and not any(file.name == "-" for file in source.files):
        raise DataError(
            f"no text in {', '.join(map(str, inputs)) or 'no inputs'} (include {include}, exclude {exclude})"
        )
    return _run(job)


def _run(job: Job) -> PrepareReport:
    """Go on with the work in PREFIX.parts, or begin it."""
    given = None if job.train_vocab_size is not None else Tokenizer.load(job.tokenizer, job.parse_special)
    settings = _settings(job, given)
    resuming = job.parts.exists()
    if not resuming:
        _refuse_existing(job)
    with Parts(job.parts, job.splits) as parts:
        begun = parts.settings()
        plan = read_json(job.parts / "publish.json")
        if plan is not None and begun in (None, settings):  # killed while publishing
            return _publish(job, plan)
        if begun is not None and begun != settings and not job.overwrite:
            raise DataError(
                f"{job.parts}: holds the unfinished work of another call:\n{_difference(begun, settings)}\nGive the "
                f"same options and inputs to go on with it, or --overwrite (or delete the folder) to start anew."
            )
        if begun != settings:
            if resuming:
                _refuse_existing(job, parts if begun is None else None)
            parts.begin(settings)
        try:
            chosen = given or _trained(job)
            plan = _Work(job, parts, chosen).run()
        except DataError:
            if parts.num_shards == 0:  # nothing worth keeping: the next try is as the first one
                parts.discard()
            raise
        parts.write_json("publish.json", plan)
        return _publish(job, plan)


def _settings(job: Job, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """All that the output depends on, as JSON gives it back. How errors are met is not among it: `skip` may go on
    where `stop` stopped."""
    files = [[file.name, file.num_bytes, file.stamp] for file in job.source.files]
    if tokenizer is None:
        identity: dict[str, Any] = {"trained with vocab_size": job.train_vocab_size, "folder": str(job.tokenizer)}
    else:
        identity = {"digest": tokenizer.digest}
    settings = {
        "version": _SETTINGS_VERSION,
        "files": files,
        "json keys": list(job.source.keys),
        "format": job.source.format,
        "max_document_bytes": job.source.max_document_bytes,
        "tokenizer": identity,
        "append_eod": job.append_eod,
        "parse_special": job.parse_special,
        "valid_fraction": job.valid_fraction,
        "seed": job.seed,
        "suffixes": list(job.suffixes),
        "fast": job.fast,
    }
    return json.loads(json.dumps(settings))


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        if key == "files" and isinstance(before, list) and isinstance(now, list):
            gone, come = [f for f in before if f not in now], [f for f in now if f not in before]
            lines += [
                f"  input {name}: {size:,} bytes, as it was then (stamp {stamp})" for name, size, stamp in gone[:5]
            ]
            lines += [f"  input {name}: {size:,} bytes, as it is now (stamp {stamp})" for name, size, stamp in come[:5]]
            lines += ["  inputs in another order"] if not gone and not come else []
        else:
            lines.append(f"  {key}: then {before!r}, now {now!r}")
    return "\n".join(lines)


def _refuse_existing(job: Job, leftover: Parts | None = None) -> None:
    """Refuse to replace files; `leftover` is a folder of which a kill left the husk, and goes away then."""
    paths = job.targets()
    if job.train_vocab_size is not None:
        paths.append(job.tokenizer / "tokenizer.json")
    existing = [str(path) for path in paths if path.exists()]
    if existing and not job.overwrite:
        if leftover is not None:
            leftover.discard()
        raise DataError(
            f"{', '.join(existing)}: already there, so this is done. "
            f"Choose another name, delete them, or give --overwrite."
        )


def _trained(job: Job) -> Tokenizer:
    """The tokenizer that an earlier try trained, or a new one, kept in the parts folder."""
    folder = job.parts / "trained"
    if not folder.exists():
        Tokenizer.train(_train_texts(job), job.train_vocab_size or 0).save(job.parts / "trained.tmp")
        (job.parts / "trained.tmp").rename(folder)
        sync_folder(job.parts)
    return Tokenizer.load(folder, job.parse_special)


def _train_texts(job: Job) -> Iterator[str]:
    began, number = time.monotonic(), 0
    for batch in read_ahead(job.source.batches()):
        _stop_at_errors(job, batch)
        valid = job.is_valid(number, len(batch.texts))
        number += len(batch.texts)
        yield from (text for text, is_valid in zip(batch.texts, valid) if not is_valid)
        if job.progress is not None:
            elapsed, consumed = time.monotonic() - began, batch.consumed
            job.progress(ProgressEvent("train tokenizer", consumed, job.total, number, 0, elapsed, consumed, 0))


def _stop_at_errors(job: Job, batch: Batch) -> None:
    for drop in batch.drops:
        if drop.stops and not job.skip_errors:
            raise DataError(f"{drop} (--on-error skip leaves such documents out, and counts and lists them.)")


class _Work:
    """Encoding, from wherever the parts are to the end."""

    def __init__(self, job: Job, parts: Parts, tokenizer: Tokenizer):
        self.job, self.parts, self.tokenizer = job, parts, tokenizer
        self.eod = tokenizer.eod if job.append_eod else None
        parts.open(tokenizer.vocab_size)
        for text in parts.warnings:
            warnings.warn(text, stacklevel=2)
        self.totals = self._start()
        if parts.state is not None:
            done = f"{self.totals.documents:,} documents in {parts.num_shards} shards"
            job.note(f"going on with {job.parts}: {done} are done")
        self.encoder = Encoder(tokenizer, fast=job.fast and self.totals.fast, parallel=job.parallel)
        parts.bytes_needed = self._bytes_needed

    def _start(self) -> Totals:
        if self.parts.state is not None:
            return Totals.of(self.parts.state)
        return Totals(splits={split: SplitTotals() for split in self.job.splits}, fast=self.job.fast)

    def run(self) -> dict[str, Any]:
        """Encode what is left; returns what is to be published."""
        try:
            self._encode()
        except Mismatch as err:
            warnings.warn(
                f"{err}. All of it is encoded anew by the slower `tokenizers`, which is right; please report this text "
                f"to gigatoken.",
                stacklevel=2,
            )
            self.parts.restart()
            self.totals = self._start()
            self.totals.fast = False
            self.encoder = Encoder(self.tokenizer, fast=False)
            self.encoder.note = str(err)
            self._encode()
        self._refuse_empty()
        return self._finish()

    def _encode(self) -> None:
        began, before = time.monotonic(), self.totals.elapsed_s
        here = (self.totals.consumed, sum(split.tokens for split in self.totals.splits.values()))
        committed_at = began
        for batch in read_ahead(self.job.source.batches(self.totals.cursor)):
            self._stop_at_errors(batch)
            self._add(batch)
            now = time.monotonic()
            self.totals.elapsed_s = before + now - began
            if self.parts.uncommitted_bytes >= SHARD_BYTES or now - committed_at >= SHARD_S:
                self.parts.commit(dataclasses.asdict(self.totals))
                committed_at = now
            self._report(here, now - began)
        self.parts.commit(dataclasses.asdict(self.totals))

    def _stop_at_errors(self, batch: Batch) -> None:
        try:
            _stop_at_errors(self.job, batch)
        except DataError:
            if self.parts.num_shards:
                self.parts.commit(dataclasses.asdict(self.totals))
            raise

    def _add(self, batch: Batch) -> None:
        """Encode a batch and append it to its splits; count everything."""
        totals = self.totals
        for drop in batch.drops:
            totals.dropped[drop.reason] = totals.dropped.get(drop.reason, 0) + 1
            if drop.reason != "blank line":
                self.parts.skip(_drop_line(drop))
        if batch.texts:
            ids, lengths = self.encoder.encode(batch.texts)
            self.encoder.check(batch.texts)
            valid = self.job.is_valid(totals.documents, len(batch.texts))
            for split, chosen in (("train", ~valid), ("valid", valid)):
                if chosen.all():
                    self._append(split, batch.texts, batch.where, ids, lengths)
                elif chosen.any():
                    numbers = np.flatnonzero(chosen)
                    texts, where = [batch.texts[i] for i in numbers], [batch.where[i] for i in numbers]
                    self._append(split, texts, where, ids[np.repeat(chosen, lengths)], lengths[chosen])
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
        totals.unknown_bytes += self.encoder.unknown_bytes(texts, ids, lengths)
        filled = lengths > 0  # an empty document gets no end either: it would end the one before a second time
        if self.eod is not None:
            ids = np.insert(ids, np.cumsum(lengths)[filled], np.int32(self.eod))
            lengths = lengths + filled
        self.parts.add(split, ids, lengths)
        totals.documents += int(filled.sum())
        totals.empty_documents += len(texts) - int(filled.sum())
        totals.tokens += ids.size
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
        here = (totals.consumed - start[0], tokens - start[1])
        total = max(self.job.total, totals.consumed)
        self.job.progress(ProgressEvent("encode", totals.consumed, total, totals.documents, tokens, elapsed_s, *here))

    def _bytes_needed(self) -> int:
        """To the end, if the rest is like what was read; the index takes 12 bytes a document and its boundary 8."""
        done = max(1, self.totals.consumed)
        written = self.parts.total_bytes + 20 * self.totals.documents
        rest = written * max(0, self.job.total - done) // done
        return rest + self.parts.uncommitted_bytes + 20 * self.totals.documents

    def _refuse_empty(self) -> None:
        for split, totals in self.totals.splits.items():
            if totals.documents == 0:
                self.parts.discard()
                raise DataError(
                    f"{self.job.prefix(split)}: of {self.totals.documents} documents none with text is in the "
                    f"{split} split (valid_fraction = {self.job.valid_fraction}; dropped: {self.totals.dropped}). "
                    f"A document is never cut: give more documents, change valid_fraction (0: none) or the seed."
                )

    def _finish(self) -> dict[str, Any]:
        """Write index files, sidecars, report and the tokenizer's copy beside the data."""
        job, parts, output = self.job, self.parts, Path(self.job.output)
        reports: dict[str, SplitReport] = {}
        for split in job.splits:
            totals = self.totals.splits[split]
            meta = {"tokenizer_digest": self.tokenizer.digest, "eod": self.eod, "text_bytes": totals.text_bytes}
            sidecar = parts.write_corpus(split, meta, totals.documents, totals.empty_documents)
            reports[split] = SplitReport(
                prefix=job.prefix(split),
                bytes_per_token=totals.text_bytes / max(1, totals.tokens),
                unigram_entropy=sidecar["unigram_entropy"],
                dtype=sidecar["dtype"],
                **dataclasses.asdict(totals),
            )
        valid = "valid" in reports
        report = PrepareReport(
            train=reports["train"],
            valid=reports.get("valid"),
            valid_unigram_cross_entropy=_cross_entropy(parts.counts["valid"], parts.counts["train"]) if valid else None,
            tokenizer=str(job.tokenizer),
            tokenizer_digest=self.tokenizer.digest,
            vocab_size=self.tokenizer.vocab_size,
            documents_in=self.totals.documents,
            bytes_in=self.totals.consumed,
            dropped=dict(sorted(self.totals.dropped.items())),
            encoder=self.encoder.name,
            encoder_note=self.encoder.note,
            elapsed_s=self.totals.elapsed_s,
        )
        self.tokenizer.save(parts.folder / "tokenizer")
        write_synced(parts.folder / "report.json", json.dumps(dataclasses.asdict(report), indent=1).encode() + b"\n")
        beside = Path(f"{output}-tokenizer")
        moves = [(f"tokenizer/{path.name}", beside / path.name) for path in (parts.folder / "tokenizer").iterdir()]
        for split in job.splits:
            names = (f"{split}.bin", f"{split}.idx", f"{split}.json")
            moves += zip(names, paths_of(job.prefix(split)))
        if (parts.folder / "skipped.jsonl").stat().st_size:
            moves.append(("skipped.jsonl", Path(f"{output}-skipped.jsonl")))
        moves.append(("report.json", Path(f"{output}-report.json")))
        return {"moves": [[name, str(target)] for name, target in moves]}


def _drop_line(drop: Drop) -> bytes:
    return json.dumps(dataclasses.asdict(drop), ensure_ascii=True).encode() + b"\n"


def _publish(job: Job, plan: dict[str, Any]) -> PrepareReport:
    """The tokenizer first, as without it the ids mean nothing; the report last."""
    trained = job.parts / "trained"
    if job.train_vocab_size is not None and trained.exists():
        Tokenizer.load(trained).save(job.tokenizer)
    moves = [(job.parts / name, Path(target)) for name, target in plan["moves"]]
    targets = {target for _, target in moves}
    publish(job.parts, [path for path in job.targets() if path not in targets], moves)
    facts = read_json(Path(f"{job.output}-report.json")) or {}
    splits = {name: SplitReport(**facts[name]) if facts[name] else None for name in ("train", "valid")}
    return PrepareReport(**{**facts, **splits})


def _cross_entropy(counts: npt.NDArray[np.int64], train_counts: npt.NDArray[np.int64]) -> float:
    """Nats per token of `counts` int64 [V] under the add-one smoothed unigrams of `train_counts` int64 [V]."""
    log_p = np.log((train_counts + 1) / (train_counts.sum() + train_counts.size))
    return float(-(counts * log_p).sum() / counts.sum())
