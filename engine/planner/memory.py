"""Memory of a training run, computed from the config."""

from __future__ import annotations

from engine.config.dtypes import DTYPE_BYTES, MAIN_DTYPE
from engine.config.schema import Config
from engine.optim.groups import ParameterGroup


def bytes_per_parameter(cfg: Config, data: int, group: ParameterGroup) -> float:
    """Bytes per local parameter of a group for its weight, gradient and optimizer state.

    The weight is in train.precision, its gradient in the main dtype. The states of its update rule and, if the two
    dtypes differ, the master weight are in the main dtype too; with parallel.zero they are sharded across the `data`
    data-parallel ranks. A frozen parameter has only its weight.
    """
    compute, main = cfg.train.precision, MAIN_DTYPE[cfg.train.precision]
    if group.frozen:
        return DTYPE_BYTES[compute]
    state = DTYPE_BYTES[main] * (len(group.states) + (compute != main))
    return DTYPE_BYTES[compute] + DTYPE_BYTES[main] + state / (data if cfg.parallel.zero else 1)
