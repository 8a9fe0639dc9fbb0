"""Residual forms of a block: the norms of a sublayer, and the order of the two sublayers.

A branch is a sublayer with its norms; it maps the residual stream x [s, b, h] to the update that is added to x. Its
class is chosen once, in the constructor of the block (`BRANCHES`), and so is the order of the two branches:
`in_sequence`, or `in_parallel` as in GPT-NeoX. No forward asks which form it is. In all forms dropout is the last
operation of a branch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from engine.model.dropout import Dropout
from engine.model.layers import Norm
from engine.ops.linear import RecomputeRecipe


class Branch(nn.Module):
    """A sublayer with its norms, x [s, b, h] -> what it adds to x: with pre-norm, sublayer(norm(x)).

    sublayer(x, *context, recipe=recipe) maps [s, b, h] to [s, b, h]; context is passed through. norms: this form's
    norms (declarations.BRANCH_NORMS). dropout: of what the branch adds, for the sequence, the last item of context.
    selective: recompute the sublayer's input in the backward instead of saving it.
    """

    def __init__(self, norms: tuple[Norm, ...], sublayer: nn.Module, dropout: Dropout, selective: bool):
        super().__init__()
        self.norm, self.sublayer, self.dropout, self.selective = norms[0], sublayer, dropout, selective

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        return self.dropout(self._apply_sublayer(x, self.norm(x), *context), context[-1])

    def add(self, x: Tensor, update: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        """(x + update, what this branch adds to it): the residual sum is fused with the norm that reads it."""
        x, normed = self.norm(x, update)
        return x, self.dropout(self._apply_sublayer(x, normed, *context), context[-1])

    def _apply_sublayer(self, x: Tensor, normed: Tensor, *context: Any) -> Tensor:
        return self.sublayer(normed, *context, recipe=self.norm.recipe(x) if self.selective else None)


class PostNormBranch(Branch):
    """norm(sublayer(x)), as in OLMo 2."""

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        recipe = RecomputeRecipe(_identity, (x,)) if self.selective else None
        return self.dropout(self.norm(self.sublayer(x, *context, recipe=recipe)), context[-1])

    def add(self, x: Tensor, update: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        x = x + update
        return x, self(x, *context)


class SandwichNormBranch(Branch):
    """post_norm(sublayer(norm(x))), as in Gemma 2."""

    def __init__(self, norms: tuple[Norm, ...], sublayer: nn.Module, dropout: Dropout, selective: bool):
        super().__init__(norms, sublayer, dropout, selective)
        self.post_norm = norms[1]

    def _apply_sublayer(self, x: Tensor, normed: Tensor, *context: Any) -> Tensor:
        return self.post_norm(super()._apply_sublayer(x, normed, *context))


BRANCHES: dict[str, type[Branch]] = {"pre": Branch, "post": PostNormBranch, "sandwich": SandwichNormBranch}


def in_sequence(mixer: Branch, feed_forward: Branch, x: Tensor, *context: Any) -> Tensor:
    """Two residual sums, one after the other: x = x + mixer(x), then x + feed_forward(x).

    context: of the mixer; its last item is the sequence, which the feed-forward takes too.
    """
    x, update = feed_forward.add(x, mixer(x, *context), context[-1])
    return x + update


def in_parallel(mixer: Branch, feed_forward: Branch, x: Tensor, *context: Any) -> Tensor:
    """Both branches read the same x: x + mixer(x) + feed_forward(x). context: as `in_sequence`."""
    return x + mixer(x, *context) + feed_forward(x, context[-1])


def _identity(x: Tensor) -> Tensor:
    return x
