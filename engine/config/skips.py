"""Numbers of samples (data.skip_samples) and steps (train.skip_steps) to skip, written as "7 10-12"."""

from __future__ import annotations

import bisect
import re

Ranges = tuple[tuple[int, int], ...]  # [first, last], ascending, none touching the next


def read_ranges(text: str) -> Ranges:
    """Parse numbers and inclusive ranges, separated by spaces or commas. ValueError names an invalid word."""
    found: list[tuple[int, int]] = []
    for word in text.replace(",", " ").split():
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ValueError(f"{word!r} is neither a number nor a range such as 10-12")
        found.append((first, last))
    joined: list[tuple[int, int]] = []
    for first, last in sorted(found):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return tuple(joined)


def contains(ranges: Ranges, number: int) -> bool:
    """Whether one of the ranges contains the number."""
    at = bisect.bisect_right(ranges, number, key=lambda pair: pair[0]) - 1
    return at >= 0 and number <= ranges[at][1]


def ranges_below(ranges: Ranges, limit: int) -> str:
    """The parts of the ranges below a limit, as text."""
    return format_ranges(tuple((first, min(last, limit - 1)) for first, last in ranges if first < limit))


def format_ranges(ranges: Ranges) -> str:
    """Format ranges as text that `read_ranges` parses."""
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
