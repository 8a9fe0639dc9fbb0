"""Finds files in an input folder that are not inputs, because the engine wrote them in this or an earlier command.

Read as text, a corpus next to its source would count documents twice, or stop at a sidecar without the key. Such files
are recognised by their names and by other files next to them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.tokenize.file_names import DEFINITION, FILES
from engine.util.files import read_json

REASON = "own file"
_CORPUS = (".bin", ".idx", ".json")
_WORK = (".parts", ".work")
_CLEANED = (".jsonl", ".jsonl.gz", ".jsonl.zst")

Identity = tuple[int, int]


@dataclass(frozen=True)
class OwnFiles:
    """Files that a command writes (`outputs`) or uses (`tokenizer`), and its work folder; none of them is read."""

    outputs: Sequence[Path] = ()
    tokenizer: Path | None = None
    work: Path | None = None

    def reasons_by_file(self) -> dict[Identity, str]:
        """(device, inode) -> reason to skip, for each that exists; "" (no message) for the work folder."""
        reasons: list[tuple[Path | None, str]] = [(path, "this command writes it") for path in self.outputs]
        if self.tokenizer is not None and self.tokenizer.is_file():
            reasons.append((self.tokenizer, "the tokenizer of this command"))
        reasons.append((self.work, ""))
        found = {}
        for path, detail in reasons:
            if path is not None and (stat := _stat(path)) is not None:
                found[stat.st_dev, stat.st_ino] = detail
        return found


def describe_engine_file(folder: str, name: str, names: Set[str]) -> str:
    """Why a folder entry is output of an earlier command; "" if it is not. `names`: all names in the folder."""

    def exists(stem: str, *suffixes: str) -> bool:
        return any(stem + suffix in names for suffix in suffixes)

    for suffix in _CORPUS:
        stem = name.removesuffix(suffix)
        if stem != name and exists(stem, ".bin") and exists(stem, ".idx"):
            return f"it belongs to the corpus {stem}.bin"
    for suffix in ("-skipped.jsonl", "-dropped.jsonl", "-tokenizer"):
        stem = name.removesuffix(suffix)
        if stem != name and exists(stem, "-report.json"):
            return f"it belongs to the report {stem}-report.json"
    stem = name.removesuffix("-report.json")
    if stem != name and exists(stem, "-dropped.jsonl", "-skipped.jsonl", "-train.idx", ".idx"):
        return f"the report on {stem}"
    if DEFINITION in names and name in FILES:
        return "it belongs to a tokenizer"
    if name.endswith(_WORK) and os.path.isfile(os.path.join(folder, name, "settings.json")):
        return "unfinished work of another command"
    return ""


def cleaned_copies(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(cleaned file, its source) for pairs where both are among `names`, by the reports that `engine clean` wrote."""
    sources = {name: made_from for name in names if (made_from := _sources(name))}
    by_real_path = {os.path.realpath(name): name for name in names} if sources else {}
    for name, made_from in sources.items():
        real = os.path.realpath(name)
        for other, shown in by_real_path.items():
            if other != real and any(other == path or other.startswith(path + os.sep) for path in made_from):
                yield name, shown
                break


def _sources(name: str) -> list[str]:
    """Sources of a cleaned file, by the report next to it; [] for any other file."""
    stem = next((name.removesuffix(suffix) for suffix in _CLEANED if name.endswith(suffix)), "")
    if not stem or not os.path.isfile(f"{stem}-dropped.jsonl"):
        return []
    try:
        report: Any = read_json(Path(f"{stem}-report.json"))
        return [os.path.realpath(path) for path in report["inputs"] if isinstance(path, str)]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None
