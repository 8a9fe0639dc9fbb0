"""torch.compile for the functions between matmuls, attention and collectives (train.compile).

Matmuls, attention and collectives stay library calls: matmuls accumulate into flat gradients in place and may be
deferred, collectives wait for other ranks, so a compiler would only break its graph there. The functions between them
are compiled one by one, each as one full graph (`fullgraph`): a function that cannot be traced is an error, never a
silent fallback to eager mode. All blocks share the compiled functions. Inside them, `native.kernels` returns None, so
no custom kernel runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])
# compiled variants of one function: of hidden states, query heads and key heads; with gradient, without, recomputed
_MAX_VARIANTS = 64


@functools.cache
def compiled(function: F, *, dynamic: bool = False) -> F:
    """The function under torch.compile: compiled at the first call for each shape, or with `dynamic` once for all."""
    config = torch._dynamo.config  # with `fullgraph`, exceeding its limit of 8 is an error, maybe first in a validation
    config.recompile_limit = max(config.recompile_limit, _MAX_VARIANTS)
    return torch.compile(function, dynamic=dynamic, fullgraph=True)  # type: ignore[return-value]
