"""Glob matching like Python's `glob`, but `**` visits each folder once and unreadable folders are reported."""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import stat as modes
from collections.abc import Callable, Iterator

SkippedFolder = tuple[str, str]  # (path, reason)


class Glob:
    """Searches for a pattern; afterwards `linked` and `errors` list the folders that were skipped, with the reason."""

    def __init__(self) -> None:
        self.linked: list[SkippedFolder] = []
        self.errors: list[SkippedFolder] = []

    def paths(self, pattern: str) -> list[str]:
        """The matching paths, sorted. A pattern that ends in `**` or `**/*` matches files only; others folders too."""
        parts = [part for part in pattern.split("/") if part]
        found = set(self._below("/" if pattern.startswith("/") else "", parts))
        if "**" in parts[-2:] and parts[-1] in ("*", "**"):
            found = {path for path in found if not os.path.isdir(path)}
        return sorted(found)

    def _below(self, folder: str, parts: list[str]) -> Iterator[str]:
        """Paths in `folder` that match the pattern `parts`."""
        part, rest = parts[0], parts[1:]
        if part == "**":
            yield from self._deep(folder, parts, {})
        elif not glob.has_magic(part):
            yield from self._inside(os.path.join(folder, part), rest)
        else:
            for name in self._names(folder):
                if fnmatch.fnmatchcase(name, part) and (part[0] == "." or name[0] != "."):
                    yield from self._inside(os.path.join(folder, name), rest)

    def _deep(self, folder: str, parts: list[str], seen: dict[tuple[int, int], str]) -> Iterator[str]:
        """Paths that match `parts`, the first of which is `**`; `seen`: the visited folders by (device, inode)."""
        if (stat := self._stat(folder or ".", os.stat)) is None:
            return
        if (first := seen.setdefault((stat.st_dev, stat.st_ino), folder)) != folder:
            self._note(self.linked, folder, f"the same as {first or '.'}, which is read")
            return
        if rest := parts[1:]:
            yield from self._below(folder, rest)
        for name in self._names(folder):
            path = os.path.join(folder, name)
            if name[0] != ".":
                if not rest:
                    yield path
                if self._is_folder(path):
                    yield from self._deep(path, parts, seen)

    def _inside(self, path: str, rest: list[str]) -> Iterator[str]:
        if rest and self._is_folder(path):
            yield from self._below(path, rest)
        elif not rest and self._stat(path, os.lstat):
            yield path

    def _is_folder(self, path: str) -> bool:
        found = self._stat(path, os.stat)
        return found is not None and modes.S_ISDIR(found.st_mode)

    def _stat(self, path: str, stat: Callable[[str], os.stat_result]) -> os.stat_result | None:
        try:
            return stat(path)
        except OSError as err:
            self._missed(os.path.dirname(path), err)
            return None

    def _names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(folder or "."))
        except OSError as err:
            self._missed(folder, err)
            return []

    def _missed(self, folder: str, err: OSError) -> None:
        if err.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            self._note(self.errors, folder, f"cannot list this folder: {err.strerror}. Fix its permissions.")

    def _note(self, skipped: list[SkippedFolder], folder: str, why: str) -> None:
        if (folder, why) not in skipped:
            skipped.append((folder, why))
