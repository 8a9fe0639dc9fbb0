"""Which files are read: paths, folders, globs, URLs and standard input.

The order is the same everywhere: inputs as given, folders and globs sorted.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from engine.errors import DataError

STDIN = "-"
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")


@dataclass(frozen=True)
class InputFile:
    """A file to read. `explicit`: named by the user, so it may not be left out. `stamp` changes with the content."""

    name: str
    explicit: bool
    num_bytes: int  # as stored; 0 for standard input
    stamp: str = ""

    @property
    def compression(self) -> str:
        suffix = PurePosixPath(self.name).suffix.lower()
        return suffix if suffix in COMPRESSIONS else ""

    @property
    def suffix(self) -> str:
        """What the content is, compression aside: ".jsonl" of "a.jsonl.zst"."""
        name = PurePosixPath(self.name)
        return PurePosixPath(name.stem if self.compression else name.name).suffix.lower()


def list_inputs(
    inputs: Sequence[str | Path], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[InputFile]:
    """The files of `inputs` in reading order. `include`: globs on file names; `exclude`: on any part of the path.

    Both apply within folders only; an empty `include` takes all. Raises DataError for an input that does not exist.
    """
    files: list[InputFile] = []
    for given in map(str, inputs):
        if given == STDIN:
            files.append(InputFile(STDIN, True, 0))
        elif "://" in given:
            files.extend(_remote(given, include, exclude))
        elif os.path.isdir(given):
            files.extend(_walk(given, include, exclude))
        elif os.path.isfile(given):
            files.append(_local(given, True))
        elif glob.has_magic(given) and (found := sorted(glob.glob(given, recursive=True))):
            files.extend(_local(path, True) for path in found if os.path.isfile(path))
        else:
            kind = "no file matches this glob" if glob.has_magic(given) else "no such file or folder"
            raise DataError(f"{given}: {kind}. Check the path of this input.")
    if sum(file.name == STDIN for file in files) > 1:
        raise DataError("standard input (-) is given more than once; it can be read only once")
    return files


def _local(path: str, explicit: bool) -> InputFile:
    stat = os.stat(path)
    return InputFile(path, explicit, stat.st_size, str(stat.st_mtime_ns))


def _walk(folder: str, include: Sequence[str], exclude: Sequence[str]) -> Iterator[InputFile]:
    def fail(err: OSError) -> None:
        raise DataError(f"{err.filename}: cannot list this folder: {err.strerror}. Exclude it or fix its permissions.")

    for root, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not _matches(name, exclude))
        for name in sorted(names):
            path = os.path.join(root, name)
            if (not include or _matches(name, include)) and not _matches(name, exclude) and os.path.isfile(path):
                yield _local(path, False)


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in globs)


def _remote(url: str, include: Sequence[str], exclude: Sequence[str]) -> Iterator[InputFile]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        if glob.has_magic(path):
            facts, explicit = system.glob(path, detail=True), True
        elif system.isdir(path):
            facts, explicit = system.find(path, detail=True), False
        else:
            facts, explicit = {path: system.info(path)}, True
    except ImportError as err:
        raise DataError(f"{url}: {err}. Install the package that fsspec names for this kind of URL.") from err
    except FileNotFoundError as err:
        raise DataError(f"{url}: no such file or folder. Check the URL of this input.") from err
    except Exception as err:  # every storage library has errors of its own
        raise DataError(f"{url}: cannot be listed: {type(err).__name__}: {err}. Check the URL and access.") from err
    if not facts:
        raise DataError(f"{url}: no file there. Check the URL of this input.")
    for found in sorted(facts):
        info = facts[found]
        parts = PurePosixPath(found.removeprefix(path)).parts
        wanted = explicit or (
            (not include or _matches(parts[-1], include)) and not any(_matches(part, exclude) for part in parts)
        )
        if wanted and info.get("type", "file") == "file":
            stamp = next((info[key] for key in ("ETag", "mtime", "LastModified", "updated") if info.get(key)), "")
            yield InputFile(system.unstrip_protocol(found), explicit, int(info.get("size") or 0), str(stamp))
