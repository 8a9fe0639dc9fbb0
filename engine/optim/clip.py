"""Global gradient norm and clipping, from ShardSpecs.

The squared norm of every canonical tensor lands in its own slot of one vector; each value is counted on exactly one
rank that holds it (`Piece.counted`, and among data ranks the owner of its flat range), the vector is summed over the
ranks and added up in canonical order. So replicas and tied copies count once, padding counts zero, and a non-finite
gradient comes with the name of its tensor. All is added in float64 and the norm of float32 gradients is rounded to
float32: how the values are spread over buckets and ranks shows in the last of the 29 bits that this drops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.distributed.collectives import all_reduce_
from engine.distributed.context import ParallelContext
from engine.ops.native import kernels
from engine.parallel.gradients import Bucket, GradBuckets

_CPU_BLOCK, _GPU_BLOCK = 1 << 15, 1 << 24  # elements: stays in a core's cache; few launches


@dataclass(frozen=True)
class GradNorms:
    """norm: the global L2 norm. squared: canonical tensor name -> its squared L2 norm."""

    norm: float
    squared: dict[str, float]

    def non_finite(self) -> list[str]:
        """Names of the tensors whose gradient holds an infinity or a NaN."""
        return [name for name, value in self.squared.items() if not (value < float("inf"))]


@dataclass(frozen=True)
class _Counted:
    """Ranges [begin, end) of a bucket's flat gradients that this rank counts, and the slot of each.

    bounds [k, 2] and slots [k]: int64 on the gradients' device.
    """

    grads: Tensor
    ranges: list[tuple[int, int]]
    bounds: Tensor
    slots: Tensor


def _counted(bucket: Bucket, ctx: ParallelContext, slot: Mapping[str, int]) -> _Counted:
    ranges, slots = [], []
    for index, p in enumerate(bucket.params):
        low, high = bucket.overlap(index, bucket.own)
        for piece in p.spec.pieces(ctx):
            begin, end = piece.flat_range()
            begin, end = max(begin, low), min(end, high)
            if piece.counted and begin < end:
                start = bucket.starts[index]
                ranges.append((start + begin, start + end))
                slots.append(slot[piece.name])
    bounds, numbers = (torch.tensor(x, dtype=torch.int64, device=ctx.device) for x in (ranges, slots))
    return _Counted(bucket.grads, ranges, bounds, numbers)


def sum_squares(flat: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """float64 [k]: the sum of squares of each range [begin, end) of a flat tensor, added in float64.

    Block by block: torch's own way makes a float64 copy of the whole. The reference of our kernel of the same name.
    """
    wide = torch.empty(_GPU_BLOCK if flat.is_cuda else _CPU_BLOCK, dtype=torch.float64, device=flat.device)
    sums = torch.zeros(len(ranges), dtype=torch.float64, device=flat.device)
    for total, (begin, end) in zip(sums, ranges):
        for block in flat[begin:end].split(len(wide)):
            part = wide[: len(block)].copy_(block)
            total += torch.dot(part, part)
    return sums


class NormCounter:
    """Computes the norms of the reduced gradients over the whole model, again and again.

    names: its canonical tensors; dtype: of all gradients. Both are the same on all ranks, and so is what comes out: it
    decides whether an update is made. (A pipeline rank may hold no gradient that would tell the dtype.)
    """

    def __init__(self, stages: Sequence[GradBuckets], ctx: ParallelContext, names: Sequence[str], dtype: torch.dtype):
        self.ctx, self.names, self.dtype = ctx, names, dtype
        slot = {name: i for i, name in enumerate(names)}
        counted = (_counted(bucket, ctx, slot) for stage in stages for bucket in stage.buckets)
        self.counted = [c for c in counted if c.ranges]

    def local(self) -> Tensor:
        """float64 [len(names)]: squared norms of what this rank counts; zeros elsewhere."""
        squared = torch.zeros(len(self.names), dtype=torch.float64, device=self.ctx.device)
        for c in self.counted:
            own = kernels(c.grads)
            squares = own.sum_squares(c.grads, c.bounds) if own else sum_squares(c.grads, c.ranges)
            squared.index_add_(0, c.slots, squares)
        return squared

    def __call__(self, scale: float = 1.0) -> GradNorms:
        """Norms of gradients / scale. Collective."""
        values = [value / scale**2 for value in all_reduce_(self.local(), self.ctx.world).tolist()]
        norm = math.fsum(values) ** 0.5 if all(map(math.isfinite, values)) else float("nan")
        return GradNorms(torch.tensor(norm, dtype=self.dtype).item(), dict(zip(self.names, values)))


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply gradients of this norm by so that it is at most max_norm (0: no limit)."""
    return max_norm / norm if 0 < max_norm < norm else 1.0
