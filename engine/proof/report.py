"""The result of `engine diff` as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from engine.proof.difference import LayoutDifference, TensorDifference
from engine.proof.sides import Side, described_sides
from engine.proof.traces import TensorRecord

_PHASES = ("state before the step", "forward", "backward", "gradients", "update")
_MOST = 5  # further tensors that are listed


def described(found: LayoutDifference, sides: Sequence[Side], notes: Sequence[str]) -> list[str]:
    """The lines of text, at most 80 columns wide where names allow it."""
    lines = [f"side {name}: {text}" for name, text in zip("ab", described_sides(sides))]
    lines[found.reference] += " (reference)"
    lines += [f"note: {note}" for note in notes]
    lines.append(f"{found.tensors:,} tensors compared, in {found.compared:,} rectangles")
    for name, only in zip("ab", found.only):
        if only:
            lines.append(f"only on side {name}, not compared: {_short(only)}")
    if not found.findings:
        return [*lines, "no difference beyond rounding"]
    return [*lines, "", *_first(found), *_others(found)]


def _first(found: LayoutDifference) -> Iterator[str]:
    first = found.findings[0]
    yield f"first difference: {place_of(first.here)}"
    yield f"  computed by: {first.here.op}"
    for name, record in zip("ab", _by_side(first, found.reference)):
        yield f"  on side {name}: {_held(record)}"
    yield f"  difference {first.distance:.1e}; rounding explains {first.allowed:.1e}; values {first.size:.1e}"


def _others(found: LayoutDifference) -> Iterator[str]:
    places = list(dict.fromkeys(place_of(finding.here) for finding in found.findings))[1:]
    if places:
        yield f"after it {len(places):,} more tensors differ:"
        yield from (f"  {place}" for place in places[:_MOST])


def _by_side(finding: TensorDifference, reference: int) -> tuple[TensorRecord, TensorRecord]:
    return (finding.here, finding.there) if reference else (finding.there, finding.here)


def place_of(record: TensorRecord) -> str:
    """Step, phase and tensor of a record in words."""
    return f"step {record.key[0]}, {_PHASES[record.key[1]]}: {record.kind} {record.name}"


def _held(record: TensorRecord) -> str:
    ranges = ", ".join(f"{begin}:{begin + length}" for begin, length in zip(record.offset, record.shape))
    batch = "" if record.microbatch < 0 else f", micro-batch {record.microbatch}"
    return f"rank {record.rank}{batch}, [{ranges}]"


def _short(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def fields_of(found: LayoutDifference, sides: Sequence[Side], notes: Sequence[str]) -> dict[str, Any]:
    """The fields of the JSON object."""
    return {
        "verb": "diff",
        **dict(zip("ab", described_sides(sides))),
        "reference": "ab"[found.reference],
        "notes": list(notes),
        "tensors": found.tensors,
        "rectangles": found.compared,
        "only_a": list(found.only[0]),
        "only_b": list(found.only[1]),
        "differing": len({finding.here.tensor for finding in found.findings}),
        "first": _fields(found.findings[0], found.reference) if found.findings else None,
    }


def _fields(finding: TensorDifference, reference: int) -> dict[str, Any]:
    record = finding.here
    held = {
        name: {"rank": r.rank, "microbatch": None if r.microbatch < 0 else r.microbatch, "offset": r.offset}
        | {"shape": r.shape}
        for name, r in zip("ab", _by_side(finding, reference))
    }
    return {
        "step": record.key[0],
        "phase": _PHASES[record.key[1]],
        "kind": record.kind,
        "tensor": record.name,
        "layer": record.layer,
        "op": record.op,
        **held,
        "difference": finding.distance,
        "allowed": finding.allowed,
        "size": finding.size,
    }
