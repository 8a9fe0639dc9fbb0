"""One pipeline stage on one rank: runs a part of the model forward and backward, and saves tensors in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from engine.batch import MicroBatch
from engine.distributed.sharding import Parameter
from engine.errors import PlanError
from engine.ops.linear import WeightGrad
from engine.parallel.gradients import GradBuckets
from engine.part import Boundary, BoundaryTensor, Output, Part


@dataclass(frozen=True)
class Links:
    """What a stage knows about itself and the others, for micro-batches of certain shapes.

    stage: its number. last: whether it is the last, which returns the losses. before, after: its boundary and that of
    the next stage, where `grad` is False too if all parameters before are frozen. sums: the names of the sums of all
    stages, sorted.
    """

    stage: int
    last: bool
    before: Boundary
    after: Boundary
    sums: tuple[str, ...]

    def check(self, out: Output) -> None:
        """PlanError unless `out` is what the next stage takes, and losses come from the last stage and no other."""
        found = tuple(BoundaryTensor(tuple(x.shape), x.dtype) for x in out.tensors)
        if [replace(x, grad=True) for x in self.after] != list(found):
            self._fail(f"returned {_described(found)}, but stage {self.stage + 1} takes {_described(self.after)}")
        for number, (x, after) in enumerate(zip(out.tensors, self.after)):
            if x.requires_grad and not after.grad:
                problem = f"returned tensor {number} with a gradient, which stage {self.stage + 1} does not give back"
                self._fail(f"{problem}; detach it, or set grad in the boundary")
        if (out.losses is not None) != self.last:
            self._fail("returned losses, but is not the last" if out.losses is not None else "is last, without losses")
        if unknown := sorted(out.sums.keys() - set(self.sums)):
            self._fail(f"returned the sums {', '.join(unknown)}, which no part names in `sums`")

    def _fail(self, problem: str) -> None:
        raise PlanError("pipeline.boundary-mismatch", f"the part of stage {self.stage} {problem}")


def _described(tensors: Boundary) -> str:
    return ", ".join(f"{x.dtype} {list(x.shape)}".removeprefix("torch.") for x in tensors) or "nothing"


@dataclass(frozen=True)
class _Live:
    """Between F and its backward. inputs: those that need a gradient. returning: tensors whose gradient comes back.

    terms: of the objective.
    """

    inputs: list[Tensor]
    returning: list[Tensor]
    terms: list[Tensor]


@dataclass
class Stage:
    """A part of the model on one rank.

    params: the part's parameters, which may defer their gradients. buckets: None for a stage that only runs forward.
    live: by microbatch. deferred: microbatch -> weight gradients between I and W. links: by shapes of a micro-batch,
    set by `executor.connect`.
    """

    part: Part
    params: Sequence[Parameter]
    buckets: GradBuckets | None
    live: dict[int, _Live] = field(default_factory=dict)
    deferred: dict[int, list[WeightGrad]] = field(default_factory=dict)
    links: dict[tuple[tuple[int, ...], ...], Links] = field(default_factory=dict)

    def metadata(self, batch: MicroBatch) -> dict[str, Any]:
        """What other ranks have to know about this stage, for micro-batches of these shapes: JSON values."""
        tensors = self.part.boundary(batch)
        return {
            "boundary": [(x.shape, str(x.dtype).removeprefix("torch."), x.grad) for x in tensors],
            "sums": self.part.sums,
            "trainable": any(p.requires_grad for p in self.params),
        }

    def forward(self, index: int, inputs: tuple[Tensor, ...], batch: MicroBatch) -> Output:
        """Run microbatch `index` on the received tensors; saves what its backward needs. The result is detached."""
        graph, links = torch.is_grad_enabled(), self.links[batch.shapes]
        for x, expected in zip(inputs, links.before, strict=True):
            x.requires_grad_(graph and expected.grad)
        out = self.part(inputs, batch)
        links.check(out)
        if graph:
            returning = [x for x, after in zip(out.tensors, links.after) if after.grad]
            terms = [*out.sums.values()] if out.losses is None else [out.losses, *out.sums.values()]
            self.live[index] = _Live([x for x in inputs if x.requires_grad], returning, terms)
        return out.detach()

    def backward(self, index: int, grads: Sequence[Tensor], *, final: bool) -> tuple[Tensor, ...]:
        """B: back-propagate; returns the gradients of the inputs that need one.

        grads: of the forward's tensors, those with a gradient in the boundary of the next stage.
        final: this is the last backward of this stage in the step, so its gradient buckets may be reduced as they
        complete.
        """
        if final and self.buckets is not None:
            self.buckets.expect_last_gradients(self.params)
        return self._propagate(index, grads)

    def input_backward(self, index: int, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """I: `backward` with the gradients of matrices deferred to `weight_backward`.

        Gradients of embeddings and norms are computed at once: deferring them would save more memory than compute. The
        gradient of the output head was computed in the forward (ops.loss).
        """
        queue: list[WeightGrad] = []
        for p in self.params:
            p.deferred = queue
        grads_in = self._propagate(index, grads)
        for p in self.params:
            p.deferred = None
        self.deferred[index] = queue
        return grads_in

    def weight_backward(self, index: int, *, final: bool) -> None:
        """W: compute the gradients that `input_backward` deferred. final: as for `backward`."""
        queue = self.deferred.pop(index)
        if final and self.buckets is not None:
            self.buckets.expect_last_gradients([entry.weight for entry in queue])
        queue.reverse()
        while queue:  # popped one by one: the tensors each has saved are freed as soon as they are used
            queue.pop().run()

    def _propagate(self, index: int, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        live = self.live.pop(index)
        roots = [*zip(live.returning, grads, strict=True), *((term, torch.ones_like(term)) for term in live.terms)]
        roots = [(x, grad) for x, grad in roots if x.requires_grad]
        if roots:  # none if nothing up to here is trainable
            torch.autograd.backward([x for x, _ in roots], [grad for _, grad in roots])
        return tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in live.inputs)
