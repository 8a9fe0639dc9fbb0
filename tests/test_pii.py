"""Rules for personal data: measured on the labelled set, and each check by itself."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pii_cases import cases, cn_id, scores, table, with_luhn

from engine.data.pii import KINDS, Finding, _take, find, hint, is_card, is_cn_id, luhn, mask

# What the set reached when the rules were written (docs/cleaning.md), less a little.
FLOORS = {
    "api_key": (0.98, 0.94),
    "email": (0.98, 0.93),
    "cn_id": (0.98, 0.95),
    "bank_card": (0.98, 0.92),
    "ip": (0.98, 0.95),
    "phone": (0.98, 0.93),
}


def test_precision_and_recall_on_the_labelled_set() -> None:
    chosen = cases()
    assert len(chosen) >= 400 and sum(not case.spans for case in chosen) >= 150
    measured = scores(chosen)
    assert set(measured) == set(FLOORS) == set(KINDS)
    for kind, (precision, recall) in FLOORS.items():
        score = measured[kind]
        assert score.labelled >= 30
        assert score.precision >= precision and score.recall >= recall, (kind, score)


def test_check_digits() -> None:
    draw = random.Random(3)
    assert luhn("79927398713") and not luhn("79927398710")  # the example of the standard
    assert is_cn_id("11010519491231002X") and is_cn_id("11010519491231002x")  # the example of GB 11643
    for _ in range(200):
        good = cn_id(draw)
        at = draw.randrange(17)
        assert is_cn_id(good) and not is_cn_id(cn_id(draw, wrong=True))
        assert not is_cn_id(good[:at] + str((int(good[at]) + draw.randrange(1, 10)) % 10) + good[at + 1 :])
        card = with_luhn("4" + "".join(draw.choices("0123456789", k=14)))
        assert is_card(card) and not is_card(card[:-1] + str((int(card[-1]) + 1) % 10))
    assert not is_cn_id("110105194902310026")  # 31 February, with whatever check digit
    assert not is_card(with_luhn("9" * 15))


def test_masking_replaces_just_the_findings() -> None:
    text = "mail tom@gmail.com or call 139-1234-5678 from 81.92.17.4, bye"
    found = find(text)
    assert [f.kind for f in found] == ["email", "phone", "ip"]
    assert mask(text, found) == "mail [EMAIL] or call [PHONE] from [IP], bye"
    assert find(mask(text, found)) == []
    assert [f.kind for f in find(text, ["ip"])] == ["ip"]
    assert mask(text, []) == text
    assert hint("tom@gmail.com") == "to*********om" and hint("12345") == "*****"


def test_of_two_overlapping_findings_the_first_one_stays() -> None:
    taken: list[Finding] = []
    for finding in (
        Finding("a", 5, 20),
        Finding("b", 0, 8),
        Finding("c", 0, 5),
        Finding("d", 19, 30),
        Finding("e", 20, 21),
    ):
        _take(taken, finding)
    assert [f.kind for f in taken] == ["c", "a", "e"]


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="0123456789+-. ()@:abcX\n手", max_size=200))
def test_findings_are_ordered_and_apart_in_any_text(text: str) -> None:
    end = 0
    for finding in find(text):
        assert end <= finding.begin < finding.end <= len(text)
        end = finding.end


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "1",
        "1 ",
        "a.b@",
        "+1 ",
        "(021)",
        "1.1.1.",
        "eyJ",
        "eyJaaaaaaaaaaaa.",
        "password=",
        "a@a-",
        "2001:",
        "-----BEGIN PRIVATE KEY-----",
    ],
)
def test_no_text_takes_long(unit: str) -> None:
    """Twice the text takes about twice the time: nothing grows with the square."""
    times = []
    for size in (20_000, 80_000):
        text = unit * (size // len(unit))
        best = min(_timed(text) for _ in range(2))
        times.append(best)
    assert times[1] < 10 * times[0] + 0.2, times


def _timed(text: str) -> float:
    began = time.perf_counter()
    find(text)
    return time.perf_counter() - began


def test_the_documentation_has_these_figures() -> None:
    page = (Path(__file__).parent.parent / "docs" / "cleaning.md").read_text()
    assert table(cases()) in page, "paste what `python tests/pii_cases.py` prints into docs/cleaning.md"
