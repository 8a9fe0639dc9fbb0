"""Progress events of long commands over documents, for a console or a test to show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias


@dataclass(frozen=True)
class ProgressEvent:
    """Progress of a phase; `input_bytes / input_bytes_total` is the fraction done. `_here`: done by this process."""

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
    """Progress of a step of training a tokenizer; `total` 0: unknown, the library does not report it."""

    phase: ClassVar[str] = "train tokenizer"
    step: str
    done: int
    total: int
    elapsed_s: float


Progress: TypeAlias = Callable[[ProgressEvent | StepEvent], None]
