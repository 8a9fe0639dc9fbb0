"""A data rank's share of a run whose batches all have one size."""

from __future__ import annotations

from typing import Any

from engine.config.phases import Phase, Phases, Position
from engine.data.samples.loader import RankShare


def share_of(
    order: Any, global_batch_size: int, micro_batch_size: int, data_rank: int, data_size: int, **more: Any
) -> RankShare:
    """The share of a run that begins at sample `start_sample` (0); `transforms` as for RankShare."""
    phase = Phase(1, global_batch_size, micro_batch_size, order.seq_len)
    phases = Phases((phase,), Position(samples=more.pop("start_sample", 0)))
    return RankShare(order, phases, data_rank, data_size, **more)
