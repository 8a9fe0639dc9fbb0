"""Documents from files and folders, in an order that is the same everywhere: as given, folders sorted.

`.jsonl` is one document a line; any other file is one document, UTF-8. A file somebody named has to be readable; in a
folder, what is not text is skipped, and counted under its reason, so that nothing disappears in silence.
"""

from __future__ import annotations

import fnmatch
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from engine.errors import DataError

MAX_FILE_BYTES = 1 << 28  # of one document: beyond it a file is a dump of something, not a text
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """One text, where it is from (path, or path:line) and the bytes of input it took."""

    text: str
    source: str
    input_bytes: int


@dataclass(frozen=True)
class SourceFile:
    """A file to read. `explicit`: named by the user, so it may not be skipped."""

    path: Path
    explicit: bool
    num_bytes: int


def list_files(inputs: Sequence[Path], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[SourceFile]:
    """The files of `inputs` in reading order. `include`: globs on file names; `exclude`: on any part of the path.

    Both apply within folders only; an empty `include` takes all. Raises DataError for an input that does not exist.
    """
    files: list[SourceFile] = []
    for given in inputs:
        if given.is_dir():
            files.extend(_walk(given, include, exclude))
        elif given.is_file():
            files.append(SourceFile(given, True, given.stat().st_size))
        else:
            raise DataError(f"{given}: no such file or folder. Check the path of this input.")
    return files


def _walk(folder: Path, include: Sequence[str], exclude: Sequence[str]) -> Iterator[SourceFile]:
    def fail(err: OSError) -> None:
        raise DataError(f"{err.filename}: cannot list this folder: {err.strerror}. Exclude it or fix its permissions.")

    for root, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not _matches(name, exclude))
        for name in sorted(names):
            path = Path(root) / name
            if (not include or _matches(name, include)) and not _matches(name, exclude) and path.is_file():
                yield SourceFile(path, False, path.stat().st_size)


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def documents(
    inputs: Sequence[Path],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    json_key: str = "text",
    max_file_bytes: int = MAX_FILE_BYTES,
    skipped: Counter[str] | None = None,
) -> Iterator[Document]:
    """Every document of `inputs`; adds to `skipped` one for each file or line left out, by reason.

    Raises DataError, with file and line and a repair, for malformed JSON, a missing `json_key`, a value that is not a
    string, and a file named explicitly that is not UTF-8 or exceeds `max_file_bytes`.
    """
    skipped = Counter() if skipped is None else skipped
    for file in list_files(inputs, include, exclude):
        if file.path.suffix == ".jsonl":
            yield from _lines(file.path, json_key, max_file_bytes, skipped)
        else:
            document = _whole(file, max_file_bytes, skipped)
            if document is not None:
                yield document


def _lines(path: Path, key: str, max_bytes: int, skipped: Counter[str]) -> Iterator[Document]:
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                body = line.removeprefix(_BOM) if number == 1 else line
                if not body.strip():
                    skipped["blank line in .jsonl"] += 1
                    continue
                if len(line) > max_bytes:
                    raise DataError(f"{path}:{number}: line of {len(line)} bytes; raise max_file_bytes = {max_bytes}")
                yield Document(_parse(body, f"{path}:{number}", key), f"{path}:{number}", len(line))
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror or err}. Check its permissions.") from err


def _parse(line: bytes, where: str, key: str) -> str:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as err:
        raise DataError(
            f"{where}: malformed JSON: {err}. Every line has to be one complete JSON object in UTF-8; "
            f"repair or delete this line (the last one is often torn by an interrupted copy)."
        ) from err
    if not isinstance(value, dict):
        raise DataError(f'{where}: expected a JSON object like {{"{key}": "..."}}, found {type(value).__name__}.')
    if key not in value:
        keys = ", ".join(sorted(value)[:8]) or "none"
        raise DataError(f"{where}: no key {key!r}. The keys here are: {keys}; choose one of them as json_key.")
    text = value[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: {key!r} is {type(text).__name__}, expected a string. Choose another json_key.")
    return text


def _whole(file: SourceFile, max_bytes: int, skipped: Counter[str]) -> Document | None:
    """The file as a document, or None when it was skipped and counted."""
    if file.num_bytes > max_bytes:
        reason, repair = f"larger than max_file_bytes = {max_bytes}", "Raise it, or convert the file to .jsonl."
    else:
        try:
            raw = file.path.read_bytes()
            # A byte order mark says how the text is stored; it is not part of it.
            return Document(raw.removeprefix(_BOM).decode("utf-8"), str(file.path), len(raw))
        except UnicodeDecodeError as err:
            reason, repair = "not UTF-8", f"Byte {err.start} is {err.object[err.start]:#04x}; convert or unpack it."
        except OSError as err:
            reason, repair = "cannot be read", f"{err.strerror or err}; check its permissions."
    if file.explicit:
        raise DataError(f"{file.path}: {reason}. {repair}")
    skipped[reason] += 1
    return None
