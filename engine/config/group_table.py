"""Rows of the [[optimizer.groups]] tables: parameters with their own settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from engine.config.section import Section


class GroupConfig(Section):
    """Settings of some parameters, selected by name, role or both. Each group is an [[optimizer.groups]] in a file,
    numbered from 1 on the command line; the first that matches a parameter wins."""

    names: str = ""
    """patterns of tensor names with spaces between them, such as "embed.weight layers.*.attention.*" (engine inspect
    lists the names of a checkpoint); empty: all names"""
    role: Literal["", "matrix", "embedding", "head", "vector"] = ""
    """matrix: weights of the blocks; embedding: embeddings, also if tied to the head; head: output projection; vector:
    norms and biases; empty: all roles"""
    lr_factor: float = Field(1.0, gt=0)
    """factor of the learning rate"""
    weight_decay: float | None = Field(None, ge=0)
    """weight decay; not given: optimizer.weight_decay, and none for vectors"""
    frozen: bool = False
    """do not train: no gradient, no optimizer state; the weights stay in checkpoints"""
    rule: str = ""
    """update rule; empty: optimizer.rule"""
