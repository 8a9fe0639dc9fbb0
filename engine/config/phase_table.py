"""Rows of the [[phase]] tables: the values that hold from a step on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from engine.config.section import Section

_NOT_WEIGHTS = "is not weights and names in turn, each name once, such as 0.2 web 0.8 code"
_Weight = Annotated[float, Field(ge=0, le=1e18, strict=True)]


class PhaseConfig(Section):
    """Values that hold from an optimizer step on, until a later phase changes them.

    A file has a [[phase]] for each, in the order of their steps; the command line numbers them from 1. A value that a
    phase does not give stays as it was. Validation always uses the sizes of [train].
    """

    from_step: int | None = Field(None, ge=1)
    """first optimizer step of the phase; steps count from 1"""
    global_batch_size: int | None = Field(None, ge=1)
    """sequences per optimizer step from here on, as train.global_batch_size"""
    micro_batch_size: int | None = Field(None, ge=1)
    """sequences per forward pass of a rank from here on, as train.micro_batch_size"""
    seq_len: int | None = Field(None, ge=2)
    """tokens per sequence from here on, as train.seq_len; every source starts a new epoch there (docs/phases.md)"""
    rope_theta: float | None = Field(None, gt=0)
    """as model.rope_theta; exports and evaluation use the RoPE settings of the checkpoint's last step"""
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] | None = None
    """as model.rope_scaling"""
    rope_factor: float | None = Field(None, ge=1)
    """as model.rope_factor"""
    rope_original_seq_len: int | None = Field(None, ge=1)
    """as model.rope_original_seq_len"""
    rope_low_freq_factor: float | None = Field(None, gt=0)
    """as model.rope_low_freq_factor"""
    rope_high_freq_factor: float | None = Field(None, gt=0)
    """as model.rope_high_freq_factor"""
    rope_beta_fast: float | None = Field(None, gt=0)
    """as model.rope_beta_fast"""
    rope_beta_slow: float | None = Field(None, gt=0)
    """as model.rope_beta_slow"""
    rope_attention_factor: float | None = Field(None, ge=0)
    """as model.rope_attention_factor"""
    weights: dict[str, _Weight] | None = None
    """weights of sources of the blend in data.train from here on, as { web = 0.2, code = 0.8 } in a file and "0.2 web
    0.8 code" on the command line; other sources keep theirs, 0 stops a source"""

    @field_validator("weights", mode="before")
    @classmethod
    def _weights_of_text(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        words = value.split()
        if not words or len(words) % 2 or len(set(words[1::2])) != len(words[1::2]):
            raise PydanticCustomError("weights", _NOT_WEIGHTS)
        try:
            return {name: float(weight) for weight, name in zip(words[::2], words[1::2])}
        except ValueError:
            raise PydanticCustomError("weights", _NOT_WEIGHTS) from None
