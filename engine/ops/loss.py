"""Vocabulary-parallel cross entropy (Megatron-LM, Shoeybi et al. 2019, section 3).

Each rank holds the logits of its slice of the vocabulary; three numbers a token cross the tensor axis. The softmax
overwrites the logits and the gradient overwrites the softmax: the [tokens, vocabulary] matrix exists once. Rows are
worked on in blocks that stay in the processor's cache between the passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.comm import all_reduce_
from engine.context import Axis
from engine.ops.native import kernels

_BLOCK_BYTES = 4 << 20


def _blocks(logits: Tensor) -> range:
    return range(0, logits.shape[0], max(1, _BLOCK_BYTES // (logits.shape[1] * logits.element_size())))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, start: int, valid: int, axis: Axis) -> Tensor:
        ctx.dtype = logits.dtype
        if own := kernels(logits):
            return _forward(own, ctx, logits.contiguous(), targets - start, valid, axis)
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        logits[:, valid:] = -torch.inf  # padding of a vocabulary that the ranks do not divide
        local = targets - start
        inside = (local >= 0) & (local < valid)
        local = local.masked_fill(~inside, 0)
        peak = all_reduce_(logits.amax(-1), axis, "max")
        sums = torch.empty(2, logits.shape[0], dtype=logits.dtype, device=logits.device)
        blocks = _blocks(logits)
        for i in blocks:
            rows = slice(i, i + blocks.step)
            block = logits[rows].sub_(peak[rows, None])
            sums[1, rows] = block.gather(1, local[rows, None]).squeeze(1).masked_fill_(~inside[rows], 0)
            torch.sum(block.exp_(), -1, out=sums[0, rows])
        all_reduce_(sums, axis)
        ctx.blocks = blocks
        ctx.save_for_backward(logits, local, inside, sums[0])
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        if len(ctx.saved_tensors) == 3:
            logits, local, scaling = ctx.saved_tensors
            grad = grad.contiguous()
            torch.ops.trident.softmax_gradient_(logits, local, scaling[0], grad / scaling[1], grad, ctx.valid)
            return logits, None, None, None, None
        exps, local, inside, total = ctx.saved_tensors
        at_target = (-grad * inside)[:, None]
        scale = (grad / total)[:, None]
        for i in ctx.blocks:
            rows = slice(i, i + ctx.blocks.step)
            exps[rows].mul_(scale[rows]).scatter_add_(1, local[rows, None], at_target[rows])
        return exps.to(ctx.dtype), None, None, None, None


def _forward(own: Any, ctx: Any, logits: Tensor, local: Tensor, valid: int, axis: Axis) -> Tensor:
    """The forward on our kernels: one pass reads the logits, the backward's one pass turns them into their gradient."""
    peak, total, at_target = own.softmax_stats(logits, local, valid).unbind()
    highest = all_reduce_(peak.clone(), axis, "max")
    inside = (local >= 0) & (local < valid)
    sums = torch.stack((total * torch.exp(peak - highest), (at_target - highest).masked_fill_(~inside, 0)))
    all_reduce_(sums, axis)
    ctx.valid = valid
    ctx.save_for_backward(logits, local, torch.stack((highest, sums[0])))
    return sums[0].log() - sums[1]


def cross_entropy(logits: Tensor, targets: Tensor, start: int, valid: int, axis: Axis) -> Tensor:
    """-log softmax(logits)[target], in nats, for each token: [n], float32 or wider. Overwrites `logits`.

    logits [n, V_local] of the vocabulary slice that begins at `start`; columns from `valid` on are padding.
    targets [n] int64, global ids. The whole vocabulary is spread over `axis`.
    """
    return _CrossEntropy.apply(logits, targets, start, valid, axis)
