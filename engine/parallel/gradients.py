"""Flat gradient buckets: main gradients in one contiguous tensor each, reduced over the data ranks as they complete.

Goal: the reduction of a bucket runs while the backward of earlier layers still computes, and with ZeRO-1 the weights of
later layers travel while the forward of earlier ones does. Invariants:

* A bucket's `values` hold the parameters (each parameter is a view into it) and `grads` their main gradients, in the
  same order at the same offsets: the optimizer is a function of flat tensors.
* Every data rank *owns* an equal flat range of each bucket: it counts it in the gradient norm and writes it to
  checkpoints. Under ZeRO-1 (Rajbhandari et al. 2020) it also is all that the rank reduces and updates (`held`).
* Gradients add up over microbatches and are *summed* over data ranks: the loss is already divided by the global token
  count, so nothing is averaged.
* Communication order is the order in which buckets complete; autograd runs the same graph on every rank of an axis,
  so it is the same on all of them. Sums that need both pipeline ends (tied embeddings) wait for `reduce`, because the
  two ends finish at different times ("late" buckets).
* Partial gradients of replicated values (spec `sum_over`) are added over their axis before the data reduction.

What breaks if wrong: a missed sum shows as a loss curve that looks fine and a gradient norm that does not.
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
from engine.distributed.context import ParallelContext
from engine.distributed.sharding import Parameter

_ALIGN = 64  # elements: every parameter, and every rank's range, starts on its own cache line, whatever the dtype


@dataclass
class Bucket:
    """Parameters that are stored, reduced and updated together. decay: weight decay applies to all of them.

    own, held: [begin, end) of the flat tensors; see the module text. gathering: the weights, while they travel.
    """

    params: list[Parameter]
    starts: list[int]
    values: Tensor
    grads: Tensor
    decay: bool
    late: bool
    own: range
    held: range
    missing: int = 0
    started: bool = False
    reducing: Pending | None = None
    gathering: Pending | None = None

    def view(self, flat: Tensor, index: int) -> Tensor:
        """Parameter number `index` as a view of a flat tensor laid out like this bucket."""
        p = self.params[index]
        return flat[self.starts[index] : self.starts[index] + p.numel()].view(p.shape)

    def part(self, flat: Tensor, of: range) -> Tensor:
        """A range of a flat tensor laid out like this bucket, as a view."""
        return flat[of.start : of.stop]

    def overlap(self, index: int, of: range) -> tuple[int, int]:
        """Which elements [begin, end) of parameter number `index` lie in a range of the bucket; begin >= end: none."""
        start = self.starts[index]
        return max(of.start - start, 0), min(of.stop - start, self.params[index].numel())

    def wait_for_weights(self) -> None:
        """Return when the weights are all there."""
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None


@dataclass
class GradBuckets:
    """All buckets of one pipeline stage. See the module text for order and invariants.

    overlap: reduce as buckets complete, not at the end. zero: ZeRO-1. reduce_dtype: what gradients are summed in.
    """

    ctx: ParallelContext
    buckets: list[Bucket]
    overlap: bool
    zero: bool
    reduce_dtype: torch.dtype
    expecting: bool = field(default=False)

    def zero_grad(self) -> None:
        """Forget all gradients: call before the first microbatch."""
        for b in self.buckets:
            b.grads.zero_()
            b.started, b.reducing = False, None

    def expect_last_gradients(self, coming: Iterable[Parameter]) -> None:
        """The gradients of these parameters are the last of this step: reduce every bucket as it completes."""
        self.expecting = self.overlap
        wanted = {id(p) for p in coming}
        for b in self.buckets:
            b.missing = sum(id(p) in wanted for p in b.params)
            if self.expecting and not b.missing and not b.late:
                self._start(b)

    def reduce(self) -> None:
        """This stage's backward is over: start whatever has not started yet (the REDUCE action)."""
        self.expecting = False
        for b in self.buckets:
            if not b.started and not b.late:
                self._start(b)

    def wait(self) -> None:
        """The plan is over: return when every gradient held is the global sum."""
        for b in self.buckets:
            assert b.started or b.late, "reduce() comes before wait()"
            if not b.started:
                self._start(b)
        for b in self.buckets:
            if b.reducing is not None:
                total, target = b.reducing.wait(), b.part(b.grads, b.held)
                if total.data_ptr() != target.data_ptr():
                    target.copy_(total)
                b.reducing = None

    def gather(self, *, overlap: bool) -> None:
        """ZeRO-1: send every rank's range of the weights to the others, those of the first layers first."""
        if self.zero:
            for b in reversed(self.buckets):
                b.gathering = all_gather_into_start(b.values, self.ctx.data)
                if not overlap:
                    b.wait_for_weights()

    def wait_for_weights(self) -> None:
        """Return when all weights are there: before they are read by anything but a forward."""
        for b in self.buckets:
            b.wait_for_weights()

    def _arrived(self, bucket: Bucket) -> None:
        if self.expecting:
            bucket.missing -= 1
            if bucket.missing == 0 and not bucket.late:
                self._start(bucket)

    def _start(self, bucket: Bucket) -> None:
        bucket.started = True
        self._add_parts(bucket)
        x = bucket.grads.to(self.reduce_dtype)
        bucket.reducing = reduce_scatter_start(x, self.ctx.data) if self.zero else all_reduce_start(x, self.ctx.data)

    def _add_parts(self, bucket: Bucket) -> None:
        """Sum the gradients of replicated values, one message for all of an axis."""
        parts: dict[str, list[Tensor]] = {}
        for index, p in enumerate(bucket.params):
            main = bucket.view(bucket.grads, index)
            for piece in p.spec.pieces(self.ctx):
                for name in piece.sum_over:
                    if self.ctx.axis(name).size > 1:
                        parts.setdefault(name, []).append(piece.of(main))
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
    """Move parameters into flat buckets, in reverse order (the backward's), and route their gradients there.

    Bias- and norm-like parameters (no decay) and late ones (tied over the pipeline) get buckets of their own.
    reduce_dtype: of sums over several data ranks; None for grad_dtype.
    """
    groups: dict[tuple[bool, bool], list[list[Parameter]]] = {}
    for p in reversed(params):
        late = any("tied_stages" in c.sum_over for c in p.spec.chunks)
        runs = groups.setdefault((p.spec.decay, late), [[]])
        if runs[-1] and sum(q.numel() for q in runs[-1]) * grad_dtype.itemsize >= bucket_bytes:
            runs.append([])
        runs[-1].append(p)
    if reduce_dtype is None or ctx.data.size == 1:  # alone there is nothing to sum, and so nothing to round
        reduce_dtype = grad_dtype
    made = GradBuckets(ctx, [], overlap, zero and ctx.data.size > 1, reduce_dtype)
    for (decay, late), runs in groups.items():
        made.buckets += [_make_bucket(run, ctx, grad_dtype, decay, late, made.zero) for run in runs]
    for bucket in made.buckets:
        for index, p in enumerate(bucket.params):
            _route(p, bucket, index, made)
    return made


def wait_before_use(modules: Iterable[nn.Module], stages: Iterable[GradBuckets]) -> None:
    """Have every module wait for its own weights before its forward, so that their gather overlaps what runs before."""
    holder = {id(p): bucket for stage in stages if stage.zero for bucket in stage.buckets for p in bucket.params}
    for module in modules:
        for part in module.modules():
            for p in part.parameters(recurse=False):
                if id(p) in holder:
                    part.register_forward_pre_hook(_settler(holder[id(p)]))


def _settler(bucket: Bucket) -> Callable[[nn.Module, Any], None]:
    return lambda module, args: bucket.wait_for_weights()


def _make_bucket(
    params: list[Parameter], ctx: ParallelContext, grad_dtype: torch.dtype, decay: bool, late: bool, zero: bool
) -> Bucket:
    starts, total = [], 0
    for p in params:
        starts.append(total)
        total += -(-p.numel() // _ALIGN) * _ALIGN
    share = -(-total // (_ALIGN * ctx.data.size)) * _ALIGN
    total = share * ctx.data.size
    own = range(ctx.data.rank * share, (ctx.data.rank + 1) * share)
    values = torch.zeros(total, dtype=ctx.dtype, device=ctx.device)
    grads = torch.zeros(total, dtype=grad_dtype, device=ctx.device)
    bucket = Bucket(params, starts, values, grads, decay, late, own, own if zero else range(total))
    for index, p in enumerate(params):
        view = bucket.view(values, index)
        view.copy_(p.detach())
        p.data = view
    return bucket


def _route(p: Parameter, bucket: Bucket, index: int, owner: GradBuckets) -> None:
    """Send the parameter's gradients to its main gradient, whichever way they come.

    Our own GEMMs add there themselves and call `on_grad`; for the rest (norm weights) autograd fills `.grad`, which
    is moved over as soon as it is there.
    """
    p.main_grad = bucket.view(bucket.grads, index)
    p.on_grad = lambda: owner._arrived(bucket)

    p.register_post_accumulate_grad_hook(_move)


def _move(p: Tensor) -> None:
    """The hook of all parameters. It holds none itself: Python cannot free what a hook holds of the tensor it is on."""
    assert isinstance(p, Parameter)
    if p.grad is None:  # our own op has added it; torch 2.13 calls the hook all the same
        return
    assert p.main_grad is not None and p.on_grad is not None
    p.main_grad.add_(p.grad)
    p.grad = None
    p.on_grad()
