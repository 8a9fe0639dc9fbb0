"""Random generators seeded by (seed, purpose, name), never by rank: every layout draws the same bits."""

from __future__ import annotations

import hashlib

import torch


def seed_for(seed: int, purpose: str, name: str) -> int:
    """A 32-bit seed derived from the run's seed (all of its bits), the purpose of the numbers, and a tensor name.

    torch's CPU generator (a Mersenne Twister) uses 32 bits of a seed and silently drops the rest.
    """
    digest = hashlib.blake2b(f"{seed}\0{purpose}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1 & 0xFFFFFFFF


def generator(seed: int, purpose: str, name: str) -> torch.Generator:
    """A CPU generator for one purpose and name. CPU always: the bits must not depend on the device either."""
    return torch.Generator("cpu").manual_seed(seed_for(seed, purpose, name))
