"""The learning rate schedule as a pure function of the step, so that checkpoints need no schedule state."""

from __future__ import annotations

import math

from engine.config.schema import LrScheduleConfig, OptimizerConfig


def learning_rate(step: int, steps: int, optimizer: OptimizerConfig, schedule: LrScheduleConfig) -> float:
    """The learning rate of step `step` (1-based) of a run of `steps` steps.

    Linear warm-up to optimizer.lr over schedule.warmup_steps, then decay to lr * min_lr_ratio. cosine (Loshchilov &
    Hutter 2017) and linear decay over all remaining steps; wsd (warmup-stable-decay, Hu et al. 2024) keeps the peak and
    decays linearly over the last decay_steps; constant does not decay. The decay ends at schedule.horizon_steps if set,
    else at `steps`; later steps keep the final rate.
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
