"""torch.compile over what lies between matrix products, attention and collectives (train.compile).

Those stay calls to libraries that no compiler improves: the products add into flat gradients in place and may be put
off, collectives wait for other ranks. A compiler that sees them only breaks its graph there. So the parts between are
compiled one by one, each as one whole graph (`fullgraph`): a part that cannot be traced is an error, never a silent
way back to eager. Every block shares what is compiled once. Own kernels are not used inside (`native.kernels`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])
_VERSIONS = (
    64  # of one function: hidden states and heads of queries and keys, with gradient, without, in a recomputation
)


@functools.cache
def compiled(function: F, *, dynamic: bool = False) -> F:
    """The function as torch.compile makes it, compiled at its first call for each shape; dynamic: once for all."""
    config = torch._dynamo.config  # with `fullgraph` its limit of 8 is an error, and validation may be what meets it
    config.recompile_limit = max(config.recompile_limit, _VERSIONS)
    return torch.compile(function, dynamic=dynamic, fullgraph=True)  # type: ignore[return-value]
