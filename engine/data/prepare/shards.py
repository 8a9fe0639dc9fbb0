"""Work in progress of `prepare`: a folder from which it goes on after a kill, and never anything half-written.

`PREFIX.parts/` holds data files that only grow, `settings.json`, and one small `NNNNNNNN.json` for each finished shard:
how far every data file goes and the digest of the bytes added, the caller's state (where reading goes on, all counts).

Order of a commit, which is what makes it safe: data files synced; shard file written under another name, synced,
renamed; folder synced. So bytes count only if a shard file says so. On resuming, every shard is checked by its digests,
what lies behind the last good one is cut off, and the work goes on there, with the same bytes as if never disturbed.

Settings, lock and publishing are those of any work folder (engine/data/workfolder.py).
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
    """A data file: what was committed, and what was added since with its digest."""

    def __init__(self, path: Path):
        self.path = path
        self.committed = self.end = 0
        self.digest = xxhash.xxh3_128()  # of what was added since the last commit
        self.file_digest = self.file_digest_committed = xxhash.xxh3_128()  # of the file to `end`, and to `committed`
        self.file: IO[bytes] = open(path, "ab")  # noqa: SIM115  (closed by Shards.close)
        self._writeback_end = 0

    def write(self, data: memoryview | bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.file_digest.update(data)
        self.end += memoryview(data).nbytes
        if self.end - self._writeback_end >= _WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
            # Linux begins to write what is not on the disk yet; the sync that ends a shard then waits for little.
            os.posix_fadvise(
                self.file.fileno(), self._writeback_end, self.end - self._writeback_end, os.POSIX_FADV_DONTNEED
            )
            self._writeback_end = self.end

    def commit(self) -> None:
        """Everything so far is in a shard."""
        self.committed, self.digest, self.file_digest_committed = self.end, xxhash.xxh3_128(), self.file_digest.copy()

    def reset(self, committed: int) -> None:
        """Go back to what is committed, or to 0: nothing."""
        self.file.close()
        os.truncate(self.path, committed)
        self.file = open(self.path, "ab")  # noqa: SIM115
        self.committed = self.end = self._writeback_end = committed
        self.digest = xxhash.xxh3_128()
        self.file_digest_committed = self.file_digest_committed if committed else xxhash.xxh3_128()
        self.file_digest = self.file_digest_committed.copy()


class Shards(WorkFolder):
    """The open folder of `prepare`.

    `state`: what the last commit kept, None at the start; `warnings`: shards that were not good.
    `counts[split]` int64 [vocab_size]: histogram of the tokens so far.
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
        return f"Give the same command again: it goes on behind the {self.num_shards} shards that are finished."

    def release_space(self) -> int:
        """What is not committed is given back: it is made again, and what is then free is told."""
        needed = self.bytes_needed()
        for data_file in self._files.values():
            with contextlib.suppress(OSError):  # closing flushes, which on a full disk fails a second time
                data_file.file.close()
            with contextlib.suppress(OSError):
                os.truncate(data_file.path, data_file.committed)
        return needed

    def open(self, vocab_size: int) -> None:
        """Open the data files behind the last good shard."""
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
            self.warnings.append(f"{self.folder}: everything from shard {self.num_shards + 1} on is made again")
        for data_file in self._files.values():
            data_file.reset(data_file.committed)

    def restart(self) -> None:
        """Forget all shards: what they hold is not to be trusted."""
        for path in sorted(self._shard_files(), reverse=True):  # from the end: a kill leaves a shorter, whole beginning
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
        """Append documents: their tokens one after the other, int32 [T], and lengths int32 [documents].

        `eod` is put behind each that is not empty. Returns the lengths as written, int32 [documents].
        """
        packed, written, wrong = pack(tokens, lengths, eod, self.dtype, self.counts[split])
        if wrong is not None:
            text = f"the tokenizer gave id {wrong}, not in [0, {len(self.counts[split])})"
            raise DataError("prepare.id-outside-the-vocabulary", text)
        self._append(f"{split}.bin", packed.data)
        self._append(f"{split}.lengths", written.data)
        return written

    def add_skipped(self, line: bytes) -> None:
        """Append a line to the list of what was left out."""
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
        """Make everything added so far, and `state`, last."""
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
        """Whether there are finished shards, looked at or not."""
        return bool(self._shard_files())

    def _shard_files(self) -> list[Path]:
        return [path for path in self.folder.glob("*.json") if path.stem.isdigit()]

    def _verify_next_shard(self) -> bool:
        """Check the next shard by its digests and count its tokens. False: there is none, or it is not good."""
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
            self.warnings.append(f"{path}: {', '.join(wrong)} is not what was written")
            return False
        for name, (_, end, _) in shard["files"].items():
            self._files[name].committed, self._files[name].file_digest_committed = end, actual[name][2]
            if actual[name][1] is not None:
                self.counts[name.removesuffix(".bin")] += actual[name][1]
        self.state, self.num_shards = shard["state"], self.num_shards + 1
        return True

    def _digest(self, name: str, begin: int, end: int) -> tuple[str, Any, Any]:
        """Digest of bytes of a data file, for tokens their histogram, and the hash of the file up to their end."""
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

    # ---- the end ----

    def write_corpus(self, split: str, meta: dict[str, Any], documents: int, empty: int) -> dict[str, Any]:
        """Write .idx and sidecar of a split beside its .bin; returns the sidecar."""
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
