"""Parameters that carry a ShardSpec: creation, their values on this rank, initialisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.distributed.context import ParallelContext
from engine.distributed.specs import Piece, ShardSpec
from engine.ops.draws import Key, normal, rectangle

_SLAB = 1 << 20  # initial values drawn at a time: 4 MiB


def piece_of(piece: Piece, local: Tensor) -> Tensor:
    """The piece as a view of the local parameter (or of a contiguous tensor of the same shape)."""
    return local.view(-1)[piece.begin : piece.end].view(piece.shape)


def cut_piece(piece: Piece, canonical: Tensor) -> Tensor:
    """The piece as a view of the whole canonical tensor."""
    for dim, (offset, length) in enumerate(zip(piece.offset, piece.shape)):
        canonical = canonical.narrow(dim, offset, length)
    return canonical


class Parameter(nn.Parameter):
    """A parameter with its ShardSpec, and with the destination of its gradient.

    main_grad: a view into a flat gradient bucket (set by GradBuckets) to which the gradient of every microbatch is
    added; while it is None, gradients are ordinary autograd gradients in `.grad`. on_grad: called after each addition,
    so that the bucket knows when it is complete. deferred: while it is a list, matmuls append their weight gradients to
    it (ops.linear.WeightGrad) instead of computing them.
    """

    spec: ShardSpec
    main_grad: Tensor | None
    on_grad: Callable[[], None] | None
    deferred: list[Any] | None

    def __new__(cls, data: Tensor, spec: ShardSpec) -> Parameter:
        self = super().__new__(cls, data, spec.trainable)
        self.spec = spec
        self.main_grad = None
        self.on_grad = None
        self.deferred = None
        return self

    def __init__(self, data: Tensor, spec: ShardSpec) -> None:
        super().__init__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Parameter:
        raise TypeError("a sharded Parameter is not copied: build the module again from its config")

    def freeze(self) -> None:
        """Make the parameter untrainable: no gradient, no optimizer state. Call before it is in a gradient bucket."""
        assert self.main_grad is None, self.name
        self.spec = replace(self.spec, trainable=False)
        self.requires_grad_(False)

    @property
    def name(self) -> str:
        """The canonical names of its chunks, for messages: `layers.0.attention.q.weight+...k.weight`."""
        return "+".join(c.name for c in self.spec.chunks)


def new_parameter(spec: ShardSpec, ctx: ParallelContext) -> Parameter:
    """An uninitialised parameter of the spec's local shape, in the context's dtype and device."""
    return Parameter(torch.empty(spec.local_shape(), dtype=ctx.dtype, device=ctx.device), spec)


def parameters(module: nn.Module) -> list[Parameter]:
    """The module's parameters, each once, in module order; every one of them carries a spec."""
    found = list(module.parameters())
    for p in found:
        assert isinstance(p, Parameter), "every parameter of a parallel model is a sharding.Parameter"
    return found  # type: ignore[return-value]


def units(module: nn.Module) -> list[list[Parameter]]:
    """The module's parameters by unit, each once, in module order.

    A unit is an entry of one of the module's own lists or dicts of modules (a block), or everything between two such
    entries (the embeddings; the final norm and the head).
    """
    found: list[list[Parameter]] = [[]]
    seen: set[int] = set()
    for child in module.children():
        blocks = isinstance(child, nn.ModuleDict | nn.ModuleList)
        for part in child.children() if blocks else (child,):
            if blocks:
                found.append([])
            for p in parameters(part):
                if id(p) not in seen:
                    seen.add(id(p))
                    found[-1].append(p)
        if blocks:
            found.append([])
    assert len(seen) == len(list(module.parameters())), "a parameter that is in no child module"
    return [unit for unit in found if unit]


def initialise_(params: Iterable[Parameter], ctx: ParallelContext, seed: int) -> None:
    """Initialise parameters in place, with values that do not depend on layout, device or dtype.

    A value is drawn in float32 from (seed, name) at its place in the canonical tensor (engine.ops.draws), so each rank
    draws only the pieces that it holds.
    """
    with torch.no_grad():
        for p in params:
            p.zero_()
            for piece in p.spec.pieces(ctx):
                if 0 in piece.shape:  # only padding
                    continue
                local, std = piece_of(piece, p), p.spec.init_std
                if std is None:
                    local.fill_(p.spec.init_value)
                    continue
                key, width = Key.of(seed, "init", name=piece.name), piece.shape[-1]
                places = rectangle(piece.global_shape, piece.offset, piece.shape, ctx.device)
                rows = max(1, _SLAB // width)
                for part, drawn in zip(local.view(-1, width).split(rows), places.split(rows)):
                    part.copy_(normal(key, drawn).mul_(std))
