"""Rows of the [[phase]] tables: the values that hold from a step on."""

from __future__ import annotations

from pydantic import Field

from engine.config.section import Section


class PhaseConfig(Section):
    """Values that hold from a step on, until a later phase changes them. Each phase is a [[phase]] in a file, numbered
    from 1 on the command line; values that it does not give stay as they were."""

    from_step: int | None = Field(None, ge=1)
    """first optimizer step of the phase; steps count from 1"""
    global_batch_size: int | None = Field(None, ge=1)
    """as train.global_batch_size"""
    micro_batch_size: int | None = Field(None, ge=1)
    """as train.micro_batch_size"""
