"""Token embedding over a slice of the vocabulary; the gradient goes straight into the flat bucket."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.distributed.sharding import Parameter


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Parameter, tokens: Tensor, start: int) -> Tensor:
        local = tokens - start
        outside = (local < 0) | (local >= weight.shape[0])
        local = local.masked_fill(outside, 0)
        ctx.weight = weight
        ctx.save_for_backward(local, outside)
        return torch.nn.functional.embedding(local, weight).masked_fill_(outside[..., None], 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        local, outside = ctx.saved_tensors
        weight: Parameter = ctx.weight
        grad = grad.masked_fill(outside[..., None], 0).reshape(-1, grad.shape[-1])
        main = weight.main_grad
        target = torch.zeros_like(weight) if main is None else main
        target.index_add_(0, local.reshape(-1), grad.to(target.dtype))
        if main is None:
            return target, None, None
        if weight.on_grad is not None:
            weight.on_grad()
        return None, None, None


def embedding(weight: Parameter, tokens: Tensor, start: int) -> Tensor:
    """Rows of weight [V_local, h] for tokens (any shape, int64); ids outside [start, start + V_local) give zeros."""
    return _Embedding.apply(weight, tokens, start)
