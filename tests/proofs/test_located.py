"""The first difference is where the fault is, and correct layouts have none."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.proofs import clean_layouts, located
from tests.proofs.mutations import MUTATIONS


def test_the_table_names_faults_and_probes_that_exist() -> None:
    names = {m.name for m in MUTATIONS}
    assert len(located.FAULTS) >= 80 and located.FAULTS.keys() <= names
    assert {probe for probe, _ in located.FAULTS.values()} == located.PROBES.keys()


def test_drawn_layouts_are_valid_and_different() -> None:
    rng = random.Random(1)
    drawn = [clean_layouts.drawn(rng, model, 4) for model in clean_layouts.MODELS for _ in range(5)]
    assert len({str(cfg.parallel) for cfg in drawn}) > 20


@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_nine_of_ten_faults_are_located() -> None:
    """In another process, because this one has imported the engine."""
    root = Path(located.__file__).parents[2]
    subprocess.run([sys.executable, "-m", "tests.proofs.located"], cwd=root, check=True)


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_no_correct_layout_differs_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["clean_layouts", "--count", "40", "--seed", "2"])
    assert clean_layouts.main() == 0
