"""Global gradient norm and clipping, computed from ShardSpecs.

One vector has a slot for the squared norm of each canonical tensor. Each value is counted on exactly one of the ranks
that hold it (`Piece.counted`, and among replicas the owner of its flat range). The vector is summed over all ranks,
and its slots are added in canonical order. So replicas and tied weights count once, padding counts zero, and a
non-finite gradient is reported with the name of its tensor. All sums are in float64, and the norm of float32 gradients
is rounded to float32: the distribution over buckets and ranks affects only the last of the 29 bits that this drops.
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
    """Gradient norms of one step. norm: global L2 norm. squared: canonical tensor name -> squared L2 norm."""

    norm: float
    squared: dict[str, float]

    def non_finite(self) -> list[str]:
        """Canonical names of the tensors whose gradient contains an infinity or a NaN."""
        return [name for name, value in self.squared.items() if not (value < float("inf"))]


@dataclass(frozen=True)
class _CountedRanges:
    """Ranges [begin, end) of a bucket's flat gradients that this rank counts, and the slot of each.

    bounds [k, 2] and slots [k]: int64 on the gradients' device.
    """

    grads: Tensor
    ranges: list[tuple[int, int]]
    bounds: Tensor
    slots: Tensor


def _counted_ranges(bucket: Bucket, ctx: ParallelContext, slot: Mapping[str, int]) -> _CountedRanges:
    ranges, slots = [], []
    for index, p in enumerate(bucket.params):
        low, high = bucket.intersection(index, bucket.owned_range)
        for piece in p.spec.pieces(ctx):
            begin, end = max(piece.begin, low), min(piece.end, high)
            if piece.counted and begin < end:
                start = bucket.starts[index]
                ranges.append((start + begin, start + end))
                slots.append(slot[piece.name])
    bounds, numbers = (torch.tensor(x, dtype=torch.int64, device=ctx.device) for x in (ranges, slots))
    return _CountedRanges(bucket.grads, ranges, bounds, numbers)


def sum_squares(flat: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """The sum of squares of each range [begin, end) of a flat tensor, in float64: float64 [k].

    Reference of the custom kernel of the same name. Works block by block, because `flat.double()` would copy the whole.
    """
    wide = torch.empty(_GPU_BLOCK if flat.is_cuda else _CPU_BLOCK, dtype=torch.float64, device=flat.device)
    sums = torch.zeros(len(ranges), dtype=torch.float64, device=flat.device)
    for total, (begin, end) in zip(sums, ranges):
        for block in flat[begin:end].split(len(wide)):
            part = wide[: len(block)].copy_(block)
            total += torch.dot(part, part)
    return sums


class NormCounter:
    """Computes the gradient norms of the whole model, after the reduction of the gradients.

    names: canonical names of all tensors of the model. dtype: of the gradients; given, because a pipeline rank may hold
    no gradient. Both are equal on all ranks, and so is the result, which decides whether the step is skipped.
    """

    def __init__(self, stages: Sequence[GradBuckets], ctx: ParallelContext, names: Sequence[str], dtype: torch.dtype):
        self.ctx, self.names, self.dtype = ctx, names, dtype
        slot = {name: i for i, name in enumerate(names)}
        counted = (_counted_ranges(bucket, ctx, slot) for stage in stages for bucket in stage.buckets)
        self.counted = [c for c in counted if c.ranges]

    def local(self) -> Tensor:
        """Squared norms of the values that this rank counts, float64 [len(names)]; zero for other tensors."""
        squared = torch.zeros(len(self.names), dtype=torch.float64, device=self.ctx.device)
        for c in self.counted:
            custom = kernels(c.grads)
            squares = custom.sum_squares(c.grads, c.bounds) if custom else sum_squares(c.grads, c.ranges)
            squared.index_add_(0, c.slots, squares)
        return squared

    def __call__(self, scale: float = 1.0) -> GradNorms:
        """Norms of the gradients divided by scale. Collective over all ranks."""
        values = [value / scale**2 for value in all_reduce_(self.local(), self.ctx.world).tolist()]
        norm = math.fsum(values) ** 0.5 if all(map(math.isfinite, values)) else float("nan")
        return GradNorms(torch.tensor(norm, dtype=self.dtype).item(), dict(zip(self.names, values)))


def clip_factor(norm: float, max_norm: float) -> float:
    """The factor that clips gradients of this norm to at most max_norm; 1 if max_norm is 0 (no limit)."""
    return max_norm / norm if 0 < max_norm < norm else 1.0
