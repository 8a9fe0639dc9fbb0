"""Progress of a long call over documents: events for whoever shows them (a console, a test)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias


@dataclass(frozen=True)
class ProgressEvent:
    """How far a phase is. `input_bytes` of `input_bytes_total` is the fraction done; `_here`: by this process."""

    phase: Literal["train tokenizer", "encode", "clean", "write", "merge"]
    input_bytes: int
    input_bytes_total: int
    documents: int
    tokens: int
    elapsed_s: float
    input_bytes_here: int
    tokens_here: int


@dataclass(frozen=True)
class StepEvent:
    """How far a step of training a tokenizer is; `total` 0: the library does not tell."""

    phase: ClassVar[str] = "train tokenizer"
    step: str
    done: int
    total: int
    elapsed_s: float


Progress: TypeAlias = Callable[[ProgressEvent | StepEvent], None]
