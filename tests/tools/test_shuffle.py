"""Documents of a sorted corpus are distributed over batches as by a full shuffle."""

from __future__ import annotations

import sys

import pytest

from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "tools/bench"))

from shuffle import MIXES, measure


@pytest.mark.parametrize(
    ("documents", "mix", "seeds", "batches", "within"),
    [
        (40_000, (10, 32, 512), 2, 30, 0.15),
        *(pytest.param(n, mix, 3, 200, 0.05, marks=pytest.mark.heavy) for n in (100_000, 8_000_000) for mix in MIXES),
    ],
)
def test_a_label_spreads_as_with_a_full_shuffle(
    documents: int, mix: tuple[int, int, int], seeds: int, batches: int, within: float
) -> None:
    """The remaining part of `within` is chance: it depends on the number of batches and of epochs."""
    ours, full = measure(documents, mix, seeds, batches)
    assert ours.sd / full.sd == pytest.approx(1, abs=within)
    assert ours.labels / full.labels == pytest.approx(1, abs=0.02)
    assert ours.entropy / full.entropy == pytest.approx(1, abs=0.02)
