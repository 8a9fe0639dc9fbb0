"""The optimizer: applies the update rule of each parameter group to the flat gradient buckets.

Master weights: with fp32 and fp64 they are the bucket's values; with bf16 and fp16 they are a copy in the gradients'
dtype, which each update rounds into the values. State has the dtype of the master weights. Under ZeRO-1 a rank holds
master weights and state only of its range of each bucket, and the weights are all-gathered after the update. A frozen
parameter has no master weights and no state: its values are what checkpoints contain.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from engine.config.schema import OptimizerConfig
from engine.distributed.collectives import all_gather
from engine.distributed.context import ParallelContext
from engine.distributed.sharding import Parameter, cut_piece
from engine.distributed.specs import Chunk
from engine.optim.groups import ParameterGroup, group_of
from engine.optim.update_rules import MODEL, RULES
from engine.parallel.gradients import Bucket, GradBuckets


@dataclass(frozen=True)
class StateShard:
    """This rank's contiguous row-major slice [begin, begin + len(flat)) of one state of one parameter.

    kind: MODEL (master weights), or a kind of state of the parameter's rule, such as "exp_avg".
    """

    kind: str
    param: Parameter
    begin: int
    flat: Tensor


def _identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class View:
    """What a rule updates: flat ranges, or if it needs whole matrices, this rank's rectangle of one canonical tensor.

    master, grad, states (by kind): of the same shape and dtype. low: the rounded weights, None if the master weights
    are the model's weights. whole: rectangle -> the whole canonical tensor, gathered over the tensor ranks; cut: whole
    tensor -> this rank's rectangle. For flat ranges both are the identity.
    """

    master: Tensor
    grad: Tensor
    states: Mapping[str, Tensor]
    low: Tensor | None
    whole: Callable[[Tensor], Tensor] = _identity
    cut: Callable[[Tensor], Tensor] = _identity


class Rule(Protocol):
    """An update rule (engine.optim.update_rules lists them). rounds: `update` writes view.low itself."""

    rounds: bool

    def update(self, view: View, lr: float, weight_decay: float, grad_scale: float, step: int) -> None:
        """Update view.master and view.states in place, from view.grad * grad_scale; step: 1 for the first update.

        The result must not depend on which range or rectangle is here. All ranks that hold a part of a canonical tensor
        call a rule that needs whole matrices at the same time, so that it may call view.whole.
        """


def make_rule(name: str, cfg: OptimizerConfig) -> Rule:
    """The rule of this name in RULES."""
    module, _, attribute = RULES[name].maker.partition(":")
    rule: Rule = getattr(importlib.import_module(module), attribute)(cfg)
    return rule


@dataclass
class _Run:
    """Consecutive parameters of a bucket in one group, as far as this rank updates them.

    indices: of these parameters in the bucket. span: their range of the bucket's flat tensors. master, states (by
    kind): of this range.
    """

    ctx: ParallelContext
    bucket: Bucket
    group: ParameterGroup
    indices: list[int]
    span: range
    master: Tensor
    states: dict[str, Tensor]

    def low(self) -> Tensor | None:
        """The low-precision weights of the model, or None if the master weights are the model's weights."""
        values = self.bucket.view_range(self.bucket.values, self.span)
        return None if values.dtype == self.master.dtype else values

    def views(self) -> Iterator[View]:
        """What the rule updates: the whole range at once, or each canonical tensor."""
        grad, low = self.bucket.view_range(self.bucket.grads, self.span), self.low()
        if not self.group.whole_matrices:
            yield View(self.master, grad, self.states, low)
            return
        for index in self.indices:
            spec, at = self.bucket.params[index].spec, self.bucket.starts[index] - self.span.start
            for chunk, piece in zip(spec.chunks, spec.pieces(self.ctx)):

                def part(flat: Tensor, begin: int = at + piece.begin, shape: tuple[int, ...] = piece.shape) -> Tensor:
                    return flat[begin : begin + math.prod(shape)].view(shape)

                states = {kind: part(flat) for kind, flat in self.states.items()}
                whole = partial(gather_whole, chunk=chunk, ctx=self.ctx)
                rounded = None if low is None else part(low)
                yield View(part(self.master), part(grad), states, rounded, whole, partial(cut_piece, piece))


def gather_whole(local: Tensor, chunk: Chunk, ctx: ParallelContext) -> Tensor:
    """The whole canonical tensor from every rank's rectangle of it. Collective over the axes of its cuts."""
    shape = chunk.local_shape()
    x = local
    if x.shape[0] < shape[0]:  # the last part, which padding rows complete
        x = local.new_zeros(shape)
        x[: len(local)] = local
    for cut in chunk.cuts:
        axis = ctx.axis(cut.axis)
        parts = all_gather(x[None], axis)[:: axis.size // cut.parts]
        x = torch.cat(parts.unbind(), cut.dim)
    return x[: chunk.shape[0]]


class Optimizer:
    """Updates the parameters of all pipeline stages on this rank, each by the rule and settings of its group.

    overlap: `step` returns while the all-gathers of ZeRO-1 are in flight. steps: number of updates done.
    """

    def __init__(self, stages: Sequence[GradBuckets], cfg: OptimizerConfig, *, overlap: bool = True):
        self.stages, self.overlap = stages, overlap
        self.steps = 0
        self.runs = [run for stage in stages for bucket in stage.buckets for run in _runs(stage.ctx, bucket, cfg)]
        self.rules = {name: make_rule(name, cfg) for name in sorted({run.group.rule for run in self.runs})}

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Update all trainable parameters from the buckets' gradients times grad_scale (clipping, fp16 loss scale).

        lr: learning rate of groups with factor 1. The gradients are not modified.
        """
        self.steps += 1
        for run in self.runs:
            group, rule = run.group, self.rules[run.group.rule]
            for view in run.views():
                rule.update(view, lr * group.lr_factor, group.weight_decay, grad_scale, self.steps)
                if view.low is not None and not rule.rounds:
                    view.low.copy_(view.master)
        self._gather()

    def masters_to_weights(self) -> None:
        """Round the master weights into the model's weights and all-gather them; call after loading master weights."""
        for run in self.runs:
            low = run.low()
            if low is not None:
                low.copy_(run.master)
        self._gather()

    def _gather(self) -> None:
        for stage in self.stages:
            stage.gather(overlap=self.overlap)

    def states(self, *, owned: bool = False) -> Iterator[StateShard]:
        """The state shards of this rank; owned: only those that it, and no other replica, writes to a checkpoint.

        Frozen parameters have one shard: their values, in the model's dtype.
        """
        for run in self.runs:
            bucket = run.bucket
            span = bucket.owned_range if owned else bucket.update_range
            for index in run.indices:
                begin, end = bucket.intersection(index, span)
                at = bucket.starts[index] + begin - run.span.start
                for kind, flat in ((MODEL, run.master), *run.states.items()):
                    if begin < end:
                        yield StateShard(kind, bucket.params[index], begin, flat[at : at + end - begin])
        for stage in self.stages:
            for p in stage.frozen:
                begin, end = _share(p, stage.ctx) if owned else (0, p.numel())
                if begin < end:
                    yield StateShard(MODEL, p, begin, p.data.view(-1)[begin:end])


def _share(p: Parameter, ctx: ParallelContext) -> tuple[int, int]:
    """The elements [begin, end) of a frozen parameter that this one of its replicas writes to checkpoints."""
    axis, count = ctx.axis(p.spec.replicas), p.numel()
    share = -(-count // axis.size)
    return min(axis.rank * share, count), min((axis.rank + 1) * share, count)


def _runs(ctx: ParallelContext, bucket: Bucket, cfg: OptimizerConfig) -> Iterator[_Run]:
    """The runs of a bucket that this rank updates; together they are its `update_range`."""
    ends = [*bucket.starts[1:], len(bucket.values)]
    groups = [group_of(p.spec, cfg) for p in bucket.params]
    for group, indices in itertools.groupby(range(len(groups)), groups.__getitem__):
        run = list(indices)
        begin, end = bucket.starts[run[0]], ends[run[-1]]
        span = range(max(begin, bucket.update_range.start), min(end, bucket.update_range.stop))
        if len(span):
            values = bucket.view_range(bucket.values, span)
            master = values if values.dtype == bucket.grads.dtype else values.to(bucket.grads.dtype)
            states = {kind: torch.zeros_like(master) for kind in group.states}
            held = [i for i in run if bucket.starts[i] < span.stop and span.start < ends[i]]
            yield _Run(ctx, bucket, group, held, span, master, states)
