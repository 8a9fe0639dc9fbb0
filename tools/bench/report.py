"""The report of every script of this folder: rows, one table, one JSON.

A row compares: ours, the best peer, the limit of the machine. Its figures are those of all repetitions; the table shows
medians, and the ratio and the share of each repetition's own figures where both sides have one of each repetition.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import describe
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One line of the table, with the figures of each repetition. unit: of all three; more: larger is better."""

    what: str
    unit: str
    ours: list[float]
    peer: str = ""
    peers: list[float] = field(default_factory=list)
    limit: str = ""
    limits: list[float] = field(default_factory=list)
    more: bool = True
    note: str = ""

    def against(self, others: list[float]) -> list[float]:
        """How many times as good ours is, of each repetition; of the medians where they cannot be paired."""
        if not self.ours or not others:
            return []
        if len(self.ours) != len(others):
            mine, theirs = [statistics.median(self.ours)], [statistics.median(others)]
        else:
            mine, theirs = self.ours, others
        return [a / b if self.more else b / a for a, b in zip(mine, theirs) if a and b]


def median(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return statistics.median(values) if values else None


def number(value: float | None) -> str:
    """Three figures and more, as people write them."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: Sequence[float], digits: int) -> str:
    """Median and whole range; nothing of nothing."""
    if not values:
        return ""
    middle, low, high = (f"{x:,.{digits}f}" for x in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low}-{high})"


def console() -> Console:
    """A console wide enough for the tables if the output is not a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 170)


def show(title: str, headers: Sequence[str], lines: Sequence[Sequence[str]], caption: str = "") -> None:
    """Any table."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for number, text in enumerate(headers):
        table.add_column(text, no_wrap=number == 0)
    for line in lines:
        table.add_row(*line)
    console().print(table)


def show_rows(title: str, rows: Sequence[Row]) -> None:
    """The table of rows."""
    lines = []
    for row in rows:
        ratios, shares = row.against(row.peers), row.against(row.limits)
        peer = f"{number(median(row.peers))} {row.peer}".strip()
        limit = f"{number(median(row.limits))} {row.limit}".strip()
        ranges = [f"{number(min(row.ours))}-{number(max(row.ours))}"] if len(row.ours) > 1 else []
        ranges += [f"ratio {min(ratios):.2f}-{max(ratios):.2f}"] if len(ratios) > 1 else []
        ranges += [f"share {min(shares):.2f}-{max(shares):.2f}"] if len(shares) > 1 else []
        ranges += [row.note] if row.note else []
        ours = number(median(row.ours)) or "-"
        marks = [f"{x:.2f}" if x is not None else "" for x in (median(ratios), median(shares))]
        lines.append((row.what, row.unit, ours, peer, marks[0], limit, marks[1], "; ".join(ranges)))
    caption = (
        "medians; ratio: how many times as good as the peer; share: of the limit (over 1: better than it); "
        "spread: lowest and highest of the repetitions"
    )
    show(title, ("what", "unit", "ours", "peer", "ratio", "limit", "share", "spread"), lines, caption)


def header(machine: dict[str, Any]) -> str:
    """Machine and versions in a line."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Python {machine['python']}, "
        f"torch {machine['torch']}, commit {machine['commit']}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    )


def as_json(row: Row) -> dict[str, Any]:
    """A row with its derived values, for JSON."""
    return asdict(row) | {"ratio": median(row.against(row.peers)), "share": median(row.against(row.limits))}


def finish(
    rows: Sequence[Row], details: Any, path: Path | None, title: str = "", machine: dict[str, Any] | None = None
) -> None:
    """Print the table of rows; write them, with `details` (all figures of the script), to `path`.

    machine: as it was before the measurement.
    """
    machine = machine or describe()
    show_rows(f"{title}\n{header(machine)}\n{shlex.join(sys.argv)}".strip(), rows)
    if path is not None:
        found = {
            "machine": machine,
            "command": shlex.join(sys.argv),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows": [as_json(row) for row in rows],
            "details": details,
        }
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def from_json(row: dict[str, Any]) -> Row:
    """The reverse of as_json."""
    return Row(**{name: value for name, value in row.items() if name not in ("ratio", "share")})
