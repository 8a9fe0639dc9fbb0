"""One pipeline stage on one rank: runs a module forward and backward per microbatch and saves tensors in between.

The module maps (x, labels, weights, sequence) to an activation, or on the last stage to the weighted loss of each
sample. The objective is the sum of these over samples and microbatches. Nothing else is assumed about the module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.batch import MicroBatch
from engine.batch import Sequence as TokenSequence
from engine.distributed.sharding import Parameter
from engine.ops.linear import WeightGrad
from engine.parallel.gradients import GradBuckets


@dataclass
class Stage:
    """A module on one rank: module(x, labels, weights, sequence) with activations [s, b, width].

    first: x is tokens [b, s]. last: the output is losses [b]. params: the module's parameters, which may defer their
    gradients. buckets: None for a stage that only runs forward. input_grad: x needs a gradient, because an earlier
    stage has trainable parameters. live: microbatch -> (input, output) between F and its backward. deferred: microbatch
    -> weight gradients between I and W.
    """

    module: Callable[[Tensor, Tensor, Tensor, TokenSequence], Tensor]
    params: Sequence[Parameter]
    buckets: GradBuckets | None
    width: int
    first: bool
    last: bool
    input_grad: bool = True
    live: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    deferred: dict[int, list[WeightGrad]] = field(default_factory=dict)

    @property
    def has_backward(self) -> bool:
        """Whether this stage has a backward: it or an earlier stage has trainable parameters."""
        return self.input_grad or any(p.requires_grad for p in self.params)

    def forward(self, index: int, x: Tensor | None, batch: MicroBatch, token_weight: float) -> Tensor:
        """Run microbatch `index` on the received x (None on the first stage); saves tensors for its backward.

        token_weight: weight of every counted token's loss in the objective.
        """
        if self.first:
            x = batch.tokens
        else:
            assert x is not None
            x.requires_grad_(torch.is_grad_enabled() and self.input_grad)
        weights = batch.weights * token_weight
        out = self.module(x, batch.labels, weights, batch.sequence)
        if torch.is_grad_enabled() and self.has_backward:
            self.live[index] = (x, out)
        return out.detach()

    def backward(self, index: int, grad: Tensor | None, *, final: bool) -> Tensor | None:
        """B: back-propagate `grad` of the forward's result; returns the gradient of x (None on the first stage).

        grad: None on the last stage, whose result is the loss itself. Without a backward this does nothing.
        final: this is the last backward of this stage in the step, so its gradient buckets may be reduced as they
        complete.
        """
        if final and self.buckets is not None:
            self.buckets.expect_last_gradients(self.params)
        return self._propagate(index, grad)

    def input_backward(self, index: int, grad: Tensor | None) -> Tensor | None:
        """I: `backward` with the gradients of matrices deferred to `weight_backward`.

        Gradients of embeddings and norms are computed at once: deferring them would save more memory than compute. The
        gradient of the output head was computed in the forward (ops.loss).
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
        """W: compute the gradients that `input_backward` deferred. final: as for `backward`."""
        queue = self.deferred.pop(index)
        if final and self.buckets is not None:
            self.buckets.expect_last_gradients([entry.weight for entry in queue])
        queue.reverse()
        while queue:  # popped one by one: the tensors each has saved are freed as soon as they are used
            queue.pop().run()

    def _propagate(self, index: int, grad: Tensor | None) -> Tensor | None:
        if not self.has_backward:
            return None
        x, out = self.live.pop(index)
        torch.autograd.backward(out, torch.ones_like(out) if grad is None else grad)
        return None if self.first else x.grad
