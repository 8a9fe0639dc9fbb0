"""A rank of one case of train_cpu.py: python tools/bench/worker.py CASE RESULT.json OPTIONS (JSON).

Started by train_cpu.py, with torchrun where a case has more than one process; in the peers' interpreter for peers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import Case, Meter, Options, mine


def engine(o: Options, case: Case) -> dict[str, Any]:
    """The engine in this process."""
    from engine.batch import MicroBatch, Sequence
    from engine.config.derived import derive
    from engine.config.load import load
    from engine.distributed.collectives import all_reduce_
    from engine.distributed.context import ParallelContext
    from engine.distributed.env import read_env
    from engine.distributed.launch import Mesh, run
    from engine.train.state import setup
    from engine.train.step import train_step

    values = {
        "model.hidden_size": o.hidden,
        "model.num_layers": o.layers,
        "model.num_heads": o.heads,
        "model.ffn_size": o.ffn,
        "model.vocab_size": o.vocab,
        "train.seq_len": o.seq,
        "train.micro_batch_size": o.micro_batch,
        "train.global_batch_size": case.sequences(o.micro_batch),
        "train.device": "cpu",
        "optimizer.lr": o.lr,
        "lr_schedule.kind": "constant",
        "lr_schedule.warmup_steps": 0,
    }
    if case.column != "one":
        values[f"parallel.{case.column}"] = case.processes
    if case.column == "pipeline":
        values["parallel.layers"] = "{},{}".format(*o.stages())
    env = read_env()
    cfg = load([], {k: str(v) for k, v in values.items()}, world=env.world).config
    measured: dict[str, Any] = {}

    def main(ctx: ParallelContext) -> int:
        state = setup(cfg, ctx)
        tokens, labels = mine(o, case, ctx.data.rank)
        weights, samples = torch.ones(o.micro_batch, o.seq, dtype=torch.float64), torch.arange(o.micro_batch)
        rows = zip(tokens.split(o.micro_batch), labels.split(o.micro_batch))
        batches = [MicroBatch(t, one, weights, samples, Sequence.of_rows(o.seq)) for t, one in rows]
        parameters = torch.tensor(float(sum(p.numel() for p in state.params)))
        if case.column in ("tensor", "pipeline"):
            all_reduce_(parameters, ctx.world)
        meter = Meter(o, case, int(parameters), lambda x: all_reduce_(x, ctx.world))
        measured.update(meter.run(lambda: train_step(state, batches).loss))
        return 0

    mesh = Mesh(derive(cfg).layout, torch.float32, torch.device("cpu"), timeout_s=600.0)
    code = run(main, env, mesh)
    if code:
        sys.exit(code)
    return measured


def gemm(o: Options) -> dict[str, float]:
    """GFLOP/s of a square fp32 matmul, torch's and ours: each the best of 6, in turns."""
    from engine.ops import native

    n, (ours, _) = o.gemm_size, native.load()
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    works = {"torch": lambda: torch.mm(a, b, out=out)}
    if ours is not None and ours.gemm_wins():
        works["ours"] = lambda: ours.mm_(out, a, b, False)
    best = dict.fromkeys(works, 0.0)
    for _ in range(6):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            best[name] = max(best[name], 2 * n**3 / (time.perf_counter() - begin) / 1e9)
    return best


def main(name: str, out: str, options: str) -> None:
    """Measure one case and leave the result in a file."""
    values = json.loads(options)
    o = Options(**values | {"peers_env": Path(values["peers_env"])})
    result: dict[str, Any]
    if name == "gemm":
        torch.set_num_threads(o.threads)
        result = gemm(o)
    else:
        case = o.case(name)
        torch.set_num_threads(case.threads)
        if case.title == "engine":
            result = engine(o, case)
        else:
            import peers

            result = peers.run(o, case, name.rsplit(".", 1)[-1])
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(result), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of process groups may abort a process that is taken down piece by piece (launch.leave)


if __name__ == "__main__":
    main(*sys.argv[1:])
