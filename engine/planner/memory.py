"""Memory of a run before it runs, from the config alone."""

from __future__ import annotations

from engine.config.dtypes import DTYPE_BYTES, MAIN_DTYPE
from engine.config.schema import Config


def bytes_per_parameter(cfg: Config, data: int) -> float:
    """Bytes a rank takes for weights, gradients and optimizer state of a parameter that it holds.

    The weight is in train.precision and its gradient in the main dtype. Two moments and, where the two dtypes differ, a
    master weight are in the main dtype too; with parallel.zero they are divided among the `data` ranks.
    """
    compute, main = cfg.train.precision, MAIN_DTYPE[cfg.train.precision]
    state = DTYPE_BYTES[main] * (2 if compute == main else 3)
    return DTYPE_BYTES[compute] + DTYPE_BYTES[main] + state / (data if cfg.parallel.zero else 1)
