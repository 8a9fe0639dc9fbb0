"""Memory of a training run, computed from the config."""

from __future__ import annotations

from engine.config.dtypes import DTYPE_BYTES, MAIN_DTYPE
from engine.config.schema import Config


def bytes_per_parameter(cfg: Config, data: int) -> float:
    """Bytes per local parameter for its weight, gradient and optimizer state.

    The weight is in train.precision, its gradient in the main dtype. The two moments and, if the two dtypes differ, the
    master weight are in the main dtype too; with parallel.zero they are sharded across the `data` data-parallel ranks.
    """
    compute, main = cfg.train.precision, MAIN_DTYPE[cfg.train.precision]
    state = DTYPE_BYTES[main] * (2 if compute == main else 3)
    return DTYPE_BYTES[compute] + DTYPE_BYTES[main] + state / (data if cfg.parallel.zero else 1)
