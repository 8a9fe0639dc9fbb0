"""Global gradient norm and clipping, from ShardSpecs.

The squared norm of every canonical tensor lands in its own slot of one vector; each value is counted on exactly one
rank that holds it (`Piece.counted`, and among data ranks the owner of its flat range), the vector is summed over the
ranks and added up in canonical order. So replicas and tied copies count once, padding counts zero, and a non-finite
gradient comes with the name of its tensor. All is added in float64 and the norm of float32 gradients is rounded to
float32: how the values are spread over buckets and ranks shows in the last of the 29 bits that this drops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.comm import all_reduce_
from engine.context import ParallelContext
from engine.parallel.buckets import GradBuckets

_CPU_BLOCK, _GPU_BLOCK = 1 << 15, 1 << 24  # elements: stays in a core's cache; few launches


@dataclass(frozen=True)
class GradNorms:
    """norm: the global L2 norm. squared: canonical tensor name -> its squared L2 norm."""

    norm: float
    squared: dict[str, float]

    def non_finite(self) -> list[str]:
        """Names of the tensors whose gradient holds an infinity or a NaN."""
        return [name for name, value in self.squared.items() if not (value < float("inf"))]


class NormCounter:
    """Computes the norms of the reduced gradients over the whole model, again and again.

    names: its canonical tensors, the same on all ranks.
    """

    def __init__(self, stages: Sequence[GradBuckets], ctx: ParallelContext, names: Sequence[str]):
        self.ctx, self.names = ctx, names
        self.exact = any(b.grads.dtype == torch.float64 for stage in stages for b in stage.buckets)
        slot = {name: i for i, name in enumerate(names)}
        slots: list[int] = []
        self.segments: list[Tensor] = []  # views of what this rank counts
        for bucket in (b for stage in stages for b in stage.buckets):
            for index, p in enumerate(bucket.params):
                low, high = bucket.overlap(index, bucket.own)
                for piece in p.spec.pieces(ctx):
                    begin, end = piece.flat_range()
                    begin, end = max(begin, low), min(end, high)
                    if piece.counted and begin < end:
                        start = bucket.starts[index]
                        self.segments.append(bucket.grads[start + begin : start + end])
                        slots.append(slot[piece.name])
        self.slots = torch.tensor(slots, dtype=torch.int64, device=ctx.device)
        block = _GPU_BLOCK if ctx.device.type == "cuda" else _CPU_BLOCK
        self.wide = torch.empty(block, dtype=torch.float64, device=ctx.device)

    def local(self) -> Tensor:
        """float64 [len(names)]: squared norms of what this rank counts; zeros elsewhere."""
        squared = torch.zeros(len(self.names), dtype=torch.float64, device=self.ctx.device)
        if self.segments:
            squared.index_add_(0, self.slots, torch.stack([self._square(x) for x in self.segments]))
        return squared

    def _square(self, x: Tensor) -> Tensor:
        """The float64 sum of squares of flat x, block by block: torch's own way makes a float64 copy of the whole."""
        if x.dtype == torch.float64:
            return torch.dot(x, x)
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for block in x.split(len(self.wide)):
            wide = self.wide[: len(block)].copy_(block)
            total += torch.dot(wide, wide)
        return total

    def __call__(self, scale: float = 1.0) -> GradNorms:
        """Norms of gradients / scale. Collective."""
        values = [value / scale**2 for value in all_reduce_(self.local(), self.ctx.world).tolist()]
        norm = math.fsum(values) ** 0.5 if all(map(math.isfinite, values)) else float("nan")
        return GradNorms(norm if self.exact else torch.tensor(norm).item(), dict(zip(self.names, values)))


def scale_(stages: Sequence[GradBuckets], factor: float) -> None:
    """Multiply all gradients that this rank holds by a factor, in place."""
    if factor != 1.0:
        for bucket in (b for stage in stages for b in stage.buckets):
            bucket.part(bucket.grads, bucket.held).mul_(factor)


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply gradients of this norm by so that it is at most max_norm (0: no limit)."""
    return max_norm / norm if 0 < max_norm < norm else 1.0
