"""Environment variables: the only module that reads and writes os.environ."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import ConfigError, FieldError


@dataclass(frozen=True)
class Env:
    """Rank and world size of this process from torchrun; a single rank without it."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def read_env() -> Env:
    """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE as torchrun sets them. ConfigError if one is not a number."""
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
    """The device of this rank for train.device auto, cpu or cuda. ConfigError for cuda without a GPU per local rank."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and gpus < env.local_world):
        return torch.device("cpu")
    if gpus < env.local_world:
        problem = f"{gpus} GPUs for {env.local_world} local ranks"
        fix = "Use auto or cpu, or let each process see all GPUs of its node."
        raise ConfigError([FieldError("distributed.too-few-gpus", "train.device", "cuda", problem, fix)])
    return torch.device("cuda", env.local_rank)


def write_exit_code(code: int) -> None:
    """Write the exit code of a failed start to the file ENGINE_EXIT_CODE_FILE: torchrun itself always exits with 1."""
    if file := os.environ.get("ENGINE_EXIT_CODE_FILE"):
        with suppress(OSError):
            Path(file).write_text(f"{code}\n", encoding="utf-8")


def limit_encoder_threads(count: int) -> None:
    """Limit the threads of tokenizer libraries. They read the variable once, at their first batch."""
    os.environ["RAYON_NUM_THREADS"] = str(count)


def secret_variable(name: str) -> bytes | None:
    """The secret in an environment variable; None if it is not set."""
    return os.environ[name].encode() if name in os.environ else None


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def torchrun_error_file() -> str | None:
    """The file from which torchrun reads the root cause; None without torchrun."""
    return os.environ.get("TORCHELASTIC_ERROR_FILE")


def master_address() -> str | None:
    """MASTER_ADDR, the address of the first node; None if it is not set."""
    return os.environ.get("MASTER_ADDR")


def gloo_interface() -> str | None:
    """The network interface that the user has chosen for gloo; None if not set."""
    return os.environ.get("GLOO_SOCKET_IFNAME")


def set_gloo_interface(name: str) -> None:
    """Choose gloo's network interface. gloo reads the variable when it connects."""
    os.environ["GLOO_SOCKET_IFNAME"] = name
