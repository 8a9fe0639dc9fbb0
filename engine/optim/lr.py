"""The learning rate as a pure function of the step: nothing to save, nothing to restore wrongly."""

from __future__ import annotations

import math

from engine.config.schema import LrScheduleConfig, OptimizerConfig


def learning_rate(step: int, steps: int, optimizer: OptimizerConfig, schedule: LrScheduleConfig) -> float:
    """The rate used by step number `step` (1-based) of a run of `steps`.

    Linear warm-up to optimizer.lr over schedule.warmup_steps, then down to lr * min_lr_ratio: cosine (Loshchilov &
    Hutter 2017) or linear over the rest; wsd (Hu et al. 2024) holds and decays linearly over the last decay_steps. The
    decay ends at schedule.horizon_steps, or without it at `steps`; later steps keep what it ended with.
    """
    peak, floor, warmup = optimizer.lr, optimizer.lr * schedule.min_lr_ratio, schedule.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if schedule.kind == "constant":
        return peak
    end = schedule.horizon_steps or steps
    begin = end - schedule.decay_steps if schedule.kind == "wsd" else warmup
    done = min(1.0, max(0.0, (step - begin) / max(1, end - begin)))
    if schedule.kind == "cosine":
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))
    return peak + (floor - peak) * done
