"""Canonical tensors of a training state, assembled from the rectangles of all ranks, and their differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.distributed.context import ParallelContext
from engine.distributed.sharding import Parameter, piece_of
from engine.optim.optimizer import StateShard
from engine.optim.update_rules import MODEL
from engine.train.state import TrainState

Array = np.ndarray[Any, Any]
Pieces = list[tuple[str, tuple[int, ...], tuple[int, ...], Array]]  # (name, global shape, offset, float64 values)
_FLOOR = 1e-4


def pieces_of(params: Iterable[tuple[Parameter, torch.Tensor]], ctx: ParallelContext) -> Pieces:
    """Every piece of parameters that this rank holds, replicas included. params: (parameter, its values)."""
    return [
        (piece.name, piece.global_shape, piece.offset, piece_of(piece, x.detach()).double().numpy().copy())
        for p, x in params
        for piece in p.spec.pieces(ctx)
    ]


def weights_of(state: TrainState) -> Pieces:
    """The weights of all stages on this rank."""
    state.wait_for_weights()
    return pieces_of(((p, p) for p in state.params), state.ctx)


def shard_pieces(held: Iterable[StateShard], ctx: ParallelContext) -> Pieces:
    """The pieces of flat ranges of parameters, such as optimizer state; their names are kind/name."""
    found: Pieces = []
    for part in held:
        for piece in part.param.spec.pieces(ctx):
            for offset, shape, first in piece.rectangles(part.begin, part.begin + len(part.flat)):
                values = part.flat[first - part.begin :][: math.prod(shape)].view(shape)
                name = f"{part.kind}/{piece.name}"
                found.append((name, piece.global_shape, offset, values.detach().double().numpy().copy()))
    return found


def gradients_of(state: TrainState) -> Pieces:
    """The reduced gradients of this rank after a step, before clipping (AdamW clips without changing them)."""
    held = []
    for bucket in (b for stage in state.buckets for b in stage.buckets):
        for index, p in enumerate(bucket.params):
            begin, end = bucket.intersection(index, bucket.update_range)
            if begin < end:
                start = bucket.starts[index]
                held.append(StateShard("grad", p, begin, bucket.grads[start + begin : start + end].clone()))
    return shard_pieces(held, state.ctx)


def optimizer_states_of(state: TrainState) -> Pieces:
    """The optimizer state that this rank owns, without the weights."""
    return shard_pieces((held for held in state.optimizer.states(owned=True) if held.kind != MODEL), state.ctx)


@dataclass(frozen=True)
class Assembled:
    """Canonical tensors by name. faults: tensors whose replicas differ, or that the ranks do not cover."""

    tensors: dict[str, Array]
    faults: dict[str, str]


def assemble(ranks: Iterable[Pieces]) -> Assembled:
    """Assemble the canonical tensors of all ranks' pieces."""
    whole: dict[str, Array] = {}
    covered: dict[str, Array] = {}
    faults: dict[str, str] = {}
    for pieces in ranks:
        for name, shape, offset, values in pieces:
            target = whole.setdefault(name, np.zeros(shape))
            rectangle = tuple(slice(o, o + n) for o, n in zip(offset, values.shape))
            held = covered.setdefault(name, np.zeros(shape, bool))
            there = held[rectangle]
            if not np.array_equal(target[rectangle][there], values[there], equal_nan=True):
                faults.setdefault(name, "replicas differ")
            target[rectangle], held[rectangle] = values, True
    for name, held in covered.items():
        if not held.all():
            faults[name] = f"{np.count_nonzero(~held)} of {held.size} values are on no rank"
    return Assembled(whole, faults)


def errors_of(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> dict[str, float]:
    """Name -> largest difference of a tensor, relative to its largest value; infinite where one is missing.

    A tensor whose values are all below 1e-4 of the largest value of all tensors is measured by that: gradients that are
    zero but for rounding, such as those of a key's bias, have no relative precision.
    """
    largest = max((float(np.abs(x).max(initial=0)) for x in wanted.values()), default=0.0)
    errors = dict.fromkeys(found.keys() ^ wanted.keys(), math.inf)
    for name in found.keys() & wanted.keys():
        a, b = found[name], wanted[name]
        scale = max(float(np.abs(b).max(initial=0)), _FLOOR * largest)
        different = float(np.abs(a - b).max(initial=0)) if a.shape == b.shape else math.inf
        errors[name] = 0.0 if different == 0 else different / scale if scale else math.inf
        if math.isnan(errors[name]):
            errors[name] = math.inf
    return errors
