"""Work folder of `prepare`: data files committed in shards, so that a killed command resumes without half-written data.

`PREFIX.parts/` holds append-only data files, `settings.json`, and a small `NNNNNNNN.json` for each finished shard: the
byte range of every data file with its digest, and the caller's state (position in the input, all counts).

A commit is safe by its order: sync the data files; write the shard file under another name, sync and rename it; sync
the folder. So bytes are valid only if a shard file covers them. On resuming, every shard is verified by its digests,
everything after the last valid one is truncated, and the work continues there with the same bytes as an undisturbed
run.

Settings, lock and publishing are those of every work folder (engine/data/workfolder.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import xxhash

from engine.data.prepare.pack import pack
from engine.data.samples.index_file import write_index
from engine.data.samples.indexed_writer import token_dtype
from engine.data.samples.sidecar import sidecar_bytes, sidecar_of
from engine.data.workfolder import WorkFolder, read_work_json
from engine.errors import DataError
from engine.util.files import sync_file, sync_folder, write_synced

_CHECK_BYTES = _WRITEBACK_BYTES = 8 << 20
_SKIPPED = "skipped.jsonl"


class _DataFile:
    """An append-only data file: the committed bytes, and the bytes appended since with their digest."""

    def __init__(self, path: Path):
        self.path = path
        self.committed = self.end = 0
        self.digest = xxhash.xxh3_128()  # of the bytes since the last commit
        self.file_digest = self.file_digest_committed = xxhash.xxh3_128()  # of the file to `end`, and to `committed`
        self.file: IO[bytes] = open(path, "ab")  # noqa: SIM115  (closed by Shards.close)
        self._writeback_end = 0

    def write(self, data: memoryview | bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.file_digest.update(data)
        self.end += memoryview(data).nbytes
        if self.end - self._writeback_end >= _WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
            # Makes Linux start writing dirty pages, so that the sync at the end of a shard waits for little.
            os.posix_fadvise(
                self.file.fileno(), self._writeback_end, self.end - self._writeback_end, os.POSIX_FADV_DONTNEED
            )
            self._writeback_end = self.end

    def commit(self) -> None:
        """Mark all bytes so far as part of a shard."""
        self.committed, self.digest, self.file_digest_committed = self.end, xxhash.xxh3_128(), self.file_digest.copy()

    def reset(self, committed: int) -> None:
        """Truncate to `committed` bytes: those of all shards, or 0."""
        self.file.close()
        os.truncate(self.path, committed)
        self.file = open(self.path, "ab")  # noqa: SIM115
        self.committed = self.end = self._writeback_end = committed
        self.digest = xxhash.xxh3_128()
        self.file_digest_committed = self.file_digest_committed if committed else xxhash.xxh3_128()
        self.file_digest = self.file_digest_committed.copy()


class Shards(WorkFolder):
    """The open work folder of `prepare`.

    state: the caller's state at the last commit, None before the first. warnings: messages about invalid shards.
    counts[split]: int64 [vocab_size], histogram of the tokens so far.
    """

    def __init__(self, folder: Path, splits: Sequence[str]):
        self.splits = tuple(splits)
        self.warnings: list[str] = []
        self.state: dict[str, Any] | None = None
        self.num_shards = 0
        self._files: dict[str, _DataFile] = {}
        super().__init__(folder, "prepare")

    def close(self) -> None:
        for data_file in self._files.values():
            with contextlib.suppress(OSError):  # closing flushes, which on a full disk fails a second time
                data_file.file.close()
        self._files.clear()
        super().close()

    def resume_hint(self) -> str:
        return f"Give the same command again: it resumes after the {self.num_shards} finished shards."

    def release_space(self) -> int:
        """Truncate uncommitted data, which the resumed command writes again; returns the bytes needed to finish."""
        needed = self.bytes_needed()
        for data_file in self._files.values():
            with contextlib.suppress(OSError):  # closing flushes, which on a full disk fails a second time
                data_file.file.close()
            with contextlib.suppress(OSError):
                os.truncate(data_file.path, data_file.committed)
        return needed

    def open(self, vocab_size: int) -> None:
        """Open the data files at the end of the last valid shard; verifies all shards."""
        self.dtype = token_dtype(vocab_size)
        names = [f"{split}.{kind}" for split in self.splits for kind in ("bin", "lengths")] + [_SKIPPED]
        with self.disk_errors(self.folder):
            self._files = {name: _DataFile(self.folder / name) for name in names}
        self.counts = {split: np.zeros(vocab_size, np.int64) for split in self.splits}
        while self._verify_next_shard():
            pass
        discarded = sorted((path for path in self._shard_files() if int(path.stem) > self.num_shards), reverse=True)
        for path in discarded:
            path.unlink()
        if discarded:
            self.warnings.append(f"{self.folder}: shard {self.num_shards + 1} and all later ones are made again")
        for data_file in self._files.values():
            data_file.reset(data_file.committed)

    def restart(self) -> None:
        """Delete all shards, because their content may be wrong."""
        for path in sorted(self._shard_files(), reverse=True):  # last first: after a kill, the rest is still valid
            path.unlink()
        sync_folder(self.folder)
        for data_file in self._files.values():
            data_file.reset(0)
        for counts in self.counts.values():
            counts[:] = 0
        self.state, self.num_shards = None, 0

    def add(
        self,
        split: str,
        tokens: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int32],
        eod: int | None = None,
    ) -> npt.NDArray[np.int32]:
        """Append documents: tokens int32 [T] (concatenated) and lengths int32 [documents].

        eod: appended to every non-empty document. Returns the lengths as written, int32 [documents].
        """
        packed, written, wrong = pack(tokens, lengths, eod, self.dtype, self.counts[split])
        if wrong is not None:
            text = f"the tokenizer returned id {wrong}, which is not in [0, {len(self.counts[split])}). Report this."
            raise DataError("prepare.id-outside-the-vocabulary", text)
        self._append(f"{split}.bin", packed.data)
        self._append(f"{split}.lengths", written.data)
        return written

    def add_skipped(self, line: bytes) -> None:
        """Append a line to the list of skipped inputs."""
        self._append(_SKIPPED, line)

    def _append(self, name: str, data: memoryview | bytes) -> None:
        with self.disk_errors(self.folder / name):
            self._files[name].write(data)

    @property
    def uncommitted_bytes(self) -> int:
        return sum(data_file.end - data_file.committed for data_file in self._files.values())

    @property
    def total_bytes(self) -> int:
        return sum(data_file.end for data_file in self._files.values())

    def commit(self, state: dict[str, Any]) -> None:
        """Make all appended data and `state` durable as a new shard."""
        with self.disk_errors(self.folder):
            for data_file in self._files.values():
                if data_file.end > data_file.committed:
                    sync_file(data_file.file)
        ranges = {name: [g.committed, g.end, g.digest.hexdigest()] for name, g in self._files.items()}
        self.write_json(f"{self.num_shards + 1:08d}.json", {"files": ranges, "state": state})
        self.num_shards += 1
        self.state = state
        for data_file in self._files.values():
            data_file.commit()

    def has_shards(self) -> bool:
        """Whether finished shards exist, verified or not."""
        return bool(self._shard_files())

    def _shard_files(self) -> list[Path]:
        return [path for path in self.folder.glob("*.json") if path.stem.isdigit()]

    def _verify_next_shard(self) -> bool:
        """Verify the next shard by its digests and count its tokens. False if there is none or it is invalid."""
        path = self.folder / f"{self.num_shards + 1:08d}.json"
        try:
            shard = read_work_json(path)
        except DataError as err:
            self.warnings.append(str(err))
            return False
        if shard is None:
            return False
        actual = {name: self._digest(name, begin, end) for name, (begin, end, _) in shard["files"].items()}
        wrong = [name for name, (begin, _, digest) in shard["files"].items() if actual[name][0] != digest]
        wrong += [name for name, (begin, _, _) in shard["files"].items() if begin != self._files[name].committed]
        if wrong:
            self.warnings.append(f"{path}: {', '.join(wrong)} differs from the digest")
            return False
        for name, (_, end, _) in shard["files"].items():
            self._files[name].committed, self._files[name].file_digest_committed = end, actual[name][2]
            if actual[name][1] is not None:
                self.counts[name.removesuffix(".bin")] += actual[name][1]
        self.state, self.num_shards = shard["state"], self.num_shards + 1
        return True

    def _digest(self, name: str, begin: int, end: int) -> tuple[str, Any, Any]:
        """(Digest of bytes [begin, end) of a data file, histogram if it holds tokens, running hash of [0, end))."""
        digest, whole = xxhash.xxh3_128(), self._files[name].file_digest_committed.copy()
        counts = np.zeros_like(self.counts[name.removesuffix(".bin")]) if name.endswith(".bin") else None
        with open(self.folder / name, "rb") as file:
            file.seek(begin)
            while begin < end and (data := file.read(min(_CHECK_BYTES, end - begin))):
                begin += len(data)
                digest.update(data)
                whole.update(data)
                if counts is not None and len(data) % self.dtype.itemsize == 0:
                    tokens = np.frombuffer(data, self.dtype)
                    if int(tokens.min()) < 0 or int(tokens.max()) >= len(counts):
                        return "no token ids", None, whole
                    counts += np.bincount(tokens, minlength=len(counts))
        return digest.hexdigest(), counts, whole

    # ---- final files ----

    def write_corpus(self, split: str, meta: dict[str, Any], documents: int, empty: int) -> dict[str, Any]:
        """Write .idx and sidecar of a split next to its .bin; returns the sidecar."""
        meta = {**meta, "bin_digest": self._files[f"{split}.bin"].file_digest.hexdigest()}
        sidecar = sidecar_of(meta, self.dtype, self.counts[split], documents, empty)
        lengths_path = self.folder / f"{split}.lengths"
        lengths = np.memmap(lengths_path, "<i4", "r") if lengths_path.stat().st_size else np.empty(0, np.int32)
        with self.disk_errors(self.folder / f"{split}.idx"):
            with open(self.folder / f"{split}.idx", "wb") as out:
                write_index(out, self.dtype, lengths)
                sync_file(out)
            write_synced(self.folder / f"{split}.json", sidecar_bytes(sidecar))
        return sidecar
