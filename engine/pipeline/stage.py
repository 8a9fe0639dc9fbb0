"""One pipeline stage on one rank: runs a module forward and backward by microbatch and keeps what lies between.

It does not know what the module is: anything that maps (x, labels, weights, documents) to an activation, or on the last
stage to each sample's part of the objective, will do. The objective is the sum of these over samples and microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.batch import Documents, MicroBatch
from engine.distributed.sharding import Parameter
from engine.ops.linear import WeightGrad
from engine.parallel.gradients import GradBuckets


@dataclass
class Stage:
    """module(x, labels, weights, documents) with activations [s, b, width]; first: x is tokens; last: losses come out.

    params: of the module, each of which may defer its gradient. buckets: None for a stage that only runs forward.
    live: microbatch -> (input, output) from F to its backward. deferred: microbatch -> weight gradients from I to W.
    """

    module: Callable[[Tensor, Tensor, Tensor, Documents | None], Tensor]
    params: Sequence[Parameter]
    buckets: GradBuckets | None
    width: int
    first: bool
    last: bool
    live: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    deferred: dict[int, list[WeightGrad]] = field(default_factory=dict)

    def forward(self, index: int, x: Tensor | None, batch: MicroBatch, token_weight: float) -> Tensor:
        """Run microbatch number `index` on received x (None on the first stage); keeps what its backward needs.

        token_weight: what the loss of every counted token weighs in the objective.
        """
        if self.first:
            x = batch.tokens
        else:
            assert x is not None
            x.requires_grad_(torch.is_grad_enabled())
        weights = batch.mask * torch.tensor(token_weight, dtype=torch.float64)
        out = self.module(x, batch.labels, weights, batch.documents)
        if torch.is_grad_enabled():
            self.live[index] = (x, out)
        return out.detach()

    def backward(self, index: int, grad: Tensor | None, *, final: bool) -> Tensor | None:
        """B: back-propagate `grad` of the forward's result; returns the gradient of x (None on the first stage).

        grad: None on the last stage, whose result is what is differentiated.
        final: no later backward of this stage in this step, so its gradient buckets may be reduced as they complete.
        """
        if final and self.buckets is not None:
            self.buckets.expect_last_gradients(self.params)
        return self._propagate(index, grad)

    def input_backward(self, index: int, grad: Tensor | None) -> Tensor | None:
        """I: `backward` with the gradients of matrices put off to `weight_backward`.

        Those of embeddings and norms, a few numbers a token, are computed at once: they would keep more than they cost.
        That of the output head is there since the forward (ops.loss).
        """
        queue: list[WeightGrad] = []
        for p in self.params:
            p.deferred = queue
        grad_x = self._propagate(index, grad)
        for p in self.params:
            p.deferred = None
        self.deferred[index] = queue
        return grad_x

    def weight_backward(self, index: int, *, final: bool) -> None:
        """W: the gradients that `input_backward` has put off. final: as for `backward`."""
        queue = self.deferred.pop(index)
        if final and self.buckets is not None:
            self.buckets.expect_last_gradients([entry.weight for entry in queue])
        queue.reverse()
        while queue:  # taken off one by one: what each has kept is freed as soon as it is used
            queue.pop().run()

    def _propagate(self, index: int, grad: Tensor | None) -> Tensor | None:
        x, out = self.live.pop(index)
        torch.autograd.backward(out, torch.ones_like(out) if grad is None else grad)
        return None if self.first else x.grad
