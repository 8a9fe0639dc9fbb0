"""Flat gradient buckets: gradients accumulate in contiguous tensors that are reduced over the data ranks when complete.

Goal: the reduction of a bucket overlaps the backward of earlier layers, and with ZeRO-1 the all-gather of the weights
of later layers overlaps the forward of earlier ones. Invariants:

* A bucket's `values` hold the parameters (each parameter is a view into it) and `grads` their main gradients, in the
  same order at the same offsets, so the optimizer works on flat tensors.
* A bucket has one axis of replicas, the ranks that hold the same weights (ShardSpec.replicas: the data and context
  ranks). Each of them *owns* an equal flat range of the bucket (`owned_range`): it counts this range in the gradient
  norm and writes it to checkpoints. Under ZeRO-1 (Rajbhandari et al. 2020) this is also the only range whose gradients
  it reduces and whose weights it updates (`update_range`).
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
    reduce_scatter_start,
)
from engine.distributed.context import Axis, ParallelContext
from engine.distributed.sharding import Parameter, piece_of
from engine.distributed.specs import Role

_ALIGN = 64  # elements, so that every parameter and every rank's range starts on its own cache line for any dtype


@dataclass
class Bucket:
    """Parameters that are stored, reduced and updated together, as flat tensors.

    starts: offset of each parameter in the flat tensors, in elements. decay: apply weight decay to all of them. late:
    holds tied embeddings. axis: the replicas. owned_range, update_range: ranges of the flat tensors, see the module
    docstring. missing_grads: parameters whose last gradient of the step has not arrived. gathering: the all-gather in
    flight.
    """

    params: list[Parameter]
    starts: list[int]
    values: Tensor
    grads: Tensor
    decay: bool
    late: bool
    axis: Axis
    owned_range: range
    update_range: range
    missing_grads: int = 0
    started: bool = False
    reducing: Pending | None = None
    gathering: Pending | None = None

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

    def wait_for_weights(self) -> None:
        """Wait until the all-gather of this bucket's weights is complete."""
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None


@dataclass
class GradBuckets:
    """All gradient buckets of one pipeline stage. Order and invariants: see the module docstring.

    overlap: reduce buckets as they complete, not at the end. zero: ZeRO-1. reduce_dtype: dtype of sums over replicas.
    expecting: the gradients that arrive now are the last of this step.
    """

    ctx: ParallelContext
    buckets: list[Bucket]
    overlap: bool
    zero: bool
    reduce_dtype: torch.dtype
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
            if b.reducing is not None:
                total, target = b.reducing.wait(), b.view_range(b.grads, b.update_range)
                if total.data_ptr() != target.data_ptr():
                    target.copy_(total)
                b.reducing = None

    def gather(self, *, overlap: bool) -> None:
        """ZeRO-1: all-gather the updated weights, first layers first; a no-op without ZeRO-1.

        overlap: return while the all-gathers are in flight.
        """
        if self.zero:
            for b in reversed(self.buckets):
                b.gathering = all_gather_into_start(b.values, b.axis)
                if not overlap:
                    b.wait_for_weights()

    def wait_for_weights(self) -> None:
        """Wait for all all-gathers; call before weights are read outside a forward."""
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
        x = bucket.grads
        if bucket.axis.size > 1:  # one rank sums nothing, so it must not round either
            x = x.to(self.reduce_dtype)
        bucket.reducing = (reduce_scatter_start if self.zero else all_reduce_start)(x, bucket.axis)

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
    params: Sequence[Parameter],
    ctx: ParallelContext,
    *,
    grad_dtype: torch.dtype,
    bucket_bytes: int,
    overlap: bool,
    zero: bool = False,
    reduce_dtype: torch.dtype | None = None,
) -> GradBuckets:
    """Move parameters into flat buckets, in reverse order (the order of the backward), and route their gradients there.

    Parameters without weight decay (biases, norms) and tied embeddings get separate buckets. bucket_bytes: a bucket is
    closed when its gradients reach this size. reduce_dtype: dtype of sums over several replicas; None: grad_dtype.
    """
    groups: dict[tuple[bool, bool, str], list[list[Parameter]]] = {}
    for p in reversed(params):
        late = any("tied_stages" in c.sum_over for c in p.spec.chunks)
        runs = groups.setdefault((p.spec.role is not Role.VECTOR, late, p.spec.replicas), [[]])
        if runs[-1] and sum(q.numel() for q in runs[-1]) * grad_dtype.itemsize >= bucket_bytes:
            runs.append([])
        runs[-1].append(p)
    stage = GradBuckets(ctx, [], overlap, zero, reduce_dtype or grad_dtype)
    for (decay, late, replicas), runs in groups.items():
        axis = ctx.axis(replicas)
        stage.buckets += [_make_bucket(run, ctx, axis, grad_dtype, decay, late, zero) for run in runs]
    for bucket in stage.buckets:
        for index, p in enumerate(bucket.params):
            _route_gradient(p, bucket, index, stage)
    return stage


def wait_before_use(modules: Iterable[nn.Module], stages: Iterable[GradBuckets]) -> None:
    """Make each module wait for its weights just before its forward, so that all-gathers overlap earlier modules."""
    gathered = (bucket for stage in stages if stage.zero for bucket in stage.buckets if bucket.axis.size > 1)
    holder = {id(p): bucket for bucket in gathered for p in bucket.params}
    for module in modules:
        for part in module.modules():
            for p in part.parameters(recurse=False):
                if id(p) in holder:
                    part.register_forward_pre_hook(_wait_hook(holder[id(p)]))


def _wait_hook(bucket: Bucket) -> Callable[[nn.Module, Any], None]:
    return lambda module, args: bucket.wait_for_weights()


def _make_bucket(
    params: list[Parameter],
    ctx: ParallelContext,
    axis: Axis,
    grad_dtype: torch.dtype,
    decay: bool,
    late: bool,
    zero: bool,
) -> Bucket:
    starts, total = [], 0
    for p in params:
        starts.append(total)
        total += -(-p.numel() // _ALIGN) * _ALIGN
    share = -(-total // (_ALIGN * axis.size)) * _ALIGN
    total = share * axis.size
    own = range(axis.rank * share, (axis.rank + 1) * share)
    values = torch.zeros(total, dtype=ctx.dtype, device=ctx.device)
    grads = torch.zeros(total, dtype=grad_dtype, device=ctx.device)
    bucket = Bucket(params, starts, values, grads, decay, late, axis, own, own if zero else range(total))
    for index, p in enumerate(params):
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
