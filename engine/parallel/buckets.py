"""Flat gradient buckets: main gradients in one contiguous tensor each, reduced over the data ranks as they complete.

Goal: the reduction of a bucket runs while the backward of earlier layers still computes. Invariants:

* A bucket's `values` hold the parameters (each parameter is a view into it) and `grads` their main gradients, in the
  same order at the same offsets: the optimizer is a function of flat tensors.
* Gradients add up over microbatches and are *summed* over data ranks: the loss is already divided by the global token
  count, so nothing is averaged.
* Communication order is the order in which buckets complete; autograd runs the same graph on every rank of an axis,
  so it is the same on all of them. Sums that need both pipeline ends (tied embeddings) wait for `reduce`, because the
  two ends finish at different times ("late" buckets).
* Partial gradients of replicated values (spec `sum_over`) are added over their axis before the data reduction.

What breaks if wrong: a missed sum shows as a loss curve that looks fine and a gradient norm that does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from engine.comm import all_reduce_, all_reduce_start
from engine.context import ParallelContext
from engine.sharding import Parameter

_ALIGN = 64  # elements: every parameter starts on its own cache line, whatever the dtype


@dataclass
class Bucket:
    """Parameters that are stored, reduced and updated together. decay: weight decay applies to all of them."""

    params: list[Parameter]
    starts: list[int]
    values: Tensor
    grads: Tensor
    decay: bool
    late: bool
    missing: int = 0
    started: bool = False
    work: dist.Work | None = None

    def view(self, flat: Tensor, index: int) -> Tensor:
        """Parameter number `index` as a view of a flat tensor laid out like this bucket."""
        p = self.params[index]
        return flat[self.starts[index] : self.starts[index] + p.numel()].view(p.shape)


@dataclass
class GradBuckets:
    """All buckets of one pipeline stage. See the module text for order and invariants."""

    ctx: ParallelContext
    buckets: list[Bucket]
    overlap: bool
    armed: bool = field(default=False)

    def zero(self) -> None:
        """Forget all gradients: call before the first microbatch."""
        for b in self.buckets:
            b.grads.zero_()
            b.started, b.work = False, None

    def arm(self) -> None:
        """The next backward is the last one of this step: reduce every bucket as soon as it is complete."""
        self.armed = self.overlap
        for b in self.buckets:
            b.missing = len(b.params)

    def reduce(self) -> None:
        """This stage's backward is over: start whatever has not started yet (the REDUCE action)."""
        self.armed = False
        for b in self.buckets:
            if not b.started and not b.late:
                self._start(b)

    def wait(self) -> None:
        """The plan is over: return when every gradient is the global sum."""
        for b in self.buckets:
            assert b.started or b.late, "reduce() comes before wait()"
            if not b.started:
                self._start(b)
        for b in self.buckets:
            if b.work is not None:
                b.work.wait()
                b.work = None

    def _arrived(self, bucket: Bucket) -> None:
        if self.armed:
            bucket.missing -= 1
            if bucket.missing == 0 and not bucket.late:
                self._start(bucket)

    def _start(self, bucket: Bucket) -> None:
        bucket.started = True
        for index, p in enumerate(bucket.params):
            main = bucket.view(bucket.grads, index)
            for piece in p.spec.pieces(self.ctx):
                for name in piece.sum_over:
                    if self.ctx.axis(name).size > 1:
                        part = piece.of(main)
                        part.copy_(all_reduce_(part.contiguous(), self.ctx.axis(name)))
        bucket.work = all_reduce_start(bucket.grads, self.ctx.data)


def make_buckets(
    params: Sequence[Parameter], ctx: ParallelContext, *, grad_dtype: torch.dtype, bucket_bytes: int, overlap: bool
) -> GradBuckets:
    """Move parameters into flat buckets, in reverse order (the backward's), and route their gradients there.

    Bias- and norm-like parameters (no decay) and late ones (tied over the pipeline) get buckets of their own.
    """
    groups: dict[tuple[bool, bool], list[list[Parameter]]] = {}
    for p in reversed(params):
        late = any("ends" in c.sum_over for c in p.spec.chunks)
        runs = groups.setdefault((p.spec.decay, late), [[]])
        if runs[-1] and sum(q.numel() for q in runs[-1]) * grad_dtype.itemsize >= bucket_bytes:
            runs.append([])
        runs[-1].append(p)
    made = GradBuckets(ctx, [], overlap)
    for (decay, late), runs in groups.items():
        made.buckets += [_make_bucket(run, ctx, grad_dtype, decay, late) for run in runs]
    for bucket in made.buckets:
        for index, p in enumerate(bucket.params):
            _route(p, bucket, index, made)
    return made


def _make_bucket(
    params: list[Parameter], ctx: ParallelContext, grad_dtype: torch.dtype, decay: bool, late: bool
) -> Bucket:
    starts, total = [], 0
    for p in params:
        starts.append(total)
        total += -(-p.numel() // _ALIGN) * _ALIGN
    values = torch.zeros(total, dtype=ctx.dtype, device=ctx.device)
    grads = torch.zeros(total, dtype=grad_dtype, device=ctx.device)
    bucket = Bucket(params, starts, values, grads, decay, late)
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

    def move(_: Tensor) -> None:
        if p.grad is None:  # our own op has added it; torch 2.13 calls the hook all the same
            return
        assert p.main_grad is not None and p.on_grad is not None
        p.main_grad.add_(p.grad)
        p.grad = None
        p.on_grad()

    p.register_post_accumulate_grad_hook(move)
