"""Concatenates corpora: `.bin` and `.idx` are bitwise equal to the output of Megatron-LM's tools/merge_datasets.py.

`.bin` concatenates the bytes. In `.idx`, lengths are concatenated, pointers are shifted by the bytes and document
boundaries by the sequences of the corpora before. The sidecar, which Megatron does not have, is computed from the
copied tokens if every corpus has one; their tokenizer_digest, vocab_size, eod and bos must be equal.

Files are written in OUTPUT.merging and renamed at the end, so that a kill leaves nothing under the output's name.
Corpora are opened one at a time, so thousands of them need few open files and maps. Memory: a few MiB and two
histograms.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from engine.data.read.progress import ProgressEvent
from engine.data.samples.index_file import CHUNK, HEADER, MAGIC, IntArray, chunks, code_of
from engine.data.samples.indexed import IndexedDataset, paths_of
from engine.data.samples.sidecar import sidecar_bytes, sidecar_of
from engine.data.workfolder import PUBLISH_PLAN, WorkFolder, reject_existing
from engine.errors import DataError
from engine.util.files import sync_file, write_synced
from engine.util.signals import Interrupts

_MUST_AGREE = ("tokenizer_digest", "vocab_size", "eod", "bos")


@dataclass(frozen=True)
class MergeReport:
    """Result of a merge. sequences: training reads each as a document. why_no_sidecar: "" if one is written."""

    output: str
    corpora: list[str]
    sequences: int
    documents: int
    tokens: int
    dtype: str
    why_no_sidecar: str
    tokenizer_digest: str | None
    unigram_entropy: float | None
    elapsed_s: float


@dataclass
class _Corpus:
    """Metadata of a corpus when it was first opened, compared again when it is copied. stamps: mtimes in ns."""

    prefix: str
    dtype: np.dtype[Any]
    sequences: int
    boundaries: int
    tokens: int
    multimodal: bool
    stamps: list[int]
    meta: dict[str, Any] = field(repr=False)

    @classmethod
    def open(cls, prefix: str) -> tuple[_Corpus, IndexedDataset]:
        stamps = [path.stat().st_mtime_ns if path.exists() else 0 for path in paths_of(prefix)]
        data = IndexedDataset(prefix)
        sizes = (len(data.lengths), len(data.boundaries), data.num_tokens, bool(len(data.modes)))
        return cls(prefix, data.dtype, *sizes, stamps, data.meta), data

    @property
    def identity(self) -> list[Any]:
        return [
            self.prefix,
            self.dtype.name,
            self.sequences,
            self.boundaries,
            self.tokens,
            self.multimodal,
            self.stamps,
        ]


def merge(
    inputs: Sequence[str],
    output: str,
    *,
    multimodal: bool = False,
    overwrite: bool = False,
    progress: Callable[[ProgressEvent], None] | None = None,
    stop: Interrupts | None = None,
) -> MergeReport:
    """Concatenate corpora, in input order, into OUTPUT.bin, OUTPUT.idx and, if all have a sidecar, OUTPUT.json.

    inputs: prefixes, globs, and folders, whose corpora are sorted by name as in Megatron-LM. multimodal: the corpora
    have modes, which are concatenated too. stop: signals that end the merge, but not during the renames. Raises
    DataError for incompatible or corrupt corpora, outputs that exist unless `overwrite`, and too little disk space.
    """
    began, stop = time.monotonic(), Interrupts(listen=False) if stop is None else stop
    corpora = [_Corpus.open(prefix)[0] for prefix in find_corpora(inputs)]
    _reject_mismatches(corpora, output, multimodal)
    folder, identity = Path(f"{output}.merging"), [corpus.identity for corpus in corpora]
    needed = _bytes_needed(corpora)
    with WorkFolder(folder, "merge-datasets", _NAMES) as work, work.disk_errors():
        work.bytes_needed = lambda: needed
        done = work.publish_plan({})
        if done is None or done.get("corpora") != json.loads(json.dumps(identity)):
            done = _write_merged(work, corpora, output, overwrite, needed, progress, began)
        moves = [(folder / name, path) for name, path in zip(_NAMES, paths_of(output)) if name in done["files"]]
        with stop.deferred():
            work.publish([path for path in paths_of(output) if path not in {to for _, to in moves}], moves)
            stop.resume_hint = lambda: f"{output} is complete"
    return MergeReport(**done["report"])


_NAMES = ("bin", "idx", "json", PUBLISH_PLAN, f"{PUBLISH_PLAN}.tmp")


def find_corpora(inputs: Sequence[str]) -> list[str]:
    """Expand `inputs` to corpus prefixes. Raises DataError for half a corpus, none, or the same corpus twice."""
    prefixes: list[str] = []
    for entry in inputs:
        if os.path.isdir(entry) and not os.path.isfile(f"{entry}.idx"):
            prefixes += _in_folder(entry)
        elif glob.has_magic(entry) and not os.path.isfile(f"{entry}.idx"):
            prefixes += sorted({name.removesuffix(".idx") for name in glob.glob(entry) if name.endswith(".idx")})
        else:
            prefixes.append(entry[:-4] if entry.endswith((".bin", ".idx")) and os.path.isfile(entry) else entry)
    if not prefixes:
        raise DataError(
            "prepare.nothing-to-merge",
            f"{', '.join(inputs) or 'no input'}: no PREFIX.idx found. Give prefixes, or a folder of corpora.",
        )
    first_name: dict[str, str] = {}
    for prefix in prefixes:
        path = os.path.realpath(f"{prefix}.idx")
        if path in first_name:
            raise DataError(
                "prepare.corpus-twice",
                f"{prefix}: is given twice (first as {first_name[path]}): its documents would be duplicated."
                " Give it only once.",
            )
        first_name[path] = prefix
    return prefixes


def _in_folder(folder: str) -> list[str]:
    """Prefixes of the corpora in `folder` (not in subfolders), sorted by name. Raises DataError for half a corpus."""
    names = sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name)))
    halves = {suffix: {n[:-4] for n in names if n.endswith(suffix)} for suffix in (".bin", ".idx")}
    for present, absent in ((".bin", ".idx"), (".idx", ".bin")):
        if unpaired := sorted(halves[present] - halves[absent]):
            what = f"{os.path.join(folder, unpaired[0])}{present} has no {absent}"
            raise DataError("prepare.half-a-corpus", f"{what}. Copy that file too, or move this one out of the folder.")
    return [os.path.join(folder, name) for name in sorted(halves[".bin"])]


def _reject_mismatches(corpora: Sequence[_Corpus], output: str, multimodal: bool) -> None:
    first = corpora[0]
    for corpus in corpora:
        if os.path.realpath(f"{corpus.prefix}.idx") == os.path.realpath(f"{output}.idx"):
            raise DataError(
                "prepare.output-is-a-corpus", f"{output}: is one of the corpora to merge. Choose another output."
            )
        if corpus.dtype != first.dtype:
            raise DataError(
                "prepare.token-sizes-differ",
                f"{corpus.prefix} has {corpus.dtype.name} tokens, but {first.prefix} has {first.dtype.name}: their "
                f"vocabularies differ. Merge corpora of the same tokenizer, or prepare the text of one of them again.",
            )
        if corpus.multimodal and not multimodal:
            raise DataError(
                "prepare.multimodal-not-asked",
                f"{corpus.prefix}.idx: has modes (a multimodal corpus). Give --multimodal to merge the modes too.",
            )
        if multimodal and corpus.sequences and not corpus.multimodal:
            raise DataError(
                "prepare.not-multimodal",
                f"{corpus.prefix}.idx: has no modes, so it is not multimodal. Omit --multimodal.",
            )
    known = [corpus for corpus in corpora if corpus.meta]
    for key in _MUST_AGREE:
        for corpus in known[1:]:
            a, b = known[0].meta.get(key), corpus.meta.get(key)
            if a != b:
                raise DataError(
                    "prepare.corpora-differ",
                    f"{known[0].prefix}.json has {key} {a}, but {corpus.prefix}.json has {b}: token ids or document "
                    f"boundaries would be inconsistent. Prepare both with the same tokenizer and options.",
                )


def _bytes_needed(corpora: Sequence[_Corpus]) -> int:
    return sum(c.tokens * c.dtype.itemsize + 13 * c.sequences + 8 * c.boundaries + 4096 for c in corpora)


def _write_merged(
    work: WorkFolder,
    corpora: Sequence[_Corpus],
    output: str,
    overwrite: bool,
    needed: int,
    progress: Callable[[ProgressEvent], None] | None,
    began: float,
) -> dict[str, Any]:
    """Write all files in the work folder, or remove it on an error; returns the content of publish.json."""
    folder = work.folder
    try:
        reject_existing(paths_of(output), overwrite)
        for name in _NAMES:
            (folder / name).unlink(missing_ok=True)
        if (free := shutil.disk_usage(folder).free) < needed:
            text = f"{folder}: about {needed:,} bytes are needed, but only {free:,} are free"
            raise DataError("prepare.disk-too-small", f"{text}. Free disk space, or choose an output on another disk.")
        copied = _Merger(folder, corpora, progress, began)
        sidecar = copied.run()
        meta = sidecar or {}
        report = MergeReport(
            output=output,
            corpora=[corpus.prefix for corpus in corpora],
            sequences=sum(corpus.sequences for corpus in corpora),
            documents=sum(corpus.boundaries - 1 for corpus in corpora),
            tokens=sum(corpus.tokens for corpus in corpora),
            dtype=corpora[0].dtype.name,
            why_no_sidecar=copied.why_no_sidecar,
            tokenizer_digest=meta.get("tokenizer_digest"),
            unigram_entropy=meta.get("unigram_entropy"),
            elapsed_s=time.monotonic() - began,
        )
        if sidecar is not None:
            write_synced(folder / "json", sidecar_bytes(sidecar))
        files = ["bin", "idx", *(["json"] if sidecar is not None else [])]
        done = {"corpora": [corpus.identity for corpus in corpora], "files": files, "report": asdict(report)}
        work.write_json(PUBLISH_PLAN, done)
    except BaseException:  # half-written files would only fill the disk
        work.discard()
        raise
    return json.loads(json.dumps(done))


class _Merger:
    """Copies all corpora into `bin` and `idx` in one pass, with histogram and digest of the tokens."""

    def __init__(
        self,
        folder: Path,
        corpora: Sequence[_Corpus],
        progress: Callable[[ProgressEvent], None] | None,
        began: float,
    ):
        self.folder, self.corpora, self.progress, self.began = folder, corpora, progress, began
        self.why_no_sidecar = _why_no_sidecar(corpora)
        vocab_size = 0 if self.why_no_sidecar else int(corpora[0].meta["vocab_size"])
        self.counts = np.zeros(vocab_size, np.int64)
        self.digest = xxhash.xxh3_128()
        self.sequences, self.boundaries, self.tokens = 0, 1, 0  # copied so far; every .idx starts with boundary 0

    def run(self) -> dict[str, Any] | None:
        """Write both files; returns the sidecar, None if it cannot be computed."""
        n = sum(corpus.sequences for corpus in self.corpora)
        d = 1 + sum(corpus.boundaries - 1 for corpus in self.corpora)
        with open(self.folder / "bin", "wb") as bin_, open(self.folder / "idx", "wb") as idx:
            idx.write(HEADER.pack(MAGIC, 1, code_of(self.corpora[0].dtype), n, d))
            idx.seek(HEADER.size + 12 * n)
            idx.write(np.zeros(1, "<i8").data)
            for corpus in self.corpora:
                self._add(corpus, bin_, idx, n, d)
            sync_file(bin_)
            sync_file(idx)
        if self.why_no_sidecar:
            return None
        first = self.corpora[0].meta
        meta: dict[str, Any] = {key: first[key] for key in ("tokenizer_digest", "eod", "bos") if key in first}
        texts = [corpus.meta.get("text_bytes") for corpus in self.corpora]
        if all(isinstance(size, int) for size in texts):
            meta["text_bytes"] = sum(size for size in texts if size is not None)
        empty = sum(int(corpus.meta.get("num_empty_documents", 0)) for corpus in self.corpora)
        meta["bin_digest"] = self.digest.hexdigest()
        return sidecar_of(meta, self.corpora[0].dtype, self.counts, self.sequences, empty)

    def _add(self, opened: _Corpus, bin_: IO[bytes], idx: IO[bytes], n: int, d: int) -> None:
        """Append a corpus. n, d: number of sequences and boundaries of the merged corpus."""
        corpus, data = _Corpus.open(opened.prefix)
        if corpus.identity != opened.identity:
            raise DataError(
                "prepare.corpus-changed",
                f"{corpus.prefix}: was changed during the merge. Give the same command again.",
            )
        own_digest, base = xxhash.xxh3_128(), HEADER.size
        for low in range(0, data.num_tokens, CHUNK):
            tokens = np.ascontiguousarray(data.tokens[low : low + CHUNK])
            data.check()
            bin_.write(tokens.data)
            for digest in (self.digest, own_digest):
                digest.update(tokens.view(np.uint8).data)
            self._count(data, low, tokens)
            self._report(low + len(tokens))
        recorded = corpus.meta.get("bin_digest", own_digest.hexdigest())
        if recorded != own_digest.hexdigest():
            raise DataError(
                "prepare.corpus-damaged",
                f"{corpus.prefix}.bin: its digest differs from that in its .json. Restore it, or prepare it again.",
            )
        _write_at(idx, base + 4 * self.sequences, data.lengths, "<i4", 0)
        _write_at(idx, base + 4 * n + 8 * self.sequences, data.pointers, "<i8", self.tokens * data.dtype.itemsize)
        _write_at(idx, base + 12 * n + 8 * self.boundaries, data.boundaries[1:], "<i8", self.sequences)
        _write_at(idx, base + 12 * n + 8 * d + self.sequences, data.modes, "<i1", 0)
        data.check()
        self.sequences += corpus.sequences
        self.boundaries += corpus.boundaries - 1
        self.tokens += corpus.tokens

    def _count(self, data: IndexedDataset, low: int, tokens: IntArray) -> None:
        if self.why_no_sidecar:
            return
        wrong = (tokens < 0) | (tokens >= len(self.counts))
        if wrong.any():
            k = int(np.argmax(wrong))
            data.vocab_size = len(self.counts)
            raise data.token_error(*data.locate(low + k), int(tokens[k]))
        self.counts += np.bincount(tokens, minlength=len(self.counts))

    def _report(self, tokens: int) -> None:
        if self.progress is not None:
            size, total = self.corpora[0].dtype.itemsize, sum(corpus.tokens for corpus in self.corpora)
            done, elapsed = self.tokens + tokens, time.monotonic() - self.began
            event = ("merge", done * size, total * size, self.sequences, done, elapsed, done * size, done)
            self.progress(ProgressEvent(*event))  # type: ignore[arg-type]


def _write_at(file: IO[bytes], offset: int, values: IntArray, dtype: str, plus: int) -> None:
    file.seek(offset)
    for piece in chunks(len(values)):
        part = values[piece]
        file.write((part + part.dtype.type(plus)).astype(dtype).data)


def _why_no_sidecar(corpora: Sequence[_Corpus]) -> str:
    """Reason why no sidecar can be computed, or ""."""
    without = [corpus.prefix for corpus in corpora if not isinstance(corpus.meta.get("vocab_size"), int)]
    if not without:
        return ""
    more = f" and {len(without) - 1} more" if len(without) > 1 else ""
    return f"{without[0]}{more} of {len(corpora)} corpora have no sidecar, so their tokenizer is unknown"
