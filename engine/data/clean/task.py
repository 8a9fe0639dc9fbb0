"""The files that a task of `engine clean` writes: documents with the keys that duplicates are found by, and drops."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
import zstandard

from engine.data.clean.ngrams import MinHash
from engine.data.clean.rules import Place
from engine.data.read.columns import joined
from engine.data.read.formats import plain
from engine.data.read.jsontext import dumps


class PartWriter:
    """The files of a part. `kept.jsonl.zst` has the output's lines; the key files have a row for each of them."""

    def __init__(self, folder: Path, minhash: MinHash, dropped_text: bool):
        self.minhash, self.dropped_text, self.stack = minhash, dropped_text, contextlib.ExitStack()
        raw = self._open(folder / "kept.jsonl.zst")
        self.kept = self.stack.enter_context(zstandard.ZstdCompressor(level=1).stream_writer(raw, closefd=False))
        self.dropped, self.exact, self.places = (
            self._open(folder / name) for name in ("dropped.jsonl", "exact", "places")
        )
        self.bands = [self._open(folder / f"band-{band:02d}") for band in range(minhash.bands)]

    def _open(self, path: Path) -> IO[bytes]:
        return self.stack.enter_context(path.open("wb"))

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def keep(self, text: str, place: Place, file: int, rest: Mapping[str, Any]) -> dict[str, str]:
        """Add a document with its other columns; returns those of them that are renamed, and to what."""
        row, renamed = joined({"text": text, "file": place.file, "record": place.record}, rest)
        self.kept.write(dumps(row, plain) + b"\n")
        data = text.encode()
        self.exact.write(np.frombuffer(xxhash.xxh3_128_digest(data), "<u8").tobytes())
        self.places.write(np.array([file, place.record, len(data)], "<i8").tobytes())
        if self.bands:
            for out, key in zip(self.bands, self.minhash.keys(text).astype("<u8")):
                out.write(key.tobytes())
        return renamed

    def drop(self, reason: str, detail: str, place: Place, text: str) -> None:
        self.dropped.write(drop_line(reason, detail, place, text if self.dropped_text else ""))


def drop_line(reason: str, detail: str, place: Place, text: str) -> bytes:
    """A line of OUTPUT-dropped.jsonl."""
    facts = {"file": place.file, "record": place.record, "reason": reason, "detail": detail, "text": text}
    return dumps({key: value for key, value in facts.items() if value or key in ("file", "record")}) + b"\n"
