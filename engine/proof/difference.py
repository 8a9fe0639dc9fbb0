"""The first intermediate tensor in which two layouts of a config differ by more than rounding explains.

Both sides train the same steps and record their tensors (engine.proof.capture). The reference also runs `MOVES` times
with noise as large as rounding at every tensor, so for each tensor it is measured how far rounding moves it. A
rectangle of the other side differs if it is further from the reference than `limit` allows.

The limit is a statistical bound, not a number chosen by hand. Let e be the mean squared distance of the moves from the
reference. Rounding errors are many small terms, so the squared distance d of a correct layout is e times a chi-squared
variable with nu degrees of freedom, divided by nu; e itself is the mean of MOVES such variables. nu follows from the
moves too (`_degrees_of_freedom`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from engine.proof.sides import Side, noise_of, record
from engine.proof.traces import GRADIENTS, UPDATE, Array, TensorKey, TensorRecord, Trace

MOVES = 4
FALSE_ALARMS = 1e-6  # probability that a correct layout is reported, over all of its rectangles


@dataclass(frozen=True)
class TensorDifference:
    """A rectangle that differs. here: of the side that is judged; there: of the reference.

    distance: root mean square of the difference; allowed: what rounding explains; size: of the reference's values.
    """

    here: TensorRecord
    there: TensorRecord
    distance: float
    allowed: float
    size: float


@dataclass(frozen=True)
class LayoutDifference:
    """Result of a comparison. findings: in program order. compared: number of rectangles; tensors: of tensors.

    only: names of tensors that only side a, and only side b has. reference: 0 if side a is the reference, 1 for b.
    """

    findings: tuple[TensorDifference, ...]
    compared: int
    tensors: int
    only: tuple[tuple[str, ...], tuple[str, ...]]
    reference: int = 1


def limit(nu: float, tests: int) -> float:
    """How far a correct layout may be from the reference, in units of the root mean squared distance of the moves.

    nu: degrees of freedom of the rounding errors. tests: number of rectangles. Chernoff's bound of both tails of a
    chi-squared variable: its mean over n degrees of freedom is beyond t with probability (t exp(1 - t)) ** (n / 2).
    """
    exponent = math.log(2 * tests / FALSE_ALARMS)
    return math.sqrt(_tail(2 * exponent / nu, 1.0, 1e9) / _tail(2 * exponent / (MOVES * nu), 1e-300, 1.0))


def _tail(x: float, low: float, high: float) -> float:
    """The solution t of t - 1 - log t = x in [low, high], which is below 1 or above 1."""
    above = low >= 1
    for _ in range(200):
        middle = (low + high) / 2 if above else math.sqrt(low * high)
        if (middle - 1 - math.log(middle) > x) == above:
            high = middle
        else:
            low = middle
    return high if above else low


def first_difference(
    sides: tuple[Side, Side], steps: int, folder: Path, progress: Callable[[str], None] = lambda text: None
) -> LayoutDifference:
    """Run both sides and compare. The reference is the side with fewer ranks, b if they are equal.

    folder: for the traces, which take `MOVES + 2` times the activations of `steps` steps. progress: called with what
    runs next.
    """
    reference = 0 if sides[0].ranks < sides[1].ranks else 1
    configs = [side.cfg for side in sides]
    progress(f"recording side {'ba'[reference]}: {sides[1 - reference].layout}")
    record(sides[1 - reference], folder / "here", [noise_of(configs, 0)], steps)
    progress(f"recording side {'ab'[reference]}: {sides[reference].layout}, and {MOVES} times with noise")
    record(sides[reference], folder / "there", [noise_of(configs, move) for move in range(MOVES + 1)], steps)
    progress("comparing")
    here = Trace(folder / "here" / "0")
    there, *moves = (Trace(folder / "there" / str(move)) for move in range(MOVES + 1))
    found = compare(here, there, moves)
    return found if reference else replace(found, only=(found.only[1], found.only[0]), reference=0)


def compare(here: Trace, there: Trace, moves: Sequence[Trace]) -> LayoutDifference:
    """Judge every rectangle of `here`. there: the reference; moves: the reference with noise."""
    common = [r for r in here.records if r.tensor in there.by_tensor]
    findings, compared = [], set()
    for rectangle in common:
        found, moved = there.rectangle(rectangle), [move.rectangle(rectangle) for move in moves]
        if found is None:
            continue
        compared.add(rectangle)
        values, moves_here = here.values(rectangle), [m[0] for m in moved if m is not None]
        if (keep := _decided(rectangle, there, moves, len(common))) is not None:
            values, found, moves_here = values[keep], (found[0][keep], found[1]), [m[keep] for m in moves_here]
        finding = judge(rectangle, values, found, moves_here, len(common))
        if finding is not None:
            findings.append(finding)
    only = (
        _names(here.by_tensor.keys() - there.by_tensor.keys()),
        _names(there.by_tensor.keys() - here.by_tensor.keys()),
    )
    return LayoutDifference(tuple(findings), len(compared), len({r.tensor for r in compared}), only)


def _decided(record: TensorRecord, there: Trace, moves: Sequence[Trace], tests: int) -> Array | None:
    """For updated weights, bool: where rounding cannot change the sign of the gradient; None: compare all values.

    AdamW's first updates depend on little else than that sign. So where a gradient is zero but for rounding, a correct
    layout may update the weight in the other direction, by far more than rounding: such values are not compared.
    """
    if record.key[1] != UPDATE or record.kind not in ("master weights", "weights"):
        return None
    keep = np.ones(record.shape, bool)
    for step in range(1, record.key[0] + 1):
        gradient = replace(record, key=(step, GRADIENTS), kind="weight gradient")
        found, moved = there.rectangle(gradient), [move.rectangle(gradient) for move in moves]
        if found is None:
            continue
        noise = np.sqrt(np.mean([np.square(m[0] - found[0]).mean() for m in moved if m is not None]))
        largest = noise * math.sqrt(_tail(2 * math.log(2 * tests / FALSE_ALARMS), 1.0, 1e9))
        keep &= (np.abs(found[0]) > largest) | (found[0] == 0)
    return keep


def _names(tensors: set[TensorKey]) -> tuple[str, ...]:
    return tuple(sorted({f"{kind} {name}" for _, _, kind, name in tensors}))


def _degrees_of_freedom(differences: Sequence[Array], squares: Sequence[float]) -> float:
    """Those of the rounding errors, from the moves. differences: of each from the reference; squares: their sums.

    The squared cosine of two differences is 1 / nu on average. If few elements move far, such as those whose update
    changes its sign, the number of these elements fluctuates as much as half as many degrees of freedom would.
    """
    cosines = [float(a @ b) ** 2 / (x * y) for (a, x), (b, y) in combinations(zip(differences, squares), 2) if x * y]
    if not cosines:
        return 1.0
    moving = [1 / float(np.square(d * d / x).sum()) for d, x in zip(differences, squares) if x]
    nu = min(len(cosines) / max(sum(cosines), 1e-12), 2 * sum(moving) / len(moving), differences[0].size)
    return max(1.0, nu)


def judge(
    record: TensorRecord, values: Array, found: tuple[Array, TensorRecord], moved: Sequence[Array], tests: int
) -> TensorDifference | None:
    """The finding if a rectangle differs, else None."""
    reference, there = found
    differences = [(m - reference).ravel() for m in moved]
    squares = [float(d @ d) for d in differences]
    distance = float(np.linalg.norm(values - reference))
    mean = sum(squares) / len(squares)
    if distance <= math.sqrt(mean):  # a limit is at least 1
        return None
    allowed = math.sqrt(mean) * limit(_degrees_of_freedom(differences, squares), tests)
    if distance <= allowed:
        return None
    per_value = math.sqrt(max(1, reference.size))
    size = float(np.linalg.norm(reference)) / per_value
    return TensorDifference(record, there, distance / per_value, allowed / per_value, size)
