"""Cache of tokenizer conversions in ~/.cache/trident-engine/tokenizers, as a conversion takes seconds.

An entry is named by a digest of everything it depends on: the tokenizer's files and their settings, the source code of
the conversion and the versions of its libraries. It begins with a digest of its content, so that a damaged entry is
detected and made again. Least recently used entries are removed. If the folder is unusable, the cache is bypassed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import orjson

_SOURCES = (
    "conversion_cache.py",
    "convert.py",
    "sentencepiece_model.py",
    "tiktoken_ranks.py",
    "patterns.py",
    "equivalence.py",
    "vocabularies.py",
)
_LIBRARIES = ("tokenizers", "sentencepiece", "tiktoken")
_MOST_ENTRIES, _MOST_BYTES = 32, 512 << 20
_TORN_S = 3600.0  # temporary files of killed processes are removed after this time
_DIGEST = 64  # hex digits

Entry = dict[str, str]


def cached(key: Callable[[], str], make: Callable[[], Entry], names: Sequence[str]) -> Entry:
    """The cached entry of `key`, with exactly the fields `names`; otherwise the result of `make`, which is stored."""
    before = key()
    file = folder() / before
    if (entry := _read(file, names)) is not None:
        return entry
    entry = make()
    if key() == before:  # only if no file has changed meanwhile
        _write(file, entry)
    return entry


def folder() -> Path:
    """Folder of the entries; for a user without a home directory a path that cannot be written."""
    try:
        return Path.home() / ".cache" / "trident-engine" / "tokenizers"
    except RuntimeError:
        return Path(os.devnull) / "none"


def key_of(parts: Sequence[bytes]) -> str:
    """Entry name: digest of `parts`, of this source code and of the library versions."""
    hashed = hashlib.sha256()
    sources = [Path(__file__).with_name(name).read_bytes() for name in _SOURCES]
    for part in (*parts, *sources, *(_version(name).encode() for name in _LIBRARIES)):
        hashed.update(len(part).to_bytes(8, "big") + part)
    return hashed.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _read(file: Path, names: Sequence[str]) -> Entry | None:
    try:
        content = file.read_bytes()
        if content[:_DIGEST].decode() != hashlib.sha256(content[_DIGEST:]).hexdigest():
            return None
        entry = orjson.loads(content[_DIGEST:])
    except (OSError, ValueError):
        return None
    if not isinstance(entry, dict) or set(entry) != set(names) or not all(isinstance(v, str) for v in entry.values()):
        return None
    with suppress(OSError):
        os.utime(file)
    return entry


def _write(file: Path, entry: Entry) -> None:
    content = orjson.dumps(entry)
    content = hashlib.sha256(content).hexdigest().encode() + content
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        try:
            with open(descriptor, "wb") as out:
                out.write(content)
            os.replace(temporary, file)
        except OSError:
            os.unlink(temporary)
            raise
        _bound(file.parent)


def _bound(where: Path) -> None:
    """Remove the least recently used entries beyond the limits, and old temporary files of killed processes."""
    entries = []
    for path in where.iterdir():
        status = path.stat()
        if path.suffix == ".tmp":
            if status.st_mtime < time.time() - _TORN_S:
                path.unlink()
        else:
            entries.append((status.st_mtime, status.st_size, path))
    left = _MOST_BYTES
    for number, (_, size, path) in enumerate(sorted(entries, reverse=True)):
        left -= size
        if number >= _MOST_ENTRIES or left < 0:
            path.unlink()
