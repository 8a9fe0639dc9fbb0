"""One pipeline stage on one rank: runs a module forward and backward by microbatch and keeps what lies between.

It does not know what the module is: anything that maps (x, labels, mask) to an activation, or on the last stage to a
summed loss, will do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.data.loader import MicroBatch
from engine.parallel.buckets import GradBuckets


class Stage:
    """module(x, labels, mask) with activations [s, b, width]; first: x is tokens; last: a summed loss comes out.

    buckets: None for a stage that only runs forward.
    """

    def __init__(
        self,
        module: Callable[[Tensor, Tensor, Tensor], Tensor],
        buckets: GradBuckets | None,
        *,
        width: int,
        first: bool,
        last: bool,
    ):
        self.module, self.buckets, self.width, self.first, self.last = module, buckets, width, first, last
        self.live: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, index: int, x: Tensor | None, batch: MicroBatch) -> Tensor:
        """Run microbatch number `index` on received x (None on the first stage); keeps what its backward needs."""
        if self.first:
            x = batch.tokens
        else:
            assert x is not None
            x.requires_grad_(torch.is_grad_enabled())
        out = self.module(x, batch.labels, batch.mask)
        if torch.is_grad_enabled():
            self.live[index] = (x, out)
        return out.detach()

    def backward(self, index: int, grad: Tensor, *, final: bool) -> Tensor | None:
        """Back-propagate `grad` of the forward's result; returns the gradient of x (None on the first stage).

        final: no later backward of this stage in this step, so its gradient buckets may be reduced as they complete.
        """
        x, out = self.live.pop(index)
        if final and self.buckets is not None:
            self.buckets.arm()
        torch.autograd.backward(out, grad)
        return None if self.first else x.grad
