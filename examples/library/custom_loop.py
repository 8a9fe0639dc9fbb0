"""A custom training loop: save a checkpoint when the validation loss improves, stop early when it no longer does.

    python examples/library/custom_loop.py TRAIN VALID RUN
    torchrun --nproc-per-node 2 examples/library/custom_loop.py TRAIN VALID RUN

TRAIN, VALID: prefixes of corpora written by `engine prepare`. RUN: folder for checkpoints; a second start resumes.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import engine

PATIENCE = 2  # validations in a row without improvement

OPTIONS = {
    **{"model.preset": "micro", "train.seq_len": "64", "train.global_batch_size": "8", "train.steps": "20"},
    **{"eval.every": "5", "eval.batches": "2", "optimizer.lr": "0.003", "lr_schedule.warmup_steps": "2"},
}


def main(resolved: engine.Resolved, ctx: engine.ParallelContext) -> int:
    """The loop of one rank. All ranks see the same losses and scores, so all make the same decisions."""
    cfg, best, num_worse = resolved.config, math.inf, 0
    with engine.open_run(resolved, ctx) as run:
        assert run.evaluator is not None, "the config names a validation corpus"
        for report in engine.steps(run):
            say(ctx, f"step {run.state.step}: loss {report.result.loss:.4f}" if report.result else "skipped")
            if run.state.step % cfg.eval.every:
                continue
            score = run.evaluator.run(cfg.eval.batches)
            say(ctx, f"step {run.state.step}: validation {score}")
            if score.loss < best:
                best, num_worse = score.loss, 0
                engine.save_state(run.state, Path(cfg.run.dir) / "checkpoints", run.data.metadata)
            else:
                num_worse += 1
            if num_worse == PATIENCE:
                break
    return 0


def say(ctx: engine.ParallelContext, text: str) -> None:
    """Print on rank 0 only."""
    if ctx.rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    train, valid, folder = sys.argv[1:] if len(sys.argv) == 4 else sys.exit(__doc__)
    env = engine.read_env()
    options = OPTIONS | {"data.train": train, "data.valid": valid, "run.dir": folder}
    resolved = engine.load_config([], options, world=env.world)
    mesh = engine.mesh_of(resolved.config, resolved.derived, env)
    code = engine.launch(lambda ctx: main(resolved, ctx), env, mesh)
    sys.exit(engine.leave(code, env))
