"""The linear layer y = x W^T + b with its tensor-parallel collectives and gradient accumulation fused into the GEMM.

Plain autograd allocates a temporary of the weight's size per micro-batch and adds it to the gradient. Here the GEMM
itself accumulates (beta = 1) into the flat gradient bucket: in the backward, or later if the pipeline schedule splits
the backward into input gradients (I) and weight gradients (W); `WeightGrad` is such a deferred gradient.

Under sequence parallelism x is sharded along the sequence and all-gathered for the matmul. For the weight gradient
there are two choices: save the shard and gather it again in the backward (saves 2 s b h / t bytes in bf16, costs one
more all-gather of s b h), or save the gathered input (2 s b h bytes, no extra traffic). In the backward, the all-gather
overlaps the input-gradient matmul, and the sum of the input gradient overlaps the weight-gradient matmul.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.distributed.collectives import Pending, all_gather, all_gather_start, reduce_partial_sums_start
from engine.distributed.context import Axis
from engine.distributed.sharding import Parameter
from engine.ops.matmul import PLAIN_MATMUL, MatmulBackend


@dataclass(frozen=True)
class RecomputeRecipe:
    """How to recompute a matmul's input bit-exactly, as function(*tensors), so that the input need not be saved."""

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class WeightGrad:
    """A deferred weight gradient (the W of a split backward).

    grad [..., out]: gradient of the output. restore: starts the recomputation or the all-gather of the input.
    """

    weight: Parameter
    grad: Tensor
    restore: Callable[[], Pending]
    matmul: MatmulBackend = PLAIN_MATMUL

    @torch.no_grad()
    def run(self) -> None:
        """Compute the gradient and add it to the weight's main gradient."""
        accumulate(self.weight, self.grad, self.restore().wait(), self.matmul)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Parameter,
        bias: Parameter | None,
        replicated: Axis,
        sequence: Axis,
        keep_gathered: bool,
        matmul: MatmulBackend,
        function: Callable[..., Tensor] | None,
        *tensors: Tensor,
    ) -> Tensor:
        full = all_gather(x, sequence)
        ctx.weight, ctx.replicated, ctx.sequence, ctx.matmul = weight, replicated, sequence, matmul
        ctx.keep_gathered, ctx.function = keep_gathered, function
        ctx.save_for_backward(*(tensors if function else (full if keep_gathered else x,)))
        out = matmul.forward(full, weight)
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, sequence, function = ctx.weight, ctx.sequence, ctx.function
        saved = tuple(x.detach() for x in ctx.saved_tensors)  # a deferred gradient must not keep the graph alive
        keep_gathered, matmul = ctx.keep_gathered, ctx.matmul

        def restore() -> Pending:
            if function is not None:
                with torch.no_grad():
                    return all_gather_start(function(*saved), sequence)
            return Pending(saved[0]) if keep_gathered else all_gather_start(saved[0], sequence)

        deferred = weight.deferred
        now = ctx.needs_input_grad[1] and deferred is None
        full = restore() if now else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = reduce_partial_sums_start(matmul.input_grad(grad, weight), ctx.replicated, sequence)
        grad_w = None
        if full is not None:
            grad_w = accumulate(weight, grad, full.wait(), matmul)
        elif deferred is not None and ctx.needs_input_grad[1]:
            deferred.append(WeightGrad(weight, grad, restore, matmul))
        # The bias gradient is cheap, so it is never deferred and takes autograd's usual path into the bucket.
        grad_b = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        nothing = (None,) * (5 + (function is not None) * len(saved))
        return (None if grad_x is None else grad_x.wait(), grad_w, grad_b, *nothing)


def accumulate(weight: Parameter, grad: Tensor, x: Tensor, matmul: MatmulBackend) -> Tensor | None:
    """Add grad^T x to the weight's main gradient; without a gradient bucket, return it for autograd instead.

    grad [..., out] and x [..., in] with the same number of rows.
    """
    main = weight.main_grad
    total = matmul.weight_grad(grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]), main)
    if main is not None and weight.on_grad is not None:
        weight.on_grad()
    return total


def linear(
    x: Tensor,
    weight: Parameter,
    replicated: Axis,
    sequence: Axis,
    *,
    bias: Parameter | None = None,
    keep_gathered: bool = False,
    recipe: RecomputeRecipe | None = None,
    matmul: MatmulBackend = PLAIN_MATMUL,
) -> Tensor:
    """Linear layer that enters a tensor-parallel region: x [s, ..., in] -> [s * sequence.size, ..., out].

    weight [out, in], bias [out]. x is all-gathered over `sequence` along its first dim; its gradient is all-reduced
    over `replicated` and reduce-scattered over `sequence`. Saved for the weight gradient: x, or with keep_gathered the
    gathered x, or with a recipe only the tensors to recompute x from. matmul: backend of the three matmuls.
    """
    function, tensors = (recipe.function, recipe.tensors) if recipe else (None, ())
    return _Linear.apply(x, weight, bias, replicated, sequence, keep_gathered, matmul, function, *tensors)
