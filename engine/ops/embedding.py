"""Vocabulary-parallel token embedding whose backward accumulates directly into the flat gradient bucket."""

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
    """Look up tokens (int64, any shape) in this rank's vocabulary slice: weight [V_local, h] -> [*tokens.shape, h].

    The slice holds the ids [start, start + V_local); tokens outside it give zeros, so a sum over the tensor ranks gives
    the embedding.
    """
    return _Embedding.apply(weight, tokens, start)
