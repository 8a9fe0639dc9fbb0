"""y = x W^T + b, its collectives, and its weight gradient as data.

The usual autograd path makes a temporary of the weight's size for every microbatch and adds it afterwards; here the
GEMM itself accumulates (beta = 1) into the flat gradient bucket, at once or, when the pipeline splits the backward in
I and W, later (`WeightGrad`).

Under sequence parallelism x is cut along the sequence and gathered for the product. What is kept for the weight
gradient of a column-parallel product is then a choice: the shard, gathered again in the backward (2 s b h / t bytes
kept in bf16, one more all-gather of s b h), or the gathered input (2 s b h bytes, no more traffic). The gather of the
one and the sum of the input gradient run beside the two products of the backward.
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
    """Another way to a product's input: function(*tensors) gives it again, to the bit, so that it need not be kept."""

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class WeightGrad:
    """A weight gradient that is still to be computed: grad [.., out] and what its input is got back from."""

    weight: Parameter
    grad: Tensor
    restore: Callable[[], Pending]
    matmul: MatmulBackend = PLAIN_MATMUL

    @torch.no_grad()
    def run(self) -> None:
        """Add it to the weight's main gradient."""
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
        saved, weight, sequence, function = ctx.saved_tensors, ctx.weight, ctx.sequence, ctx.function
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
        elif deferred is not None:
            deferred.append(WeightGrad(weight, grad, restore, matmul))
        # a few numbers a token: not put off with the weight's, and autograd's own way into the bucket is good enough
        grad_b = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        nothing = (None,) * (5 + (function is not None) * len(saved))
        return (None if grad_x is None else grad_x.wait(), grad_w, grad_b, *nothing)


def accumulate(weight: Parameter, grad: Tensor, x: Tensor, matmul: MatmulBackend) -> Tensor | None:
    """Add grad^T x, over all rows, to the weight's main gradient; without a bucket, return it for autograd instead."""
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
    """x [s, ..., in] times weight [out, in], plus bias [out] if any -> [s * sequence.size, ..., out].

    x is gathered over `sequence` along its first dim; its gradient is summed over `replicated` and reduce-scattered
    over `sequence`. keep_gathered, recipe: what is saved for the weight gradient; see the module text.
    """
    function, tensors = (recipe.function, recipe.tensors) if recipe else (None, ())
    return _Linear.apply(x, weight, bias, replicated, sequence, keep_gathered, matmul, function, *tensors)
