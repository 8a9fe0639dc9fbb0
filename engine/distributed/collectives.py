"""Collectives, one with autograd, and small agreements between ranks. Each takes an Axis; size 1 is the identity.

CPU ranks of one host use shared memory if the axis has a link (shared_memory.py), else the process group.

Every call adds the bytes this rank sends, assuming ring algorithms, to `axis.traffic` under (axis name, collective):
all-reduce of X bytes over n ranks 2 X (n-1)/n, all-gather and reduce-scatter X (n-1)/n with X the full size, a send X.

Objects are sent to other ranks as JSON only: torch's object collectives use pickle, and a pickle from a peer can run
code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from engine.distributed.board import Board, Waitable
from engine.distributed.context import Axis
from engine.errors import EngineError

# torch 2.13 calls these _single and warns about the names of 2.11
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


@dataclass
class Pending:
    """Result of an asynchronous operation. Until `wait()` returns it, neither it nor the input may be touched."""

    value: Tensor
    work: Waitable | None = None
    board: Board | None = None

    def wait(self) -> Tensor:
        """The finished tensor; a second wait costs nothing."""
        if self.work is not None:
            if self.board is None:
                self.work.wait()
            else:
                self.board.wait(self.work)
            self.work = None
        return self.value


def _count(axis: Axis, collective: str, num_bytes: float) -> None:
    axis.traffic[axis.name, collective] += num_bytes


def _ring(x: Tensor, axis: Axis) -> float:
    """Bytes a rank sends to pass a tensor of x's size once around the ring."""
    return x.numel() * x.element_size() * (axis.size - 1) / axis.size


def all_reduce_start(x: Tensor, axis: Axis, op: str = "sum") -> Pending:
    """Start reducing `x` in place over the axis ("sum", "max", "min")."""
    if axis.size == 1:
        return Pending(x)
    _count(axis, "all_reduce", 2 * _ring(x, axis))
    if axis.link is not None:
        return Pending(x, axis.link.all_reduce(x, op), axis.board)
    return Pending(x, dist.all_reduce(x, _OPS[op], group=axis.group, async_op=True), axis.board)


def all_reduce_(x: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """Reduce `x` in place over the axis and return it."""
    return all_reduce_start(x, axis, op).wait()


def all_gather_start(x: Tensor, axis: Axis) -> Pending:
    """Start concatenating every rank's `x` (equal shapes) along the first dim, in axis order. Not differentiable."""
    if axis.size == 1:
        return Pending(x)
    out = x.new_empty((axis.size * x.shape[0], *x.shape[1:]))
    _count(axis, "all_gather", _ring(out, axis))
    if axis.link is not None:
        return Pending(out, axis.link.all_gather(out, x.contiguous()), axis.board)
    return Pending(out, _all_gather(out, x.contiguous(), group=axis.group, async_op=True), axis.board)


def all_gather(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Concatenate every rank's `x` (equal shapes) along `dim`, in axis order. Not differentiable."""
    if axis.size == 1:
        return x
    return all_gather_start(x.movedim(dim, 0), axis).wait().movedim(0, dim)


def all_gather_into_start(x: Tensor, axis: Axis) -> Pending:
    """Start an in-place all-gather of flat `x` [n * axis.size]: each rank's part is already at its position."""
    if axis.size == 1:
        return Pending(x)
    _count(axis, "all_gather", _ring(x, axis))
    part = x.view(axis.size, -1)[axis.rank]
    if axis.link is not None:
        return Pending(x, axis.link.all_gather(x, part), axis.board)
    return Pending(x, _all_gather(x, part, group=axis.group, async_op=True), axis.board)


def reduce_scatter_start(x: Tensor, axis: Axis) -> Pending:
    """Start a reduce-scatter (sum) of `x`; the result is this rank's part of the first dim, a new tensor."""
    if axis.size == 1:
        return Pending(x)
    if x.shape[0] % axis.size:
        raise ValueError(f"the first dim of {list(x.shape)} is not a multiple of the {axis.size} ranks of {axis.name}")
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    _count(axis, "reduce_scatter", _ring(x, axis))
    if axis.link is not None:
        return Pending(out, axis.link.reduce_scatter(out, x.contiguous()), axis.board)
    return Pending(out, _reduce_scatter(out, x.contiguous(), group=axis.group, async_op=True), axis.board)


def reduce_partial_sums_start(x: Tensor, replicated: Axis, sequence: Axis) -> Pending:
    """Start reducing partial sums over the tensor ranks: an all-reduce, or a reduce-scatter along the sequence.

    At most one of the two axes has more than one rank. The all-reduce changes x in place.
    """
    return (
        all_reduce_start(x, replicated)
        if sequence.size == 1
        else reduce_scatter_start(all_reduce_(x, replicated), sequence)
    )


class _ReducePartialSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, replicated: Axis, sequence: Axis) -> Tensor:
        ctx.sequence = sequence
        if replicated.size > 1:  # the all-reduce is in place and x is the caller's; a reduce-scatter makes a new tensor
            x = x.clone(memory_format=torch.contiguous_format)
        return reduce_partial_sums_start(x, replicated, sequence).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad, ctx.sequence), None, None


def reduce_partial_sums(x: Tensor, replicated: Axis, sequence: Axis) -> Tensor:
    """Leave a tensor-parallel region: reduce partial sums `x` [s, ...]; under sequence parallelism scatter along s.

    Forward all-reduce, backward identity (Megatron's g: Shoeybi et al. 2019, figure 3), or forward reduce-scatter,
    backward all-gather (Korthikanti et al. 2022, figure 5). Its conjugate is in ops.linear, where the reduction of the
    backward overlaps the weight gradient.
    """
    return x if replicated.size == sequence.size == 1 else _ReducePartialSums.apply(x, replicated, sequence)


def post(
    sends: Sequence[tuple[Tensor, int]], recvs: Sequence[tuple[Tensor, int]], axis: Axis
) -> tuple[list[Pending], list[Pending]]:
    """Post sends and receives together as one batch; peers are positions on the axis. Returns (sent, received).

    A tensor must not change until its send is complete. NCCL has no tags: the k-th send to a peer matches the k-th
    receive there; the check of the pipeline plan has proven that they belong together. NCCL returns one work for a
    whole batch, so each of its messages waits for all.
    """
    for x, _ in sends:
        _count(axis, "send", x.numel() * x.element_size())
    if (link := axis.link) is not None:
        sent = [Pending(x, link.send(x, peer), axis.board) for x, peer in sends]
        return sent, [Pending(x, link.receive(x, peer), axis.board) for x, peer in recvs]
    ops = [dist.P2POp(dist.isend, x, axis.ranks[peer], axis.group) for x, peer in sends]
    ops += [dist.P2POp(dist.irecv, x, axis.ranks[peer], axis.group) for x, peer in recvs]
    works = dist.batch_isend_irecv(ops) if ops else []
    works = works if len(works) == len(ops) else works * len(ops)
    pending = [Pending(x, work, axis.board) for (x, _), work in zip((*sends, *recvs), works)]
    return pending[: len(sends)], pending[len(sends) :]


def gather_json(value: Any, axis: Axis, device: torch.device) -> list[Any]:
    """Every rank's JSON-serialisable `value`, in axis order, on every rank."""
    if axis.size == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    sizes = all_gather(torch.tensor([data.numel()], device=device), axis).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    rows = all_gather(padded[None], axis).cpu().numpy()
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


class _Report(NamedTuple):
    """A rank's error as sent to the other ranks."""

    code: str
    text: str


def raise_together(error: EngineError | None, axis: Axis, device: torch.device) -> None:
    """If any rank of the axis passes an error, raise on all: its own, or that of the first rank that has one."""
    reports = gather_json(None if error is None else [error.code, str(error)], axis, device)
    if error is not None:
        raise error
    for index, report in enumerate(reports):
        if report is not None:
            first = _Report(*report)
            raise EngineError(first.code, f"rank {axis.ranks[index]}: {first.text}")


def on_first_rank(work: Callable[[], Any], axis: Axis, device: torch.device) -> Any:
    """Run `work` on the first rank of the axis while the others wait; all ranks return its JSON-serialisable result.

    An EngineError is raised on all ranks. Decisions that depend on a file system are made this way, because two ranks
    may see it differently.
    """
    error: EngineError | None = None
    result: Any = None
    if axis.rank == 0:
        try:
            result = work()
        except EngineError as raised:
            error = raised
    raise_together(error, axis, device)
    return gather_json(result, axis, device)[0]
