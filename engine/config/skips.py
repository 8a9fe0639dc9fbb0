"""What a run leaves out by number, written as "7 10-12": samples (data.skip_samples) and steps (train.skip_steps)."""

from __future__ import annotations

import bisect
import re

Ranges = tuple[tuple[int, int], ...]  # [first, last], ascending, none touching the next


def read_ranges(text: str) -> Ranges:
    """Numbers and ranges with both ends in, with spaces or commas between. ValueError names what is neither."""
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
    """Whether a number is in one of them."""
    at = bisect.bisect_right(ranges, number, key=lambda pair: pair[0]) - 1
    return at >= 0 and number <= ranges[at][1]


def ranges_below(ranges: Ranges, limit: int) -> str:
    """In words, what of them is below a number."""
    return format_ranges(tuple((first, min(last, limit - 1)) for first, last in ranges if first < limit))


def format_ranges(ranges: Ranges) -> str:
    """As `read_ranges` reads them."""
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
