"""Vocabulary-parallel cross entropy fused with the output projection, in chunks of tokens (fused linear cross entropy).

Goal: the logits of a micro-batch are never materialised, only those of one chunk of tokens, without an extra matmul.
So the gradients are computed in the forward (as in Liger-Kernel, Hsu et al. 2024). For each chunk: compute the logits
over this rank's vocabulary slice; all-reduce three numbers per token over the tensor axis (Megatron-LM, Shoeybi et al.
2019, section 3); overwrite the logits with their gradient; multiply it into the gradients of the input and the weight.
Only the gradient of the input is kept for the backward. Invariants:

* The weights of a token's losses in the objective are known in the forward. They include the fp16 loss scale, which
  thus reaches the gradient of the logits before that is rounded. The result is the objective itself, so its gradient
  is 1; the backward raises for any other gradient, because the weight's gradient has already been accumulated.
* The weight's gradient is in its bucket after the forward, but `on_grad` fires in the backward, as for every parameter:
  buckets start counting arrivals just before the last micro-batch's backward, when all forwards are done.
* All tensor ranks use the same chunks, so that their collectives match.
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
from engine.ops.chunks import chunk_rows
from engine.ops.matmul import add_outer_
from engine.ops.native import kernels, matmul


@dataclass(frozen=True)
class VocabSlice:
    """A rank's slice of the vocabulary: the first `valid` rows of its weight are ids from `start`, the rest is padding.

    axis: the ranks across which the vocabulary is sharded.
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
        z_weights: Tensor | None,
        vocab_slice: VocabSlice,
        axes: tuple[Axis, Axis],
    ) -> tuple[Tensor, Tensor | None]:
        replicated, sequence = axes
        full = all_gather(x, sequence).contiguous()
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(full) if needs_x else full.new_empty(0)
        rows_x, rows_grad = full.view(-1, full.shape[-1]), grad_x.view(-1, full.shape[-1])
        into = None
        if needs_weight:
            into = torch.zeros_like(weight) if weight.main_grad is None else weight.main_grad
        losses, summed = torch.empty_like(weights), Pending(grad_x)
        z_losses = None if z_weights is None else torch.empty_like(weights)
        for rows in _chunks(rows_x):
            target, factors = targets[rows], (weights[rows], None if z_weights is None else z_weights[rows])
            losses[rows], log_z, grad = _chunk(rows_x[rows], weight, target, factors, vocab_slice)
            if z_losses is not None:
                z_losses[rows] = log_z.square()
            if needs_x:
                rows_grad[rows] = matmul(grad, weight)
                if rows.stop == len(rows_x):  # so that the sum overlaps the last matmul
                    summed = reduce_partial_sums_start(grad_x, replicated, sequence)
            if into is not None:
                add_outer_(into, grad, rows_x[rows])
            del grad  # free it before the next chunk's logits are allocated
        ctx.weight = weight
        ctx.save_for_backward(summed.wait() if needs_x else None, into if weight.main_grad is None else None)
        return losses * weights, None if z_losses is None or z_weights is None else z_losses * z_weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
        # no check of the value on the host: it would synchronize with the GPU
        torch._assert_async((grad == 1).all(), _GRADIENT_NOT_ONE)
        if grad_z is not None:
            torch._assert_async((grad_z == 1).all(), _GRADIENT_NOT_ONE)
        grad_x, grad_w = ctx.saved_tensors
        if ctx.weight.on_grad is not None:
            ctx.weight.on_grad()
        return grad_x, grad_w, None, None, None, None, None


_GRADIENT_NOT_ONE = (
    "the gradient of linear_cross_entropy's result is not 1: the gradients of its inputs are computed in the forward, "
    "so scale the objective by `weights`, not afterwards"
)


def _chunks(x: Tensor) -> Iterator[slice]:
    """Ranges of the rows of x: as few as possible, all of the same size except the last."""
    n, step = len(x), chunk_rows(len(x), cpu=x.device.type == "cpu")
    for begin in range(0, n, step):
        yield slice(begin, min(n, begin + step))


def _chunk(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    factors: tuple[Tensor, Tensor | None] | None,
    vocab_slice: VocabSlice,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [n] in nats of the tokens x [n, h], log Z [n], and the logits [n, V_local] of this rank's slice.

    With factors (weights [n], z_weights [n] or None), the logits are overwritten by the gradient of the objective with
    respect to them: of weights * loss + z_weights * (log Z)^2.
    """
    logits, local = matmul(x, weight.t()), targets - vocab_slice.start
    peak, total, at_target = _statistics(logits, local, vocab_slice)
    log_z = peak + total.log()
    if factors is not None:
        weights, z_weights = factors
        # d log Z / d logits is the softmax, which cross entropy's gradient contains too: one factor for both
        of_softmax = weights if z_weights is None else weights + 2 * z_weights * log_z
        _gradient_(logits, local, peak, of_softmax / total, weights, vocab_slice.valid)
    return total.log() - at_target, log_z, logits


def _statistics(logits: Tensor, local: Tensor, vocab_slice: VocabSlice) -> tuple[Tensor, Tensor, Tensor]:
    """Per row [n], over the whole vocabulary: maximum, sum of exp(x - maximum), and x - maximum at the target."""
    custom = kernels(logits)
    stats = custom.softmax_stats if custom else _softmax_stats
    peak, total, at_target = stats(logits, local, vocab_slice.valid).unbind()
    highest = all_reduce_(peak.clone(), vocab_slice.axis, "max")
    elsewhere = (local < 0) | (local >= vocab_slice.valid)
    sums = torch.stack((total * torch.exp(peak - highest), (at_target - highest).masked_fill_(elsewhere, 0)))
    total, at_target = all_reduce_(sums, vocab_slice.axis).unbind()
    return highest, total, at_target


def _gradient_(logits: Tensor, local: Tensor, peak: Tensor, scale: Tensor, grad: Tensor, valid: int) -> None:
    """In place, per row: logits <- exp(logits - peak) * scale - (grad where the column is the target, else 0)."""
    if custom := kernels(logits):
        custom.softmax_gradient_(logits, local, peak, scale, grad, valid)
    else:
        _softmax_gradient_(logits, local, peak, scale, grad, valid)


def _softmax_stats(logits: Tensor, local: Tensor, valid: int) -> Tensor:
    """Reference of trident::softmax_stats: [3, n], float32 or wider, over the first `valid` columns of each row.

    Their maximum, the sum of exp(x - maximum), and x at the target if it is one of them.
    """
    x = _wide(logits)
    peak = x.new_full((len(x),), -torch.inf) if valid == 0 else x[:, :valid].amax(-1)
    total = (x[:, :valid] - peak.clamp_min(torch.finfo(x.dtype).min)[:, None]).exp_().sum(-1)
    at_target = x.gather(1, local.clamp(0, max(0, valid - 1))[:, None]).squeeze(1)
    return torch.stack((peak, total, at_target))


def _softmax_gradient_(logits: Tensor, local: Tensor, peak: Tensor, scale: Tensor, grad: Tensor, valid: int) -> None:
    """Reference of trident::softmax_gradient_."""
    x = _wide(logits).sub_(peak[:, None]).exp_().mul_(scale[:, None])
    x[:, valid:] = 0  # padding, where the number of ranks does not divide the vocabulary
    elsewhere = (local < 0) | (local >= valid)
    x.scatter_add_(1, local.masked_fill(elsewhere, 0)[:, None], -grad.masked_fill(elsewhere, 0)[:, None])
    if x.dtype != logits.dtype:
        logits.copy_(x)


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def linear_cross_entropy(
    x: Tensor,
    weight: Parameter,
    targets: Tensor,
    weights: Tensor,
    vocab_slice: VocabSlice,
    replicated: Axis,
    sequence: Axis,
    z_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Weighted cross entropy of each token, weights * -log softmax(x W^T)[target] in nats, and its z-loss.

    The z-loss is z_weights * (log Z)^2, where Z is the sum of exp(logits); None without z_weights. It keeps log Z near
    0 (PaLM, Chowdhery et al. 2022, section 5). The objective is the sum of both results over all tokens.

    x [s, b, h], weight [V_local, h], targets int64 (global ids), weights and z_weights, all [s * sequence.size, b] ->
    results of the same shape, float32 or wider. x is all-gathered over `sequence` along its first dim; its gradient is
    summed over `replicated` and reduce-scattered over `sequence`. RuntimeError in the backward if the gradient of a
    result is not 1.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    ids, shares = targets.reshape(-1), weights.reshape(-1).to(wide)
    z_shares = None if z_weights is None else z_weights.reshape(-1).to(wide)
    if torch.is_grad_enabled():
        axes = replicated, sequence
        found, z_found = _LinearCrossEntropy.apply(x, weight, ids, shares, z_shares, vocab_slice, axes)
    else:
        rows_x, losses, logs = (
            all_gather(x, sequence).reshape(-1, x.shape[-1]),
            torch.empty_like(shares),
            torch.empty_like(shares),
        )
        for rows in _chunks(rows_x):
            losses[rows], logs[rows] = _chunk(rows_x[rows], weight, ids[rows], None, vocab_slice)[:2]
        found, z_found = losses * shares, None if z_shares is None else logs.square() * z_shares
    return found.view(targets.shape), None if z_found is None else z_found.view(targets.shape)
