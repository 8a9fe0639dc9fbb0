"""The interface between a model and the pipeline: what a stage runs, and the tensors that pass between stages.

A model is a chain of parts, one for each pipeline stage. Each part says which tensors it takes from the part before.
The first takes none, it reads the micro-batch; the last returns the losses. Nothing else is assumed about a model.

Legend: b micro_batch_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from engine.batch import MicroBatch


@dataclass(frozen=True)
class BoundaryTensor:
    """A tensor that a part takes from the part before it.

    shape: local to this rank, such as [s / tensor ranks, b, h] under sequence parallelism. grad: whether its gradient
    goes back; False for integers, and for what the part before has detached.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    grad: bool = True


Boundary = tuple[BoundaryTensor, ...]


@dataclass(frozen=True)
class Output:
    """What a part returns for one micro-batch.

    tensors: for the next part, in the order of its boundary; an input may be passed on as it is. losses: [b], from the
    last part only: for each sample, the sum of its token losses times `MicroBatch.weights`. sums: name -> scalar, sum
    of values of tokens times `MicroBatch.shares`, so that the sum over the global batch is a mean over its counted
    tokens. All tensor ranks return the same losses and sums.

    The objective is the sum of all losses and of those named sums that require a gradient.
    """

    tensors: tuple[Tensor, ...] = ()
    losses: Tensor | None = None
    sums: Mapping[str, Tensor] = field(default_factory=dict)

    def detach(self) -> Output:
        """The same values without autograd."""
        losses = None if self.losses is None else self.losses.detach()
        sums = {name: value.detach() for name, value in self.sums.items()}
        return Output(tuple(x.detach() for x in self.tensors), losses, sums)


class Part(Protocol):
    """The part of a model that one pipeline stage runs. sums: the names of all sums that its outputs may carry."""

    sums: tuple[str, ...]

    def boundary(self, batch: MicroBatch) -> Boundary:
        """The tensors that it takes from the part before, () for the first; a function of `batch.shapes` alone."""

    def __call__(self, inputs: tuple[Tensor, ...], batch: MicroBatch) -> Output:
        """Run on the tensors of `boundary` and on a micro-batch, whose weights include every factor of the loss."""
