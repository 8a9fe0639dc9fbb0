"""Collectives, their autograd pairs, and small agreements between ranks. Each takes an Axis; size 1 is the identity.

Objects cross ranks as JSON bytes only: torch's object collectives pickle, and a pickle from a peer is code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.context import Axis
from engine.errors import EngineError

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def all_reduce_(x: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """Reduce `x` in place over the axis ("sum", "max", "min") and return it."""
    if axis.size > 1:
        dist.all_reduce(x, _OPS[op], group=axis.group)
    return x


def all_reduce_start(x: Tensor, axis: Axis) -> dist.Work | None:
    """Start summing `x` in place over the axis; wait on the returned work before reading (None: nothing to do)."""
    return dist.all_reduce(x, group=axis.group, async_op=True) if axis.size > 1 else None


def all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Concatenate every rank's `x` (equal shapes) along `dim`, in axis order. Not differentiable."""
    if axis.size == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return torch.cat(parts, dim)


class _ReduceFrom(torch.autograd.Function):
    """Megatron's g: all-reduce forward, identity backward (Shoeybi et al. 2019, figure 3). Its mirror image f lives
    in ops.linear, where the all-reduce of the backward overlaps the weight gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce_(x.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Leave a tensor-parallel region: partial sums `x` become their sum; the gradient passes unchanged."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)


def post(
    sends: Sequence[tuple[Tensor, int]], recvs: Sequence[tuple[Tensor, int]], axis: Axis
) -> tuple[list[dist.Work], list[dist.Work]]:
    """Post sends and receives together as one batch; peers are positions on the axis. Returns (sent, received) works.

    A tensor being sent must not change before its work is done. NCCL has no tags: the k-th send to a peer meets the
    k-th receive there, which the pipeline plan's check has proven to be the right one. NCCL also answers a batch with
    one work for all of it, which is then the receives' if there are any.
    """
    ops = [dist.P2POp(dist.isend, x, axis.ranks[peer], axis.group) for x, peer in sends]
    ops += [dist.P2POp(dist.irecv, x, axis.ranks[peer], axis.group) for x, peer in recvs]
    works = dist.batch_isend_irecv(ops)
    cut = len(sends) if len(works) == len(ops) or not recvs else 0
    return works[:cut], works[cut:]


def gather_json(value: Any, axis: Axis, device: torch.device) -> list[Any]:
    """Every rank's JSON-serialisable `value`, in axis order, on every rank."""
    if axis.size == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    sizes = all_gather(torch.tensor([data.numel()], device=device), axis, 0).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    rows = all_gather(padded[None], axis, 0).cpu().numpy()
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def raise_together(error: EngineError | None, axis: Axis, device: torch.device) -> None:
    """If any rank of the axis brings an error, raise it on all of them, naming the first rank that has one."""
    texts = gather_json(None if error is None else str(error), axis, device)
    if error is not None:
        raise error
    for index, text in enumerate(texts):
        if text is not None:
            raise EngineError(f"rank {axis.ranks[index]}: {text}")


def on_first_rank(work: Callable[[], Any], axis: Axis, device: torch.device) -> Any:
    """Run `work` on the first rank of the axis while the others wait; its JSON-serialisable result is everybody's.

    So is its EngineError. What depends on a file system is decided this way: two ranks may see it differently.
    """
    error: EngineError | None = None
    result: Any = None
    if axis.rank == 0:
        try:
            result = work()
        except EngineError as fault:
            error = fault
    raise_together(error, axis, device)
    return gather_json(result, axis, device)[0]
