"""What a run is made of on one rank, from its config."""

from __future__ import annotations

from engine.config.derived import Derived
from engine.config.schema import Config
from engine.distributed.env import Env, pick_device
from engine.distributed.launch import Mesh
from engine.optim.precision import PRECISIONS


def mesh_of(cfg: Config, derived: Derived, env: Env) -> Mesh:
    """What the ranks of a run form. ConfigError when it asks for a GPU in vain."""
    return Mesh(
        derived.layout,
        num_kv_heads=cfg.model.num_kv_heads,
        dtype=PRECISIONS[cfg.train.precision].compute,
        device=pick_device(cfg.train.device, env),
        timeout_s=cfg.parallel.timeout_s,
        transport=cfg.parallel.transport,
    )
