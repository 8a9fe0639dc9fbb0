"""Which files are read: paths, folders, globs, URLs, pipes and standard input.

The order is the same everywhere: inputs as given, folders and globs sorted. Nothing vanishes: what a folder or a glob
has and is not read stands in the list with the drop that says why, but for what --include and --exclude leave out,
which is counted.
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
from engine.data.read.document_batch import Drop
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
    """A file to read. `explicit`: named by the user, so it may not be left out. `stamp` changes with the content.

    `once`: a pipe or standard input, which cannot be read again. `drop`: it is not read, for this reason. `same_as`:
    the name under which the same file was listed before.
    """

    name: str
    explicit: bool
    num_bytes: int  # as stored; 0 for a pipe
    stamp: str = ""
    once: bool = False
    drop: Drop | None = None
    same_as: str = ""

    @property
    def compression(self) -> str:
        suffix = os.path.splitext(self.name)[1].lower()
        return suffix if suffix in COMPRESSIONS else ""

    @property
    def suffix(self) -> str:
        """What the content is, compression aside: ".jsonl" of "a.jsonl.zst"."""
        return os.path.splitext(self.name[: len(self.name) - len(self.compression)])[1].lower()


@dataclass(frozen=True)
class Listing:
    """The files in reading order; and how many names in folders --include and --exclude left out."""

    files: tuple[InputFile, ...]
    excluded: int


def list_inputs(
    inputs: Sequence[str | Path],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    mine: own.Own | None = None,
) -> Listing:
    """The files of `inputs`. `include`: globs on file names; `exclude`: on any part of the path.

    Both apply within folders only; an empty `include` takes all. `mine`: what the call writes itself. Raises DataError
    for an input that is not there, that is no file, that can be read only once and is given twice, or that is written.
    """
    lister = _Lister(include, exclude, mine or own.Own())
    files = [file for given in map(str, inputs) for file in lister.files_of(given)]
    found = [file.name for file in files if not file.explicit and file.drop is None and "://" not in file.name]
    if found:
        read = [file.name for file in files if file.drop is None and "://" not in file.name]
        copies = {copy: f"the cleaned text of {other}, which is read" for copy, other in own.cleaned_copies(read)}
        copies = {name: copies[name] for name in found if name in copies}
        files = [_left_out(file.name, own.REASON, copies[file.name]) if file.name in copies else file for file in files]
    return Listing(tuple(files), lister.excluded)


def _left_out(name: str, reason: str, detail: str, stops: bool = False) -> InputFile:
    return InputFile(name, False, 0, drop=Drop(name, 0, reason, detail, stops))


class _Lister:
    """Lists one input after the other."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str], mine: own.Own):
        self.include, self.exclude = include, exclude
        self.excluded = 0
        self._mine = mine.details()
        self._first: dict[object, str] = {}  # identity of a file -> the name it was listed under first

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
        """What a glob matches, and the folders that it could not look into."""
        looked = Glob()
        found = looked.paths(given)
        if not found and not looked.errors:
            raise DataError("read.no-match", f"{given}: no file matches this glob. Check the path of this input.")
        for folder, paths in itertools.groupby(found, os.path.dirname):
            names = _names_in(folder or ".")
            for path in paths:
                yield from self._found(path, names, _look(path), explicit=True)
        for path, why in looked.linked:
            yield _left_out(path, "linked folder", why)
        for path, why in looked.errors:
            yield _left_out(path, "cannot be read", why, stops=True)

    def _new(self, file: InputFile, identity: object) -> InputFile:
        """The file, with the name of the same file before it."""
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
                    "read.broken-link", f"{path}: a broken link: {_broken(path)}. Repair it, or give another input."
                ) from err
            if not isinstance(err, OSError) or err.errno in (errno.ENOENT, errno.ENOTDIR):
                raise DataError(
                    "read.not-found", f"{path}: no such file or folder. Check the path of this input."
                ) from err
            raise DataError(
                "read.not-accessible", f"{path}: {err.strerror}. Check the path and permissions of this input."
            ) from err
        if not modes.S_ISREG(stat.st_mode) and not modes.S_ISFIFO(stat.st_mode):
            kind = _KINDS.get(modes.S_IFMT(stat.st_mode), "no file")
            raise DataError(
                "read.not-a-file", f"{path}: is {kind}, which cannot be read as text. Give a file, a pipe or a folder."
            )
        if self._mine.get((stat.st_dev, stat.st_ino)):
            raise DataError(
                "read.input-is-output",
                f"{path} is an input and would be written too. Choose an output outside the inputs.",
            )
        return self._local(path, stat, True)

    def _walk(self, top: str) -> Iterator[InputFile]:
        """The files of a folder, then those of the folders in it, links followed; each folder once."""
        read: dict[tuple[int, int], str] = {}
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            try:
                stat = os.stat(folder)
                if (first := read.setdefault((stat.st_dev, stat.st_ino), folder)) != folder:
                    yield _left_out(folder, "linked folder", f"the same as {first}, which is read")
                    continue
                names = set(os.listdir(folder))
            except OSError as err:
                detail = f"cannot list this folder: {err.strerror}. Exclude it or fix its permissions."
                yield _left_out(folder, "cannot be read", detail, stops=True)
                continue
            inside = []
            for name in sorted(names):
                path = os.path.join(folder, name)
                if _matches(name, self.exclude):
                    self.excluded += 1
                    continue
                look = _look(path)
                if isinstance(look, OSError) or not modes.S_ISDIR(look.st_mode):
                    yield from self._found(path, names, look, explicit=False)
                elif (mine := self._own(path, look, names)) is None:
                    inside.append(path)
                elif mine:
                    yield _left_out(path, own.REASON, mine)
            waiting += reversed(inside)

    def _found(self, path: str, names: Set[str], look: os.stat_result | OSError, explicit: bool) -> Iterator[InputFile]:
        """What a folder or a glob has: the file, or why it is not read; nothing for what --include leaves out."""
        if not explicit and self.include and not _matches(os.path.basename(path), self.include):
            self.excluded += 1
        elif isinstance(look, OSError):
            if os.path.islink(path) and look.errno != errno.EACCES:
                yield _left_out(path, "broken link", _broken(path))
            elif look.errno == errno.ENOENT:
                yield _left_out(path, "gone", "it went away while the folder was listed")
            else:
                yield _left_out(path, "cannot be read", f"{look.strerror}; check its permissions", stops=True)
        elif (mine := self._own(path, look, names)) is not None:
            if mine:
                yield _left_out(path, own.REASON, mine)
        elif not modes.S_ISREG(look.st_mode):
            kind = _KINDS.get(modes.S_IFMT(look.st_mode), "something else")
            named = modes.S_ISFIFO(look.st_mode) or modes.S_ISDIR(look.st_mode)
            hint = "; name it as an input if it is to be read" if named else ""
            yield _left_out(path, "no regular file", f"it is {kind}{hint}")
        else:
            yield self._local(path, look, explicit)

    def _own(self, path: str, stat: os.stat_result, names: Set[str]) -> str | None:
        """What to say of a file or folder that the engine wrote, "" to say nothing; None: of somebody else."""
        if (detail := self._mine.get((stat.st_dev, stat.st_ino))) is not None:
            return detail
        return own.written_earlier(*os.path.split(path), names) or None

    def _remote(self, url: str) -> Iterator[InputFile]:
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
            raise DataError(
                "read.url-library-missing", f"{url}: {err}. Install the package that fsspec names for this kind of URL."
            ) from err
        except FileNotFoundError as err:
            raise DataError("read.not-found", f"{url}: no such file or folder. Check the URL of this input.") from err
        except Exception as err:  # every storage library has errors of its own
            raise DataError(
                "read.url-not-listed",
                f"{url}: cannot be listed: {type(err).__name__}: {err}. Check the URL and access.",
            ) from err
        if not facts:
            raise DataError("read.not-found", f"{url}: no file there. Check the URL of this input.")
        for found in sorted(facts):
            info: dict[str, Any] = facts[found]
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
                yield _left_out(name, "no regular file", f"it is a {kind}; name it as an input if it is to be read")


def _identity(url: str) -> object:
    """Of what a URL names, which may be a local file."""
    try:
        stat = os.stat(url.removeprefix("file://")) if url.startswith("file://") else None
    except OSError:
        stat = None
    return url if stat is None else (stat.st_dev, stat.st_ino)


def _look(path: str) -> os.stat_result | OSError:
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
    """What to say of a link that leads to nothing."""
    try:
        target = os.readlink(path)
    except OSError:
        target = "?"
    return f"it leads to {target}"


def _shown(file: InputFile) -> str:
    return "standard input (-)" if file.name == STDIN else file.name


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in globs)
