"""Personal data and secrets in text: addresses, phones, bank accounts and cards, identity numbers, keys and passwords.

A cheap scan finds the places, a pattern proposes, a check decides: check digits, calendar dates, issuer and country
prefixes, reserved ranges, and the few characters around. What is reserved for documentation or cannot reach a person
(example.com, 192.168.*, 555-0100) is no finding. Every repetition is bounded, so that no text takes long.

Order decides overlaps: a kind that is listed earlier in `KINDS` takes the characters.
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
    """text[begin:end] is of this kind."""

    kind: str
    begin: int
    end: int


def find(text: str, kinds: Sequence[str] = ()) -> list[Entity]:
    """All findings in order, none overlapping. `kinds`: a subset of KINDS, empty: all."""
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
    """Enough of a finding to recognise its form, too little to use it: at most a third, first and last characters."""
    shown = min(2, len(value) // 6)
    return value[:shown] + "*" * min(12, len(value) - 2 * shown) + value[len(value) - shown :]


def _insert_if_free(taken: list[Entity], finding: Entity) -> None:
    """Insert it in order of text, unless something there overlaps it."""
    at = bisect.bisect_left(taken, finding.begin, key=lambda other: other.begin)
    after_last = at == 0 or taken[at - 1].end <= finding.begin
    before_next = at == len(taken) or finding.end <= taken[at].begin
    if after_last and before_next:
        taken.insert(at, finding)
