"""Records the intermediate tensors of a step, each with its canonical name and the rectangle that a rank holds.

Hooks see the outputs of the model's modules, their gradients, and the inputs of row-parallel matmuls, which are the
outputs of attention cores and activation functions. The canonical tensor of an activation is [samples of the run,
positions, features], so micro-batches, data ranks, tensor ranks and parts of the sequence are rectangles of it;
features come from the ShardSpec of the module's weight. Gradients, optimizer states and weights are rectangles by
their specs.

With a move above 0, noise is added to all of these tensors: what rounding may do to them (`Noise`).

Everything is written to disk as it occurs (engine.proof.traces), so a rank holds no recorded tensor.

Legend: s sequence (local), b micro-batch, f features (local), n heads (local), d head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.batch import MicroBatch
from engine.distributed.collectives import all_reduce_
from engine.distributed.context import Axis, ParallelContext
from engine.distributed.sharding import Parameter
from engine.distributed.specs import Piece
from engine.model.attention import Attention
from engine.model.layers import (
    ColumnLinear,
    Norm,
    PositionEmbedding,
    RowLinear,
    ShardedRMSNorm,
    VocabEmbedding,
    VocabHead,
)
from engine.model.residual import Branch
from engine.model.transformer import Block, Transformer
from engine.ops.draws import Key, Places, uniform
from engine.pipeline.stage import Stage
from engine.proof.traces import BACKWARD, FORWARD, GRADIENTS, START, UPDATE, TensorRecord, TraceWriter
from engine.train.state import TrainState
from engine.train.step import StepResult


@dataclass(frozen=True)
class Noise:
    """The noise of a move: uniform, at most a unit times the root mean square of a row.

    unit, backward_unit: one unit in the last place of the dtype of the tensor, or, if that is more, sqrt(n) units of
    the dtype in which sums of n terms are added: as far as another order of the sums moves the result. reduced_unit:
    of reduced gradients. stored_unit: of master weights and optimizer states. move: 0 for none.
    """

    move: int
    unit: float
    backward_unit: float
    reduced_unit: float
    stored_unit: float

    def __call__(self, x: Tensor, unit: float, step: int, key: str) -> Tensor:
        """x with noise, of the same dtype; the same for the same key, so that a recomputation gets the same values."""
        rows = x.detach().reshape(-1, x.shape[-1] if x.dim() else 1).double()
        starts = torch.arange(len(rows), device=x.device) * rows.shape[1]
        drawn = uniform(Key.of(self.move, "proof", step, key), Places(starts, rows.shape[1])).double() * 2 - 1
        size = rows.square().mean(1, keepdim=True).sqrt() * unit
        return x + (drawn * size).view(x.shape).to(x.dtype)


@dataclass(frozen=True)
class Features:
    """Local features [begin, end) of a tensor, which are the features from `first` on of a canonical tensor.

    sum_over: axes whose ranks each compute a part of the gradient of the same values.
    """

    name: str
    begin: int = 0
    end: int | None = None
    first: int = 0
    sum_over: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """Where a tensor occurs: the operation that computes it, and what it holds.

    positions: axis that shards the sequence. heads: the tensor is [b, n, s, d] instead of [s, b, f]; `first` of its
    only part counts heads.
    """

    op: str
    parts: tuple[Features, ...]
    positions: Axis
    heads: bool = False

    def rectangles(self, x: Tensor, sample: int) -> Iterator[tuple[Features, Tensor, tuple[int, ...]]]:
        """Each part with its values and their offset in the canonical tensor. sample: number of the first sample."""
        if self.heads:
            (part,) = self.parts
            yield part, x, (sample, part.first, 0, 0)
            return
        rows = x.transpose(0, 1)
        for part in self.parts:
            yield part, rows[..., part.begin : part.end], (sample, self.positions.rank * rows.shape[1], part.first)


@dataclass
class Tracer:
    """Records one rank's tensors. stage, microbatch, sample: what the rank computes now. places: order of the sites."""

    state: TrainState
    writer: TraceWriter
    noise: Noise
    stage: int = 0
    microbatch: int = -1
    samples: dict[int, int] = field(default_factory=dict)
    places: dict[tuple[int, str], int] = field(default_factory=dict)
    sites: list[tuple[int, str]] = field(default_factory=list)
    seen: set[tuple[str, str, int]] = field(default_factory=set)

    @property
    def step(self) -> int:
        return self.state.step + 1

    def activation(self, site: Site, x: Tensor) -> Tensor:
        """Record an activation and, later, its gradient; returns it, with noise if there is a move."""
        place, label = self._place(site.op, site.parts[0].name), site.parts[0].name
        if self.noise.move:
            x = self.noise(x, self.noise.unit, self.step, f"{label} {self.microbatch} {self.state.ctx.rank}")
        where = TensorRecord((self.step, FORWARD, self.stage, place), "activation", label, site.op, self.microbatch)
        self._write(site, x, where)
        if x.requires_grad:
            x.register_hook(lambda grad: self._gradient(site, grad, where))
        return x

    def _gradient(self, site: Site, grad: Tensor, where: TensorRecord) -> Tensor | None:
        """Record the gradient of an activation. What computes it is the backward of the operation that reads it."""
        step, _, stage, place = where.key
        after, reader = (*self.sites, (-1, ""))[place + 1]
        op = f"backward of {reader if after == stage else 'the next stage'}"
        where = replace(where, key=(step, BACKWARD, -stage, -place), kind="gradient", op=op)
        if not self.noise.move:
            self._write(site, grad, where)
            return None
        key = f"{where.name} {where.microbatch} {self.state.ctx.rank} gradient"
        grad = self.noise(grad, self.noise.backward_unit, self.step, key)
        self._write(site, grad, where)
        return grad

    def _place(self, op: str, label: str) -> int:
        """The place of a tensor in the program, in the order of the first micro-batch."""
        if (self.stage, label) not in self.places:
            self.places[self.stage, label] = len(self.sites)
            self.sites.append((self.stage, f"{op} {label}"))
        return self.places[self.stage, label]

    def _write(self, site: Site, x: Tensor, where: TensorRecord) -> None:
        """Write a tensor, once for each micro-batch and step: recomputation repeats it."""
        for number, (part, values, offset) in enumerate(site.rectangles(x.detach(), self.samples[where.microbatch])):
            if (where.kind, part.name, where.microbatch) in self.seen:
                continue
            self.seen.add((where.kind, part.name, where.microbatch))
            if where.kind == "gradient":
                for axis in part.sum_over:
                    values = all_reduce_(values.clone(memory_format=torch.contiguous_format), self.state.ctx.axis(axis))
            self.writer.write(replace(where, key=(*where.key, number), name=part.name, offset=offset), values)

    def losses(self, losses: Tensor) -> Tensor:
        """Record the losses [b] of a micro-batch; returns them, with noise if there is a move."""
        place = self._place(LOSS, "losses")
        if self.noise.move:
            losses = self.noise(losses, self.noise.unit, self.step, f"losses {self.microbatch}")
        if ("losses", "", self.microbatch) not in self.seen:
            self.seen.add(("losses", "", self.microbatch))
            key, offset = (self.step, FORWARD, self.stage, place), (self.samples[self.microbatch],)
            self.writer.write(TensorRecord(key, "activation", "losses", LOSS, self.microbatch, offset), losses.detach())
        return losses

    # -- parameters

    def weights(self, phase: int) -> None:
        """Record master weights, optimizer states, and the weights of the model on every rank that holds them."""
        state, order = self.state, {id(p): i for i, p in enumerate(self.state.params)}
        state.wait_for_weights()
        for shard in state.optimizer.states():
            kind = "master weights" if shard.kind == "model" else shard.kind
            like = TensorRecord((self.step, phase, 0, order[id(shard.param)]), kind, "", "optimizer")
            self._rectangles(shard.param, shard.begin, self._stored(shard.flat, kind, self.noise.stored_unit), like)
        for p in state.params:
            like = TensorRecord((self.step, phase, 1, order[id(p)]), "weights", "", "all-gather of weights")
            self._rectangles(p, 0, self._stored(p.detach().view(-1), "weights", self.noise.unit), like)

    def _stored(self, values: Tensor, kind: str, unit: float) -> Tensor:
        """What is recorded of values that a step stores: with noise if there is a move, as the last bit may differ."""
        return self.noise(values, unit, self.step, f"{kind} {self.state.ctx.rank}") if self.noise.move else values

    def gradients(self) -> None:
        """Record the reduced gradients of this rank, before clipping; with noise if there is a move."""
        order = {id(p): i for i, p in enumerate(self.state.params)}
        for bucket in (b for stage in self.state.buckets for b in stage.buckets):
            for index, p in enumerate(bucket.params):
                begin, end = bucket.intersection(index, bucket.update_range)
                if begin >= end:
                    continue
                start = bucket.starts[index]
                whole = bucket.view(bucket.grads, index)
                if self.noise.move:
                    name = f"{p.name} {self.state.ctx.rank}"
                    whole.copy_(self.noise(whole, self.noise.reduced_unit, self.step, name))
                key = (self.step, GRADIENTS, -order[id(p)])
                flat = bucket.grads[start + begin : start + end]
                self._rectangles(p, begin, flat, TensorRecord(key, "weight gradient", "", "weight gradient"))

    def _rectangles(self, p: Parameter, begin: int, flat: Tensor, like: TensorRecord) -> None:
        for number, piece in enumerate(p.spec.pieces(self.state.ctx)):
            for offset, shape, first in piece.rectangles(begin, begin + len(flat)):
                values = flat[first - begin :][: math.prod(shape)].view(shape)
                self.writer.write(
                    TensorRecord((*like.key, number), like.kind, piece.name, like.op, like.microbatch, offset), values
                )

    def result(self, result: StepResult) -> None:
        """Record the numbers of a step, which has ended."""
        numbers = {"loss": result.loss, **result.sums, "gradient norm": result.norms.norm, "learning rate": result.lr}
        for place, (name, value) in enumerate(numbers.items()):
            key = (self.state.step, GRADIENTS, 1, place)
            record = TensorRecord(key, "number", name, "loss" if place == 0 else "step")
            number = torch.tensor(value, dtype=torch.float64)
            given = name == "learning rate"  # a function of the step
            self.writer.write(record, number if given else self._stored(number, name, self.noise.stored_unit))


LOSS = "output head and loss"


@dataclass
class _TracedStage(Stage):
    """A stage that sets in its tracer which micro-batch it computes."""

    tracer: Tracer = field(kw_only=True)
    number: int = field(kw_only=True)

    def forward(self, index: int, inputs: tuple[Tensor, ...], batch: MicroBatch) -> Any:
        first = int(batch.samples[0])
        assert torch.equal(batch.samples.cpu(), torch.arange(first, first + len(batch.samples))), "samples in order"
        self.tracer.stage, self.tracer.microbatch, self.tracer.samples[index] = self.number, index, first
        return super().forward(index, inputs, batch)

    def _propagate(self, index: int, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        self.tracer.stage, self.tracer.microbatch = self.number, index  # for blocks that are recomputed
        return super()._propagate(index, grads)


@contextmanager
def traced(state: TrainState, writer: TraceWriter, noise: Noise) -> Iterator[Tracer]:
    """Record every step of the state within the `with` block."""
    tracer = Tracer(state, writer, noise)
    stages, before = dict(state.stages), state.before_update

    def before_update() -> None:
        tracer.gradients()
        before()

    with ExitStack() as stack:
        for number, stage in stages.items():
            given = {f.name: getattr(stage, f.name) for f in fields(stage)}
            state.stages[number] = _TracedStage(**given, tracer=tracer, number=number)
            assert isinstance(stage.part, nn.Module)
            for remove in _hooks(stage.part, tracer):
                stack.callback(remove)
        state.before_update = before_update
        tracer.weights(START)
        yield tracer
        state.before_update = before
        state.stages.update(stages)


def finish_step(tracer: Tracer, result: StepResult) -> None:
    """Record what a step has computed: its numbers, the optimizer states and the weights."""
    tracer.result(result)
    tracer.state.step -= 1  # the records belong to the step that has just ended
    tracer.weights(UPDATE)
    tracer.state.step += 1
    tracer.seen.clear()


# -- the sites of the model's modules


def _hooks(part: nn.Module, tracer: Tracer) -> Iterator[Callable[[], None]]:
    """Register the hooks of all modules of a stage; yields functions that remove them."""
    ctx = tracer.state.ctx
    heads = {id(m): site for m in part.modules() if isinstance(m, Attention) for m, site in _head_norms(m, ctx)}
    for path, module in part.named_modules():
        if isinstance(module, Branch | Transformer) and module.dropout.p:
            yield _with_dropout(module, tracer)
        if isinstance(module, RowLinear):
            yield module.register_forward_pre_hook(_before(tracer, _row_input(module, ctx))).remove
        if isinstance(module, VocabHead):
            yield module.register_forward_hook(lambda _m, _i, out: (tracer.losses(out[0]), *out[1:])).remove
        elif (site := heads.get(id(module)) or _site(path, module, ctx)) is not None:
            yield module.register_forward_hook(_after(tracer, site)).remove


def _with_dropout(module: Branch | Transformer, tracer: Tracer) -> Callable[[], None]:
    """Record the result of a module's dropout, which is no module; returns a function that restores it."""
    dropout: Any = module.dropout
    site = Site("dropout", (Features(f"{dropout.name}.dropout"),), dropout.positions)
    module.dropout = lambda x, sequence: tracer.activation(site, dropout(x, sequence))  # type: ignore[assignment]

    def restore() -> None:
        module.dropout = dropout

    return restore


def _before(tracer: Tracer, site: Site) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda _module, inputs: (tracer.activation(site, inputs[0]), *inputs[1:])


def _after(tracer: Tracer, site: Site) -> Callable[[nn.Module, Any, Any], Any]:
    """A norm that adds returns (sum, norm of the sum): the sum is another tensor, computed first."""
    sums = Site("residual sum and norm", tuple(Features(f"{part.name}.sum") for part in site.parts), site.positions)

    def hook(_module: nn.Module, _inputs: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            total = out[0].view_as(out[0])  # its gradient is then that of the residual path, fused or not
            return tracer.activation(sums, total), tracer.activation(site, out[1])
        return tracer.activation(site, out)

    return hook


def _name(piece: Piece) -> str:
    return piece.name.removesuffix(".weight")


def _site(path: str, module: nn.Module, ctx: ParallelContext) -> Site | None:
    """The site of a module's output; None for modules that only call others, or that are not known here."""
    if isinstance(module, Block):
        return Site("residual sum", (Features(path),), ctx.sequence)
    if isinstance(module, ColumnLinear):
        width = module.weight.shape[1]
        pieces = module.weight.spec.pieces(ctx)
        parts = (Features(_name(p), p.begin // width, p.end // width, p.offset[0], p.sum_over) for p in pieces)
        return Site("column-parallel matmul", tuple(parts), ctx.self_axis)
    if isinstance(module, ShardedRMSNorm):
        (piece,) = module.weight.spec.pieces(ctx)
        over = tuple(name for name in piece.sum_over if "/" in name)
        return Site("norm", (Features(_name(piece), first=piece.offset[0], sum_over=over),), ctx.self_axis)
    for kind, op in _HIDDEN.items():
        if isinstance(module, kind):
            weight: Parameter = module.weight  # type: ignore[assignment]
            return Site(op, (Features(_name(weight.spec.pieces(ctx)[0])),), ctx.sequence)
    return None


_HIDDEN: dict[type[nn.Module], str] = {
    VocabEmbedding: "embedding",
    PositionEmbedding: "position embedding",
    RowLinear: "row-parallel matmul",
    Norm: "norm",
}


def _row_input(module: RowLinear, ctx: ParallelContext) -> Site:
    (piece,) = module.weight.spec.pieces(ctx)
    op = "attention core" if ".attention." in piece.name else "activation function"
    return Site(op, (Features(f"{_name(piece)}.input", first=piece.offset[1]),), ctx.self_axis)


def _head_norms(module: Attention, ctx: ParallelContext) -> Iterator[tuple[nn.Module, Site]]:
    """The norms of q and k per head, whose tensors are [b, n, s, d]."""
    for norm, piece in zip(module.head_norms or (), module.qkv.weight.spec.pieces(ctx)):
        part = Features(f"{_name(piece)}_norm", first=piece.offset[0] // module.d, sum_over=piece.sum_over)
        yield norm, Site("norm", (part,), ctx.self_axis, heads=True)
