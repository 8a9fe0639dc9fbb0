"""A model of two weights with random values, saved to a folder or an in-memory disk, without training."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import retention
from engine.checkpoint.format import step_dir
from engine.checkpoint.save import build_manifest, build_part, write_part
from engine.checkpoint.storage import make_folders
from engine.distributed.context import ParallelContext, make_context
from engine.distributed.layout import Layout
from engine.distributed.sharding import Parameter
from engine.distributed.specs import Chunk, ShardSpec
from engine.optim.optimizer import StateShard
from tests.support.disk_double import MemoryDisk

FOLDER = Path("/run/checkpoints")
SHAPES = {"a.weight": (5, 6), "b.weight": (7,)}
METADATA: dict[str, Any] = {"consumed_samples": 0, "consumed_tokens": 0, "config": {}, "data": {}, "versions": {}}
METADATA["state_kinds"] = ("exp_avg", "exp_avg_sq")
BLOCK = 100  # bytes: several blocks a tensor


def context(world: int = 1, rank: int = 0) -> ParallelContext:
    return make_context(Layout(world, data=world), rank, dtype=torch.float64)


def values(step: int, kind: str, name: str, run: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{step} {kind} {name} {run}".encode()))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


def states(step: int, part: int = 0, parts: int = 1, run: int = 0) -> list[StateShard]:
    """State shards of data rank `part` of `parts` of a tiny model at a step. run: other runs have other values."""
    found = []
    for name, shape in SHAPES.items():
        spec = ShardSpec((Chunk(name, tuple(shape)),))
        p = Parameter(torch.empty(shape, dtype=torch.float64), spec)
        begin, end = part * p.numel() // parts, (part + 1) * p.numel() // parts
        for kind in ("model", "exp_avg", "exp_avg_sq"):
            found.append(StateShard(kind, p, begin, values(step, kind, name, run).view(-1)[begin:end].clone()))
    return found


def save_by_two_ranks(disk: MemoryDisk, step: int) -> None:
    """The operations of a save by two ranks, in one of the possible orders."""
    temporary = FOLDER / f".step_{step:08d}.two-1.tmp"
    retention.remove_leftovers(disk, FOLDER, temporary)
    make_folders(disk, FOLDER)
    disk.make_folder(temporary)
    parts = []
    for rank in (1, 0):
        ctx = context(2, rank)
        file = temporary / f"rank{rank:05d}.safetensors"
        parts.append(write_part(disk, file, *build_part(states(step, rank, 2), ctx), block_bytes=BLOCK))
    manifest = build_manifest(parts, context(2).layout, step, METADATA, BLOCK)
    assert retention.commit(disk, temporary, step_dir(FOLDER, step), manifest.encode()) is None
