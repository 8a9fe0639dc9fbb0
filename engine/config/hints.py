"""Suggestions for a setting, a command or a choice that does not exist.

A name gets a hint if another engine has it (engine.config.peers), if it exists in another section, or if it is
misspelt by a few letters. Otherwise there is none: a wrong hint costs more than no hint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from engine.config.peers import ENGINES


@dataclass(frozen=True)
class Hint:
    """ours: the suggested setting, empty if there is none. remark: values, or the reason. engine: whose name it is."""

    ours: str
    remark: str = ""
    engine: str = ""


def suggest(path: str, known: Sequence[str]) -> Hint | None:
    """Suggest a setting for `section.name` or `name`, which is not one of `known`."""
    path = path.strip("-").replace("-", "_").lower()
    name = path.rpartition(".")[2]
    by_name: dict[str, list[str]] = {}
    for other in known:
        by_name.setdefault(other.rpartition(".")[2], []).append(other)
    if hint := _peer_names().get(path):
        return hint
    names = by_name.keys() - _VAGUE_OURS
    if name in names and len(by_name[name]) == 1:
        return Hint(by_name[name][0])
    if "." in path and (near := nearest(path, known)):
        return Hint(near)
    if hint := _peer_names().get(name):
        return hint
    if "." not in path and (near := nearest(name, names)):
        return Hint(by_name[near][0])
    near = nearest(name, _peer_names())
    return _peer_names()[near] if near and len(name) > 7 else None


_VAGUE_OURS = {
    "data",
    "layers",
    "schedule",
    "kind",
    "every",
    "train",
    "batches",
}  # settings whose last part says little alone
_VAGUE_THEIRS = {"name", "enable", "steps", "mode", "folder", "filter", "recipe", "implementation", "freq", "interval"}


@cache
def _peer_names() -> dict[str, Hint]:
    """Hints by name of another engine, or by the last part of torchtitan's if unambiguous. Earlier engines win."""
    found: dict[str, Hint] = {}
    parts: dict[str, set[Hint]] = {}
    for engine, rows in ENGINES.items():
        for theirs, ours, remark in rows:
            for name in theirs.split():
                key, hint = name.strip("-").replace("-", "_").lower(), Hint(ours, remark, engine)
                found.setdefault(key, hint)
                if "." in key:
                    parts.setdefault(key.rpartition(".")[2], set()).add(hint)
    clear = {name: next(iter(hints)) for name, hints in parts.items() if len(hints) == 1}
    return {name: hint for name, hint in clear.items() if name not in _VAGUE_THEIRS} | found


def nearest(word: str, known: Iterable[str]) -> str:
    """The one of `known` that is a few typing errors from `word`; empty for none or several.

    A typing error: an extra, missing or wrong letter, or two exchanged neighbours; not an extra or missing word.
    Allowed: one error from 3 letters (from 2 after a section), two from 7, three from 12; for each part between dots.
    """
    found: list[tuple[int, str]] = []
    for other in known:
        pairs = list(zip(word.split("."), other.split(".")))
        if word.count(".") != other.count(".") or any(_one_more_word(a, b) for a, b in pairs):
            continue
        errors = [_typing_errors(a, b) for a, b in pairs]
        if all(n <= _allowed(a, b, alone=len(pairs) == 1) for n, (a, b) in zip(errors, pairs)):
            found.append((sum(errors), other))
    found.sort()
    return found[0][1] if found and (len(found) == 1 or found[0][0] < found[1][0]) else ""


def _allowed(a: str, b: str, *, alone: bool) -> int:
    length = min(len(a), len(b)) if alone else max(len(a), len(b))
    return 3 if length > 11 else 2 if length > 6 else 1 if length > (2 if alone else 1) else 0


def _one_more_word(a: str, b: str) -> bool:
    """Whether one name is the other plus a word: v_head_dim is not a misspelt head_dim."""
    words, others = set(a.split("_")), set(b.split("_"))
    return words < others or others < words


def _typing_errors(a: str, b: str) -> int:
    """Edit distance with exchanged neighbours (optimal string alignment)."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            best = min(rows[-1][j] + 1, row[j - 1] + 1, rows[-1][j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]
