"""What the environment says about this process: the only reader and writer of os.environ."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import ConfigError, FieldError


@dataclass(frozen=True)
class Env:
    """What torchrun says about this process; one rank alone without it."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def read_env() -> Env:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, as torchrun sets them."""
    if "RANK" not in os.environ:
        return Env()
    names = {"rank": "RANK", "world": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_world": "LOCAL_WORLD_SIZE"}
    texts = {name: os.environ.get(name) for name in names.values()}
    errors = [
        FieldError(
            "distributed.env-not-a-number",
            name,
            text,
            f"is not a number, but RANK is set ({texts['RANK']!r})",
            "Start the ranks with torchrun.",
        )
        for name, text in texts.items()
        if text is None or not text.isdecimal()
    ]
    if errors:
        raise ConfigError(errors)
    return Env(**{field: int(os.environ[name]) for field, name in names.items()})


def pick_device(wanted: str, env: Env) -> torch.device:
    """The device of this rank for train.device auto, cpu or cuda. ConfigError when a GPU is asked for in vain."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and gpus < env.local_world):
        return torch.device("cpu")
    if gpus < env.local_world:
        problem = f"{gpus} GPUs for {env.local_world} local ranks"
        fix = "Use auto or cpu, or let each process see all GPUs of its node."
        raise ConfigError([FieldError("distributed.too-few-gpus", "train.device", "cuda", problem, fix)])
    return torch.device("cuda", env.local_rank)


def write_exit_code(code: int) -> None:
    """Write the exit code of a failed start into the file that ENGINE_EXIT_CODE_FILE names: torchrun always says 1."""
    if file := os.environ.get("ENGINE_EXIT_CODE_FILE"):
        with suppress(OSError):
            Path(file).write_text(f"{code}\n", encoding="utf-8")


def limit_encoder_threads(count: int) -> None:
    """How many threads tokenizer libraries may use. They read it once, at their first batch."""
    os.environ["RAYON_NUM_THREADS"] = str(count)


def secret_variable(name: str) -> bytes | None:
    """The secret that the user has put into a variable; None where it is not set."""
    return os.environ[name].encode() if name in os.environ else None


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def torchrun_error_file() -> str | None:
    """Where torchrun looks for the root cause."""
    return os.environ.get("TORCHELASTIC_ERROR_FILE")


def master_address() -> str | None:
    """The first node, as the user has named it to torchrun."""
    return os.environ.get("MASTER_ADDR")


def gloo_interface() -> str | None:
    """The network interface that gloo is to take; None where nobody has named one."""
    return os.environ.get("GLOO_SOCKET_IFNAME")


def set_gloo_interface(name: str) -> None:
    """Have gloo take this network interface. It reads the variable when it connects."""
    os.environ["GLOO_SOCKET_IFNAME"] = name
