"""Tensors of Hugging Face folders: read, compared, changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

UP = "model.layers.1.mlp.up_proj.weight"
TOKENS = torch.randint(61, (2, 64), generator=torch.Generator().manual_seed(0))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            found |= {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    return found


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a
    )


def rewrite(folder: Path, change: Any) -> None:
    """Apply `change` to the tensors of a folder and save them in one file."""
    tensors = {key: x.clone() for key, x in tensors_of(folder).items()}
    change(tensors)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")
