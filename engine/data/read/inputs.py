"""Lists the input files: paths, folders, globs, URLs, pipes and standard input.

The order is deterministic: inputs as given, folders and globs sorted. Nothing disappears: each entry of a folder or
glob that is not read is listed with a drop that gives the reason, except for the names excluded by --include and
--exclude, which are only counted.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import itertools
import os
import stat as modes
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from engine.data.read import own
from engine.data.read.document_batch import DroppedItem
from engine.data.read.globs import Glob
from engine.errors import DataError

STDIN = "-"
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_KINDS = {
    modes.S_IFIFO: "a pipe",
    modes.S_IFSOCK: "a socket",
    modes.S_IFCHR: "a device",
    modes.S_IFBLK: "a device",
    modes.S_IFDIR: "a folder",
}


@dataclass(frozen=True)
class InputFile:
    """A file to read. `explicit`: named by the user, so it may not be skipped. `stamp` changes with the content.

    `once`: a pipe or standard input, which cannot be read again. `drop`: why it is not read, None if it is. `same_as`:
    the name under which the same file was listed before.
    """

    name: str
    explicit: bool
    num_bytes: int  # as stored; 0 for a pipe
    stamp: str = ""
    once: bool = False
    drop: DroppedItem | None = None
    same_as: str = ""

    @property
    def compression(self) -> str:
        suffix = os.path.splitext(self.name)[1].lower()
        return suffix if suffix in COMPRESSIONS else ""

    @property
    def suffix(self) -> str:
        """Suffix without that of the compression: ".jsonl" for "a.jsonl.zst"."""
        return os.path.splitext(self.name[: len(self.name) - len(self.compression)])[1].lower()


@dataclass(frozen=True)
class Listing:
    """The files in reading order, and how many names in folders --include and --exclude excluded."""

    files: tuple[InputFile, ...]
    excluded: int


def list_inputs(
    inputs: Sequence[str | Path],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    own_files: own.OwnFiles | None = None,
) -> Listing:
    """The files of `inputs`. `include`: globs on file names; `exclude`: on any part of the path.

    Both apply within folders only; an empty `include` matches everything. `own_files`: files that this command writes,
    which are not read. Raises DataError for an input that does not exist, is not a file, can be read only once but is
    given twice, or is also an output.
    """
    lister = _Lister(include, exclude, own_files or own.OwnFiles())
    files = [file for given in map(str, inputs) for file in lister.files_of(given)]
    found = [file.name for file in files if not file.explicit and file.drop is None and "://" not in file.name]
    if found:
        read = [file.name for file in files if file.drop is None and "://" not in file.name]
        copies = {copy: f"the cleaned text of {other}, which is read" for copy, other in own.cleaned_copies(read)}
        copies = {name: copies[name] for name in found if name in copies}
        files = [
            _skipped_file(file.name, own.REASON, copies[file.name]) if file.name in copies else file for file in files
        ]
    return Listing(tuple(files), lister.excluded)


def _skipped_file(name: str, reason: str, detail: str, stops: bool = False) -> InputFile:
    return InputFile(name, False, 0, drop=DroppedItem(name, 0, reason, detail, stops))


class _Lister:
    """Lists the files of one input after another."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str], own_files: own.OwnFiles):
        self.include, self.exclude = include, exclude
        self.excluded = 0
        self._own_reasons = own_files.reasons_by_file()
        self._first: dict[object, str] = {}  # identity of a file -> name under which it was listed first

    def files_of(self, given: str) -> Iterator[InputFile]:
        """The files of one input."""
        if given == STDIN:
            yield self._new(InputFile(STDIN, True, 0, once=True), STDIN)
        elif "://" in given:
            yield from self._remote(given)
        elif os.path.isdir(given):
            yield from self._walk(given)
        elif os.path.lexists(given) or not glob.has_magic(given):
            yield self._named(given)
        else:
            yield from self._glob(given)

    def _glob(self, given: str) -> Iterator[InputFile]:
        """The files that match a glob, and the folders that could not be listed."""
        search = Glob()
        found = search.paths(given)
        if not found and not search.errors:
            raise DataError("read.no-match", f"{given}: no file matches this glob. Check the path of this input.")
        for folder, paths in itertools.groupby(found, os.path.dirname):
            names = _names_in(folder or ".")
            for path in paths:
                yield from self._classify(path, names, _stat(path), explicit=True)
        for path, why in search.linked:
            yield _skipped_file(path, "linked folder", why)
        for path, why in search.errors:
            yield _skipped_file(path, "cannot be read", why, stops=True)

    def _new(self, file: InputFile, identity: object) -> InputFile:
        """The file, with `same_as` set if it was listed before. Raises DataError for a second use of a pipe."""
        first = self._first.get(identity)
        if first is not None and file.once:
            raise DataError("read.given-twice", f"{_shown(file)} is given more than once; it can be read only once")
        self._first.setdefault(identity, file.name)
        return file if first is None else replace(file, same_as=first)

    def _local(self, path: str, stat: os.stat_result, explicit: bool) -> InputFile:
        if modes.S_ISFIFO(stat.st_mode):
            file = InputFile(path, explicit, 0, once=True)
        else:
            file = InputFile(path, explicit, stat.st_size, str(stat.st_mtime_ns))
        return self._new(file, (stat.st_dev, stat.st_ino) if stat.st_ino else os.path.realpath(path))

    def _named(self, path: str) -> InputFile:
        try:
            stat = os.stat(path)
        except (OSError, ValueError) as err:
            if os.path.islink(path):
                raise DataError(
                    "read.broken-link", f"{path}: a broken link: {_broken(path)}. Fix it, or give another input."
                ) from err
            if not isinstance(err, OSError) or err.errno in (errno.ENOENT, errno.ENOTDIR):
                raise DataError(
                    "read.not-found", f"{path}: no such file or folder. Check the path of this input."
                ) from err
            raise DataError(
                "read.not-accessible", f"{path}: {err.strerror}. Check the path and permissions of this input."
            ) from err
        if not modes.S_ISREG(stat.st_mode) and not modes.S_ISFIFO(stat.st_mode):
            kind = _KINDS.get(modes.S_IFMT(stat.st_mode), "not a file")
            raise DataError(
                "read.not-a-file", f"{path}: is {kind}, which cannot be read as text. Give a file, a pipe or a folder."
            )
        if self._own_reasons.get((stat.st_dev, stat.st_ino)):
            raise DataError(
                "read.input-is-output",
                f"{path} is an input and would be written too. Choose an output outside the inputs.",
            )
        return self._local(path, stat, True)

    def _walk(self, top: str) -> Iterator[InputFile]:
        """The files of a folder and then of its subfolders. Follows links; visits each folder once."""
        read: dict[tuple[int, int], str] = {}
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            try:
                stat = os.stat(folder)
                if (first := read.setdefault((stat.st_dev, stat.st_ino), folder)) != folder:
                    yield _skipped_file(folder, "linked folder", f"the same as {first}, which is read")
                    continue
                names = set(os.listdir(folder))
            except OSError as err:
                detail = f"cannot list this folder: {err.strerror}. Exclude it or fix its permissions."
                yield _skipped_file(folder, "cannot be read", detail, stops=True)
                continue
            inside = []
            for name in sorted(names):
                path = os.path.join(folder, name)
                if _matches(name, self.exclude):
                    self.excluded += 1
                    continue
                status = _stat(path)
                if isinstance(status, OSError) or not modes.S_ISDIR(status.st_mode):
                    yield from self._classify(path, names, status, explicit=False)
                elif (reason := self._own_file_reason(path, status, names)) is None:
                    inside.append(path)
                elif reason:
                    yield _skipped_file(path, own.REASON, reason)
            waiting += reversed(inside)

    def _classify(
        self, path: str, names: Set[str], stat: os.stat_result | OSError, explicit: bool
    ) -> Iterator[InputFile]:
        """The file at a path of a folder or glob, or why it is not read; nothing if --include excludes it."""
        if not explicit and self.include and not _matches(os.path.basename(path), self.include):
            self.excluded += 1
        elif isinstance(stat, OSError):
            if os.path.islink(path) and stat.errno != errno.EACCES:
                yield _skipped_file(path, "broken link", _broken(path))
            elif stat.errno == errno.ENOENT:
                yield _skipped_file(path, "gone", "it was removed while the folder was listed")
            else:
                yield _skipped_file(path, "cannot be read", f"{stat.strerror}; check its permissions", stops=True)
        elif (reason := self._own_file_reason(path, stat, names)) is not None:
            if reason:
                yield _skipped_file(path, own.REASON, reason)
        elif not modes.S_ISREG(stat.st_mode):
            kind = _KINDS.get(modes.S_IFMT(stat.st_mode), "something else")
            named = modes.S_ISFIFO(stat.st_mode) or modes.S_ISDIR(stat.st_mode)
            hint = "; to read it, give it as an input" if named else ""
            yield _skipped_file(path, "no regular file", f"it is {kind}{hint}")
        else:
            yield self._local(path, stat, explicit)

    def _own_file_reason(self, path: str, stat: os.stat_result, names: Set[str]) -> str | None:
        """Why a file or folder that the engine wrote is skipped, "" to skip it silently; None: any other file."""
        if (detail := self._own_reasons.get((stat.st_dev, stat.st_ino))) is not None:
            return detail
        return own.describe_engine_file(*os.path.split(path), names) or None

    def _remote(self, url: str) -> Iterator[InputFile]:
        import fsspec

        try:
            system, path = fsspec.core.url_to_fs(url)
            if glob.has_magic(path):
                entries, explicit = system.glob(path, detail=True), True
            elif system.isdir(path):
                entries, explicit = system.find(path, detail=True), False
            else:
                entries, explicit = {path: system.info(path)}, True
        except ImportError as err:
            raise DataError(
                "read.url-library-missing", f"{url}: {err}. Install the package that fsspec names for this kind of URL."
            ) from err
        except FileNotFoundError as err:
            raise DataError("read.not-found", f"{url}: no such file or folder. Check the URL of this input.") from err
        except Exception as err:  # every storage library raises its own exceptions
            raise DataError(
                "read.url-not-listed",
                f"{url}: cannot be listed: {type(err).__name__}: {err}. Check the URL and access.",
            ) from err
        if not entries:
            raise DataError("read.not-found", f"{url}: no file found. Check the URL of this input.")
        for found in sorted(entries):
            info: dict[str, Any] = entries[found]
            parts = PurePosixPath(found.removeprefix(path)).parts
            name, kind = system.unstrip_protocol(found), info.get("type", "file")
            if not explicit and (
                (self.include and not _matches(parts[-1], self.include))
                or any(_matches(part, self.exclude) for part in parts)
            ):
                self.excluded += 1
            elif kind == "file":
                stamp = next((info[key] for key in ("ETag", "mtime", "LastModified", "updated") if info.get(key)), "")
                yield self._new(InputFile(name, explicit, int(info.get("size") or 0), str(stamp)), _identity(name))
            elif kind != "directory" or "**" not in url:
                yield _skipped_file(name, "no regular file", f"it is a {kind}; to read it, give it as an input")


def _identity(url: str) -> object:
    """Identity of the file at a URL; (device, inode) for a local file."""
    try:
        stat = os.stat(url.removeprefix("file://")) if url.startswith("file://") else None
    except OSError:
        stat = None
    return url if stat is None else (stat.st_dev, stat.st_ino)


def _stat(path: str) -> os.stat_result | OSError:
    try:
        return os.stat(path)
    except OSError as err:
        return err


def _names_in(folder: str) -> Set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return frozenset()


def _broken(path: str) -> str:
    """Description of a link whose target does not exist."""
    try:
        target = os.readlink(path)
    except OSError:
        target = "?"
    return f"it points to {target}"


def _shown(file: InputFile) -> str:
    return "standard input (-)" if file.name == STDIN else file.name


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in globs)
