"""Dropout by keyed draws: a mask depends on the seed, the step, the place in the model, and the global element alone.

An element is (global sample number, position in the sequence, feature). So ranks that hold the same activation drop the
same elements, ranks that hold parts drop those of one process, and the backward and any recomputation draw the mask
again instead of saving it. Where a sequence has no draws (validation, generation) nothing is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.batch import Sequence
from engine.distributed.context import Axis
from engine.ops.draws import dropout


@dataclass(frozen=True)
class Dropout:
    """Dropout at one place of the model. name: of the place. positions, features: axes across which x is sharded."""

    p: float
    name: str
    positions: Axis
    features: Axis

    def __call__(self, x: Tensor, sequence: Sequence) -> Tensor:
        """x [s, b, f] -> the same shape: this rank's part of the positions and features of the sequence's samples."""
        if not self.p or sequence.draws is None:
            return x
        s, _, f = x.shape
        places = sequence.places(self.positions.rank * s, s, self.features.size * f, self.features.rank * f, f)
        return dropout(x, sequence.draws.key("dropout", self.name), places, self.p)
