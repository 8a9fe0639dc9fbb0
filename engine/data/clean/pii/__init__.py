"""Detection of personal data and secrets: addresses, phones, bank accounts, cards, identity numbers, keys, passwords.

A cheap scan finds candidate regions, a pattern proposes a match, and checks decide: check digits, calendar dates,
issuer and country prefixes, reserved ranges, and the context. Values reserved for documentation or not personal
(example.com, 192.168.*, 555-0100) are no findings. Every repetition in a pattern is bounded, so that no text is slow.

Of overlapping findings, the one whose kind comes first in `KINDS` is kept.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from engine.data.clean.pii.addresses import emails, ips
from engine.data.clean.pii.credentials import secrets
from engine.data.clean.pii.national import national_ids
from engine.data.clean.pii.numbers import cards, cn_ids, ibans, us_ssns
from engine.data.clean.pii.phone_numbers import phones
from engine.data.clean.pii.scan import Scan

KINDS: dict[str, Callable[[Scan], Iterator[tuple[int, int]]]] = {
    "api_key": secrets,
    "email": emails,
    "iban": ibans,
    "cn_id": cn_ids,
    "bank_card": cards,
    "national_id": national_ids,
    "us_ssn": us_ssns,
    "ip": ips,
    "phone": phones,
}


@dataclass(frozen=True)
class Entity:
    """A finding: text[begin:end] is of this kind."""

    kind: str
    begin: int
    end: int


def find(text: str, kinds: Sequence[str] = ()) -> list[Entity]:
    """All findings in text order, without overlaps. kinds: a subset of KINDS; empty: all."""
    taken: list[Entity] = []
    scan = Scan(text)
    for kind, search in KINDS.items():
        if not kinds or kind in kinds:
            for begin, end in search(scan):
                _insert_if_free(taken, Entity(kind, begin, end))
    return taken


def mask(text: str, findings: Sequence[Entity]) -> str:
    """The text with each finding replaced by its kind in brackets, such as [EMAIL]."""
    pieces, position = [], 0
    for finding in findings:
        pieces += [text[position : finding.begin], f"[{finding.kind.upper()}]"]
        position = finding.end
    return "".join(pieces) + text[position:]


def redact(value: str) -> str:
    """The value with all but its first and last characters masked; shows at most a third of it."""
    shown = min(2, len(value) // 6)
    return value[:shown] + "*" * min(12, len(value) - 2 * shown) + value[len(value) - shown :]


def _insert_if_free(taken: list[Entity], finding: Entity) -> None:
    """Insert a finding in text order, unless it overlaps another one."""
    at = bisect.bisect_left(taken, finding.begin, key=lambda other: other.begin)
    after_last = at == 0 or taken[at - 1].end <= finding.begin
    before_next = at == len(taken) or finding.end <= taken[at].begin
    if after_last and before_next:
        taken.insert(at, finding)
