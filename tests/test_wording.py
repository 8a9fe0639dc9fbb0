"""Every error has a code, and tests/wording.txt holds the current messages."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from tests.support.wording import SNAPSHOT, complaints, errors, snapshot


def test_every_error_has_a_code() -> None:
    assert not complaints(errors())


def test_the_wording_is_the_recorded_one() -> None:
    found, recorded = snapshot(errors()).splitlines(), SNAPSHOT.read_text().splitlines()
    change = "\n".join(difflib.unified_diff(recorded, found, "recorded", "found", lineterm="", n=1))
    assert not change, f"{change}\nIf this is intended: python -m tests.support.wording"


def planted(tmp_path: Path, body: str) -> Path:
    (tmp_path / "engine/kitchen").mkdir(parents=True)
    (tmp_path / "engine/errors.py").write_text("class EngineError(Exception): ...\nclass HeatError(EngineError): ...\n")
    code = "from engine import errors\nfrom engine.errors import EngineError, HeatError\ndef f(x, y, code):\n"
    (tmp_path / "engine/kitchen/oven.py").write_text(code + "".join(f"    {line}\n" for line in body.splitlines()))
    return tmp_path


@pytest.mark.parametrize(
    "call",
    ["HeatError(f'{x}: too hot')", "errors.EngineError(code, 'too hot')", "HeatError()", "HeatError('', 'too hot')",
     "HeatError('too-hot', 'x')", "HeatError('kitchen.TooHot', 'x')", "HeatError(f'kitchen.{x}', 'x')",
     "HeatError('kitchen.too-hot.at-all', 'x')", "HeatError('kitchen.too--hot', 'x')", "HeatError(*x)"],
)  # fmt: skip
def test_an_invalid_code_is_reported(call: str, tmp_path: Path) -> None:
    found = complaints(errors(planted(tmp_path, f"raise {call}")))
    assert [complaint.partition(": ")[0] for complaint in found] == ["engine/kitchen/oven.py:4"]


MANY = """
why = f"{x:,} degrees"
if y:
    what, todo = "too hot", "Cool it."
    raise HeatError("kitchen.too-hot", f"{x!r}: {what}; {why}" + "\\n" + todo) from None
faults = [FieldError("kitchen.no-salt", f"salt.{x}", y, "is missing" if x else "is little", "Add some.")]
raise errors.HeatError("kitchen.too-hot", "the oven is " + why)
"""


def test_a_message_is_recorded_with_what_its_names_stand_for(tmp_path: Path) -> None:
    found = errors(planted(tmp_path, MANY))
    assert not complaints(found)
    assert snapshot(found) == (
        "kitchen.no-salt\n    salt.{x}: <is missing | is little>. Add some.\n\n"
        "kitchen.too-hot\n    the oven is {x} degrees\n    {x}: too hot; {x} degrees\\nCool it.\n"
    )
