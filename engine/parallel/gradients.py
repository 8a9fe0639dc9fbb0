"""Flat gradient buckets: gradients accumulate in contiguous tensors that are reduced over the data ranks when complete.

Goal: the reduction of a bucket overlaps the backward of earlier layers, and with ZeRO-1 the all-gather of the weights
of later layers overlaps the forward of earlier ones. Invariants:

* A bucket's `values` hold the parameters (each parameter is a view into it) and `grads` their main gradients, in the
  same order at the same offsets, so the optimizer works on flat tensors.
* A bucket belongs to one unit of the model (a block, or what is before or after the blocks) and one axis of
  replicas, the ranks that hold the same weights (ShardSpec.replicas). In each owner's range of it, parameters of one
  group (optimizer) are adjacent. A frozen parameter is in no bucket.
* Each replica *owns* a range of each bucket (`shares`): it counts this range in the gradient norm and writes it to
  checkpoints. Under ZeRO-1 (Rajbhandari et al. 2020) this is also the only range whose gradients it needs and whose
  weights it updates (`update_range`). The ranges are equal, and gradients are reduce-scattered; or, if an update rule
  needs whole matrices, they hold whole parameters, and gradients are all-reduced.
* Gradients accumulate over micro-batches and are *summed*, not averaged, over the replicas: the loss is already divided
  by the global token count.
* Communication order is the order in which buckets complete. Autograd runs the same graph on every rank of an axis, so
  the order is the same on all of them. Buckets of tied embeddings ("late" buckets) are summed over the first and last
  stage. The two stages finish at different times, so these sums start in `wait`, at the end of the plan.
* Partial gradients of replicated values (spec `sum_over`) are summed over their axis before the data-parallel
  reduction.

If a sum is missing, the loss curve looks right but the gradient norm is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.distributed.collectives import (
    Pending,
    all_gather_into_start,
    all_reduce_,
    all_reduce_start,
    post,
    reduce_scatter_start,
)
from engine.distributed.context import Axis, ParallelContext
from engine.distributed.sharding import Parameter, piece_of
from engine.distributed.specs import ShardSpec
from engine.parallel.partition import BucketPlan, Group, Partition, ungrouped


@dataclass
class Bucket:
    """Parameters that are stored, reduced and updated together, as flat tensors.

    starts: offset of each parameter in the flat tensors, in elements. late: holds tied embeddings. axis: the replicas.
    shares: range of the flat tensors that each replica owns. even: they are equal. zero: ZeRO-1 over several replicas.
    missing_grads: parameters whose last gradient of the step has not arrived. gathering: the transfers of updated
    weights in flight.
    """

    params: list[Parameter]
    starts: list[int]
    values: Tensor
    grads: Tensor
    late: bool
    axis: Axis
    shares: list[range]
    even: bool
    zero: bool
    missing_grads: int = 0
    started: bool = False
    reducing: Pending | None = None
    gathering: list[Pending] = field(default_factory=list)

    @property
    def owned_range(self) -> range:
        """The range that this rank, and no other replica, counts in norms and saves."""
        return self.shares[self.axis.rank]

    @property
    def update_range(self) -> range:
        """The range whose gradients this rank reduces and whose weights it updates."""
        return self.owned_range if self.zero else range(len(self.values))

    def view(self, flat: Tensor, index: int) -> Tensor:
        """The parameter at `index` as a view of a flat tensor with this bucket's layout."""
        p = self.params[index]
        return flat[self.starts[index] : self.starts[index] + p.numel()].view(p.shape)

    def view_range(self, flat: Tensor, span: range) -> Tensor:
        """A range of a flat tensor with this bucket's layout, as a view."""
        return flat[span.start : span.stop]

    def intersection(self, index: int, span: range) -> tuple[int, int]:
        """The elements [begin, end) of the parameter at `index` in a range of the bucket; none if begin >= end."""
        start = self.starts[index]
        return max(span.start - start, 0), min(span.stop - start, self.params[index].numel())

    def start_reduction(self, dtype: torch.dtype) -> None:
        """Start summing the gradients over the replicas, in `dtype`."""
        x = self.grads
        if self.axis.size > 1:  # one rank sums nothing, so it must not round either
            x = x.to(dtype)
        self.reducing = (reduce_scatter_start if self.zero and self.even else all_reduce_start)(x, self.axis)

    def wait_for_gradients(self) -> None:
        """Wait until the gradients in `update_range` are global sums."""
        if self.reducing is not None:
            total, target = self.reducing.wait(), self.view_range(self.grads, self.update_range)
            if len(total) > len(target):
                total = self.view_range(total, self.update_range)
            if total.data_ptr() != target.data_ptr():
                target.copy_(total)
            self.reducing = None

    def start_gather(self) -> None:
        """ZeRO-1: start gathering the updated weights of all replicas."""
        if self.even:
            self.gathering = [all_gather_into_start(self.values, self.axis)]
            return
        peers, mine = [i for i in range(self.axis.size) if i != self.axis.rank], self.owned_range
        sends = [(self.view_range(self.values, mine), peer) for peer in peers if len(mine)]
        receives = [(self.view_range(self.values, self.shares[i]), i) for i in peers if len(self.shares[i])]
        self.gathering = [pending for many in post(sends, receives, self.axis) for pending in many]

    def wait_for_weights(self) -> None:
        """Wait until the weights of this bucket are gathered."""
        while self.gathering:
            self.gathering.pop().wait()


@dataclass
class GradBuckets:
    """All gradient buckets of one pipeline stage. Order and invariants: see the module docstring.

    overlap: reduce buckets as they complete, not at the end. reduce_dtype: dtype of sums over replicas. frozen: the
    parameters that are in no bucket. expecting: the gradients that arrive now are the last of this step.
    """

    ctx: ParallelContext
    buckets: list[Bucket]
    overlap: bool
    reduce_dtype: torch.dtype
    frozen: list[Parameter]
    expecting: bool = field(default=False)

    def zero_grad(self) -> None:
        """Zero all gradients; call before the first micro-batch of a step."""
        for b in self.buckets:
            b.grads.zero_()
            b.started, b.reducing = False, None

    def expect_last_gradients(self, params: Iterable[Parameter]) -> None:
        """Announce that the next gradients of these parameters are the last of this step.

        With `overlap`, each bucket is reduced as soon as all its gradients have arrived. Call before the last
        micro-batch's backward.
        """
        self.expecting = self.overlap
        wanted = {id(p) for p in params}
        for b in self.buckets:
            b.missing_grads = sum(id(p) in wanted for p in b.params)
            if self.expecting and not b.missing_grads and not b.late:
                self._start(b)

    def reduce(self) -> None:
        """After this stage's backward: start the reductions that have not started yet (the plan's REDUCE action)."""
        self.expecting = False
        for b in self.buckets:
            if not b.started and not b.late:
                self._start(b)

    def wait(self) -> None:
        """After the plan: return when all gradients in each bucket's `update_range` are global sums."""
        for b in self.buckets:
            assert b.started or b.late, "reduce() comes before wait()"
            if not b.started:
                self._start(b)
        for b in self.buckets:
            b.wait_for_gradients()

    def gather(self, *, overlap: bool) -> None:
        """ZeRO-1: gather the updated weights, first layers first; a no-op without ZeRO-1.

        overlap: return while the transfers are in flight.
        """
        for b in reversed(self.buckets):
            if b.zero:
                b.start_gather()
                if not overlap:
                    b.wait_for_weights()

    def wait_for_weights(self) -> None:
        """Wait for all gathers; call before weights are read outside a forward."""
        for b in self.buckets:
            b.wait_for_weights()

    def _grad_arrived(self, bucket: Bucket) -> None:
        if self.expecting:
            bucket.missing_grads -= 1
            if bucket.missing_grads == 0 and not bucket.late:
                self._start(bucket)

    def _start(self, bucket: Bucket) -> None:
        bucket.started = True
        self._sum_replicated(bucket)
        bucket.start_reduction(self.reduce_dtype)

    def _sum_replicated(self, bucket: Bucket) -> None:
        """All-reduce the partial gradients of replicated values, in one message per axis."""
        parts: dict[str, list[Tensor]] = {}
        for index, p in enumerate(bucket.params):
            main = bucket.view(bucket.grads, index)
            for piece in p.spec.pieces(self.ctx):
                for name in piece.sum_over:
                    if self.ctx.axis(name).size > 1:
                        parts.setdefault(name, []).append(piece_of(piece, main))
        for name, views in parts.items():
            total = all_reduce_(torch.cat([view.reshape(-1) for view in views]), self.ctx.axis(name))
            for view, values in zip(views, total.split([view.numel() for view in views])):
                view.copy_(values.view(view.shape))


def make_buckets(
    units: Sequence[Sequence[Parameter]],
    ctx: ParallelContext,
    *,
    grad_dtype: torch.dtype,
    bucket_bytes: int,
    overlap: bool,
    zero: bool = False,
    reduce_dtype: torch.dtype | None = None,
    group_of: Callable[[ShardSpec], Group] = ungrouped,
) -> GradBuckets:
    """Move parameters into flat buckets, in reverse order (the order of the backward), and route their gradients there.

    units: the parameters of each block, and of what is before and after the blocks (`sharding.units`). A unit has one
    bucket, and another for tied embeddings and for each further axis of replicas; a bucket is closed when its gradients
    reach bucket_bytes. reduce_dtype: dtype of sums over several replicas; None: grad_dtype.
    """
    frozen = [p for unit in units for p in unit if not p.spec.trainable]
    stage = GradBuckets(ctx, [], overlap, reduce_dtype or grad_dtype, frozen)
    elements = bucket_bytes // grad_dtype.itemsize
    divide = Partition[Parameter](lambda p: p.spec, lambda name: ctx.axis(name).size, elements, group_of)
    stage.buckets = [_make_bucket(plan, ctx, grad_dtype, zero) for plan in divide(units)]
    for bucket in stage.buckets:
        for index, p in enumerate(bucket.params):
            _route_gradient(p, bucket, index, stage)
    return stage


def wait_before_use(modules: Iterable[nn.Module], stages: Iterable[GradBuckets]) -> None:
    """Make each module wait for its weights just before its forward, so that all-gathers overlap earlier modules."""
    gathered = (bucket for stage in stages for bucket in stage.buckets if bucket.zero)
    holder = {id(p): bucket for bucket in gathered for p in bucket.params}
    for module in modules:
        for part in module.modules():
            for p in part.parameters(recurse=False):
                if id(p) in holder:
                    part.register_forward_pre_hook(_wait_hook(holder[id(p)]))


def _wait_hook(bucket: Bucket) -> Callable[[nn.Module, Any], None]:
    return lambda module, args: bucket.wait_for_weights()


def _make_bucket(plan: BucketPlan[Parameter], ctx: ParallelContext, grad_dtype: torch.dtype, zero: bool) -> Bucket:
    """Store the parameters of a plan in a new bucket."""
    axis = ctx.axis(plan.replicas)
    values = torch.zeros(plan.elements, dtype=ctx.dtype, device=ctx.device)
    grads = torch.zeros(plan.elements, dtype=grad_dtype, device=ctx.device)
    sharded = zero and axis.size > 1
    bucket = Bucket(plan.params, plan.starts, values, grads, plan.late, axis, plan.shares, plan.even, sharded)
    for index, p in enumerate(plan.params):
        view = bucket.view(values, index)
        view.copy_(p.detach())
        p.data = view
    return bucket


def _route_gradient(p: Parameter, bucket: Bucket, index: int, owner: GradBuckets) -> None:
    """Route all gradients of a parameter to its main gradient.

    Matmuls and the embedding accumulate into the main gradient themselves and call `on_grad`. For other parameters,
    such as norm weights, autograd fills `.grad`, and a hook adds it to the main gradient at once.
    """
    p.main_grad = bucket.view(bucket.grads, index)
    p.on_grad = lambda: owner._grad_arrived(bucket)

    p.register_post_accumulate_grad_hook(_move_grad)


def _move_grad(p: Tensor) -> None:
    """Hook that adds `.grad` to the main gradient.

    Not a closure: Python could never free a tensor that is referenced by its own hook.
    """
    assert isinstance(p, Parameter)
    if p.grad is None:  # already accumulated by the op; torch 2.13 calls the hook even so
        return
    assert p.main_grad is not None and p.on_grad is not None
    p.main_grad.add_(p.grad)
    p.grad = None
    p.on_grad()
