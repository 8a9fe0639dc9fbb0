"""Global gradient norm and clipping, from ShardSpecs.

The squared norm of every canonical tensor lands in its own slot of one vector; each value is counted on exactly one
rank that holds it (`Piece.counted`), the vector is summed over the ranks and added up in canonical order. So
replicas and tied copies count once, padding counts zero, the result does not depend on bucket sizes or on where the
pipeline is cut, and a non-finite gradient comes with the name of its tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.comm import all_reduce_
from engine.context import ParallelContext
from engine.parallel.buckets import GradBuckets
from engine.sharding import Parameter


@dataclass(frozen=True)
class GradNorms:
    """norm: the global L2 norm. squared: canonical tensor name -> its squared L2 norm."""

    norm: float
    squared: dict[str, float]

    def non_finite(self) -> list[str]:
        """Names of the tensors whose gradient holds an infinity or a NaN."""
        return [name for name, value in self.squared.items() if not (value < float("inf"))]


def local_squared_norms(params: Sequence[Parameter], ctx: ParallelContext, names: Sequence[str]) -> torch.Tensor:
    """float64 [len(names)]: squared norms of the pieces this rank counts for its data replica; zeros elsewhere."""
    slot = {name: i for i, name in enumerate(names)}
    pieces, slots = [], []
    for p in params:
        assert p.main_grad is not None
        for piece in p.spec.pieces(ctx):
            if piece.counted:
                pieces.append(piece.of(p.main_grad))
                slots.append(slot[piece.name])
    squared = torch.zeros(len(names), dtype=torch.float64, device=ctx.device)
    if pieces:
        norms = torch.stack([torch.linalg.vector_norm(x) for x in pieces]).double()
        squared[torch.tensor(slots, device=ctx.device)] = norms.square()
    return squared


def gradient_norms(params: Sequence[Parameter], ctx: ParallelContext, names: Sequence[str]) -> GradNorms:
    """Norms of the reduced gradients over the whole model; `names` are its canonical tensors, the same on all ranks."""
    squared = local_squared_norms(params, ctx, names)
    if ctx.data.rank > 0:  # data ranks hold equal sums after the reduction: one of them speaks
        squared.zero_()
    values = all_reduce_(squared, ctx.world).tolist()
    return GradNorms(sum(values) ** 0.5, dict(zip(names, values)))


def clip_(buckets: Sequence[GradBuckets], norm: float, max_norm: float) -> None:
    """Scale all gradients in place so that their global norm is at most max_norm (0: leave them)."""
    if 0 < max_norm < norm:
        for stage in buckets:
            for bucket in stage.buckets:
                bucket.grads.mul_(max_norm / norm)
