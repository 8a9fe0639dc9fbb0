"""Runs a function on N ranks (gloo, and shared memory if built), forked from this process, which has imported torch."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from engine.distributed.context import ParallelContext
from engine.distributed.layout import Layout
from engine.proof.ranks import RankError, run

torch.set_num_threads(1)  # before any fork, also by tests that fork by themselves


def run_ranks(
    layout: Layout,
    function: Callable[[ParallelContext], Any],
    *,
    dtype: torch.dtype = torch.float64,
    timeout_s: float = 60.0,
    transport: str = "auto",
) -> list[Any]:
    """function(ctx) on every rank of the layout; returns the results by rank (anything picklable).

    AssertionError with the traceback of the first rank that failed.
    """

    def packed(ctx: ParallelContext) -> np.ndarray[Any, Any]:
        return np.frombuffer(pickle.dumps(function(ctx)), np.uint8)

    try:
        return [pickle.loads(x.tobytes()) for x in run(layout, packed, dtype, transport, timeout_s=timeout_s)]
    except RankError as error:
        raise AssertionError(f"rank {error.rank} failed:\n{error.trace}" if error.trace else str(error)) from None
