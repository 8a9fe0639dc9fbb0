"""Initial values of one rank's parameters by keyed draws, next to torch's generator filling the same tensors.

    python tools/bench/initialise.py --preset llama-2-7b --tensor 8 --rounds 3

Processor seconds on one thread, in turns; the memory is touched before. Keyed draws give each value from its place in
the whole tensor, so a rank draws only its part; torch's generator would have to draw the whole tensor on every rank.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from report import Row, finish

from engine.config.derived import derive
from engine.config.load import load
from engine.distributed.context import make_context
from engine.distributed.sharding import Parameter, initialise_
from engine.model.stages import build_stages


def fill(params: list[Parameter]) -> None:
    """Fill what is drawn from torch's generator."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in params:
            if p.spec.init_std is not None:
                p.normal_(0.0, p.spec.init_std, generator=generator)


def measure(preset: str, tensor: int, rounds: int) -> tuple[Row, int]:
    """The row of processor seconds, and the number of values of rank 0."""
    torch.set_num_threads(1)
    settings = {"model.preset": preset, "parallel.tensor": tensor, "train.precision": "fp32"}
    cfg = load([], settings, world=tensor).config
    derived = derive(cfg)
    ctx = make_context(derived.layout, 0, dtype=torch.float32)
    params = [p for _, _, stage in build_stages(cfg, ctx, derived) for p in stage]
    for p in params:
        p.detach().zero_()
    ours, peers = [], []
    for _ in range(rounds):
        begin = time.process_time()
        initialise_(params, ctx, 1)
        middle = time.process_time()
        fill(params)
        ours.append(middle - begin)
        peers.append(time.process_time() - middle)
    what = f"initial values, a rank of {preset} at tensor {tensor}"
    return Row(what, "CPU s", ours, "normal_", peers, more=False), sum(p.numel() for p in params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-2-7b")
    parser.add_argument("--tensor", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every number here")
    args = parser.parse_args()
    row, values = measure(args.preset, args.tensor, args.rounds)
    finish([row], {"values": values}, args.json, f"{values:,} values")


if __name__ == "__main__":
    main()
