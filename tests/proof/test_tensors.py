"""Canonical tensors of ranks: coverage, replicas, and what counts as a difference."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.proof.tensors import Array, assemble, errors_of


def piece(begin: int, *values: float) -> tuple[str, tuple[int, ...], tuple[int, ...], Array]:
    return "w", (4,), (begin,), np.array(values)


def test_ranks_are_assembled() -> None:
    found = assemble([[piece(0, 1, 2)], [piece(2, 3, 4)], [piece(1, 2, 3)]])
    assert found.tensors["w"].tolist() == [1, 2, 3, 4] and not found.faults


@pytest.mark.parametrize(
    ("ranks", "fault"),
    [
        ([[piece(0, 1, 2)], [piece(1, 2 + 4e-16, 3, 4)]], "replicas differ"),
        ([[piece(0, 1, 2)], [piece(3, 4)]], "1 of 4 values are on no rank"),
    ],
)
def test_faults_of_the_ranks_are_named(ranks: list[list], fault: str) -> None:  # type: ignore[type-arg]
    assert assemble(ranks).faults == {"w": fault}


@pytest.mark.parametrize(
    ("found", "wanted", "error"),
    [
        ({"a": [1.0, 4.0]}, {"a": [1.0, 4.0]}, 0.0),
        ({"a": [1.0, 4.0]}, {"a": [3.0, 4.0]}, 0.5),
        ({"a": [0.0]}, {"a": [0.0]}, 0.0),
        ({"a": [1e-9]}, {"a": [0.0]}, math.inf),
        ({"a": [math.nan]}, {"a": [1.0]}, math.inf),
        ({"a": [1.0], "b": [1.0]}, {"a": [1.0]}, math.inf),
        ({"a": [1.0]}, {"a": [1.0], "b": [1.0]}, math.inf),
        ({"a": [[1.0, 1.0]]}, {"a": [1.0, 1.0]}, math.inf),
        ({"a": [1e-9, 0.0], "b": [2.0]}, {"a": [0.0, 1e-9], "b": [2.0]}, 5e-6),  # relative to 1e-4 of b
        ({"a": [1e-3, 0.0], "b": [2.0]}, {"a": [0.0, 1e-3], "b": [2.0]}, 1.0),
    ],
)
def test_differences(found: dict[str, list[float]], wanted: dict[str, list[float]], error: float) -> None:
    errors = errors_of(*({name: np.array(x) for name, x in side.items()} for side in (found, wanted)))
    assert max(errors.values()) == pytest.approx(error, rel=1e-12)
