"""Losses of a small model in bf16 and in both kinds of fp8, as a picture: docs/images/fp8.png.

python tools/bench/fp8_curve.py --steps 200      # on a CPU, where fp8 is emulated by rounding: minutes
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from gpu_step import loss_curve
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Options:
    steps: int = 200
    hidden: int = 128
    """width of the 4 layers; sequences of 128 bytes, 16 a step"""
    device: str = "cpu"
    picture: Path = ROOT / "docs/images/fp8.png"
    json: Path | None = None
    """write the losses here"""


def smooth(losses: list[float], over: int = 10) -> list[float]:
    """Mean of each value and those before it, `over` in all."""
    return [sum(losses[max(0, i + 1 - over) : i + 1]) / min(over, i + 1) for i in range(len(losses))]


def main() -> None:
    o = tyro.cli(Options, description=__doc__)
    curves = {
        fp8: loss_curve(torch.device(o.device), hidden=o.hidden, steps=o.steps, fp8=fp8)
        for fp8 in ("none", "tensorwise", "rowwise")
    }
    tail = max(1, o.steps // 10)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, difference = figure.subplots(1, 2)
    for fp8, losses in curves.items():
        name = "bf16" if fp8 == "none" else f"fp8 {fp8}"
        last = sum(losses[-tail:]) / tail
        error = max(abs(a - b) for a, b in zip(losses, curves["none"]))
        print(
            f"{name}: mean loss of the last {tail} steps {last:.4f}, max difference from bf16 {error:.4f}", flush=True
        )
        axes.plot(smooth(losses), label=name)
        difference.plot([a - b for a, b in zip(smooth(losses), smooth(curves["none"]))], label=name)
    axes.set(xlabel="step", ylabel="loss, nats per byte")
    difference.set(xlabel="step", ylabel="loss minus that of bf16, nats per byte")
    axes.legend()
    figure.suptitle("mean of 10 steps")
    figure.savefig(o.picture, dpi=120)
    if o.json:
        o.json.write_text(json.dumps(curves) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
