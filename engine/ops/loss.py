"""Vocabulary-parallel cross entropy, chunk by chunk together with the output projection.

Goal: the logits of a microbatch never exist, only those of one chunk of its tokens, at no extra product. So the
gradient of the logits is formed in the forward (as in Liger-Kernel, Hsu et al. 2024): a chunk's logits over this rank's
slice of the vocabulary, three numbers a token over the tensor axis (Megatron-LM, Shoeybi et al. 2019, section 3), the
logits overwritten by their gradient, and that multiplied into the gradients of the input and of the weight at once.
What lives until the backward is the gradient of the input. Invariants:

* What a token's loss weighs in the objective is known in the forward; fp16's loss scale is part of it, and so in the
  logits' gradient before that is rounded. What comes out is the objective, whose gradient is one: any other one that
  reaches the backward raises, because by then the weight's gradient has been added.
* A weight's gradient is in its bucket after the forward, but `on_grad` speaks in the backward, like everybody's: the
  bucket is armed before the backward of the last microbatch, when all of them are there.
* All tensor ranks cut the same chunks, so that their collectives meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.distributed.collectives import Pending, all_gather, all_reduce_, reduce_partial_sums_start
from engine.distributed.context import Axis
from engine.distributed.sharding import Parameter
from engine.ops.matmul import add_outer_
from engine.ops.native import kernels, matmul

# In rows, not bytes: each chunk reads the weight twice more and adds to its gradient once more, which is to be small
# beside its products, 6 FLOPs a row and element of the weight. CPU: docs/performance.md has the figures. GPU: adding a
# bf16 product to a float32 gradient moves 12 bytes an element, on an H200 the time of 2,100 FLOPs, those of 350 rows.
_CPU_ROWS, _GPU_ROWS = 768, 4096
_ALIGN = 64  # rows: whole tiles of matrix products


@dataclass(frozen=True)
class VocabSlice:
    """A rank's slice of the vocabulary: ids from `start` are the first `valid` rows of its weight; the rest is padding.

    axis: the ranks that hold the slices.
    """

    start: int
    valid: int
    axis: Axis


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Parameter,
        targets: Tensor,
        weights: Tensor,
        part: VocabSlice,
        replicated: Axis,
        sequence: Axis,
    ) -> Tensor:
        full = all_gather(x, sequence).contiguous()
        grad_x = torch.empty_like(full)
        rows_x, rows_grad = full.view(-1, full.shape[-1]), grad_x.view(-1, full.shape[-1])
        into = torch.zeros_like(weight) if weight.main_grad is None else weight.main_grad
        losses, summed = torch.empty_like(weights), Pending(grad_x)
        for rows in _chunks(rows_x):
            losses[rows], grad = _chunk(rows_x[rows], weight, targets[rows], weights[rows], part)
            rows_grad[rows] = matmul(grad, weight)
            if rows.stop == len(rows_x):  # beside the last product
                summed = reduce_partial_sums_start(grad_x, replicated, sequence)
            add_outer_(into, grad, rows_x[rows])
            del grad  # before the next chunk's is made
        ctx.weight = weight
        ctx.save_for_backward(summed.wait(), into if weight.main_grad is None else None)
        return losses * weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # no test of values on the host: a GPU would stand still for it
        torch._assert_async((grad == 1).all(), _NOT_ONE)
        grad_x, grad_w = ctx.saved_tensors
        if ctx.weight.on_grad is not None:
            ctx.weight.on_grad()
        return grad_x, grad_w, None, None, None, None, None


_NOT_ONE = (
    "the gradient of linear_cross_entropy's result is not one: its inputs' gradients are made in the forward, so scale "
    "the objective by `weights`, not afterwards"
)


def _chunks(x: Tensor) -> Iterator[slice]:
    """Ranges of the rows of x: as few as may be, and of one size but for the last."""
    n = len(x)
    count = -(-n // (_CPU_ROWS if x.device.type == "cpu" else _GPU_ROWS))
    step = -(-n // max(1, count * _ALIGN)) * _ALIGN
    for begin in range(0, n, max(1, step)):
        yield slice(begin, min(n, begin + step))


def _chunk(
    x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, part: VocabSlice
) -> tuple[Tensor, Tensor]:
    """Losses in nats of the tokens x [n, h], and a [n, V_local] that with weights [n] is the gradient of their weighted
    sum with respect to the logits, in the memory of these."""
    logits, local = matmul(x, weight.t()), targets - part.start
    peak, total, at_target = _statistics(logits, local, part)
    if weights is not None:
        _gradient_(logits, local, peak, weights / total, weights, part.valid)
    return total.log() - at_target, logits


def _statistics(logits: Tensor, local: Tensor, part: VocabSlice) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row over the whole vocabulary: its maximum, sum of exp(x - maximum), x - maximum at the target."""
    own = kernels(logits)
    stats = own.softmax_stats if own else _softmax_stats
    peak, total, at_target = stats(logits, local, part.valid).unbind()
    highest = all_reduce_(peak.clone(), part.axis, "max")
    elsewhere = (local < 0) | (local >= part.valid)
    sums = torch.stack((total * torch.exp(peak - highest), (at_target - highest).masked_fill_(elsewhere, 0)))
    total, at_target = all_reduce_(sums, part.axis).unbind()
    return highest, total, at_target


def _gradient_(logits: Tensor, local: Tensor, peak: Tensor, scale: Tensor, grad: Tensor, valid: int) -> None:
    """logits <- exp(logits - peak) * scale - [column is the target] * grad."""
    if own := kernels(logits):
        own.softmax_gradient_(logits, local, peak, scale, grad, valid)
    else:
        _softmax_gradient_(logits, local, peak, scale, grad, valid)


def _softmax_stats(logits: Tensor, local: Tensor, valid: int) -> Tensor:
    """Reference of trident::softmax_stats: of each row's first `valid` columns the maximum, the sum of
    exp(x - maximum), and x at the target where it is one of them; [3, n], float32 or wider."""
    x = _wide(logits)
    peak = x.new_full((len(x),), -torch.inf) if valid == 0 else x[:, :valid].amax(-1)
    total = (x[:, :valid] - peak.clamp_min(torch.finfo(x.dtype).min)[:, None]).exp_().sum(-1)
    at_target = x.gather(1, local.clamp(0, max(0, valid - 1))[:, None]).squeeze(1)
    return torch.stack((peak, total, at_target))


def _softmax_gradient_(logits: Tensor, local: Tensor, peak: Tensor, scale: Tensor, grad: Tensor, valid: int) -> None:
    """Reference of trident::softmax_gradient_."""
    x = _wide(logits).sub_(peak[:, None]).exp_().mul_(scale[:, None])
    x[:, valid:] = 0  # padding of a vocabulary that the ranks do not divide
    elsewhere = (local < 0) | (local >= valid)
    x.scatter_add_(1, local.masked_fill(elsewhere, 0)[:, None], -grad.masked_fill(elsewhere, 0)[:, None])
    if x.dtype != logits.dtype:
        logits.copy_(x)


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def linear_cross_entropy(
    x: Tensor, weight: Parameter, targets: Tensor, weights: Tensor, part: VocabSlice, replicated: Axis, sequence: Axis
) -> Tensor:
    """Of each token weight * -log softmax(x W^T)[target], in nats: its part of the objective, the sum of them all.

    x [s, b, h], weight [V_local, h], targets int64 (global ids) and weights [s * sequence.size, b] -> of their shape,
    float32 or wider. x is gathered over `sequence` along its first dim; its gradient is summed over `replicated` and
    reduce-scattered over `sequence`. RuntimeError in the backward if the gradient of the result is not one.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    ids, shares = targets.reshape(-1), weights.reshape(-1).to(wide)
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(x, weight, ids, shares, part, replicated, sequence).view(targets.shape)
    rows_x, losses = all_gather(x, sequence).reshape(-1, x.shape[-1]), torch.empty_like(shares)
    for rows in _chunks(rows_x):
        losses[rows] = _chunk(rows_x[rows], weight, ids[rows], None, part)[0]
    return (losses * shares).view(targets.shape)
