"""Train in one layout and resume in another: a checkpoint contains whole tensors, independent of ranks.

    python examples/library/resume_in_another_layout.py CORPUS RUN 10
    torchrun --nproc-per-node 2 examples/library/resume_in_another_layout.py CORPUS RUN 20

The first command trains ten steps on one process, the second ten more with every matrix sharded across two tensor
ranks. The losses equal those of one process, except for the rounding of sums.
"""

from __future__ import annotations

import sys
from pathlib import Path

import engine

OPTIONS = {
    **{"model.preset": "micro", "train.seq_len": "64", "train.global_batch_size": "8"},
    **{"optimizer.lr": "0.003", "lr_schedule.kind": "constant", "lr_schedule.warmup_steps": "0"},
}


def main(resolved: engine.Resolved, ctx: engine.ParallelContext) -> int:
    """Resume from the newest checkpoint of the run folder, saved in any layout, and save at the end."""
    with engine.open_run(resolved, ctx) as run:
        for report in engine.steps(run):
            if ctx.rank == 0 and report.result:
                print(f"step {run.state.step} on {ctx.world.size}: loss {report.result.loss:.6f}", flush=True)
        engine.save_state(run.state, Path(resolved.config.run.dir) / "checkpoints", run.data.metadata)
    return 0


if __name__ == "__main__":
    corpus, folder, steps = sys.argv[1:] if len(sys.argv) == 4 else sys.exit(__doc__)
    env = engine.read_env()
    options = OPTIONS | {"data.train": corpus, "run.dir": folder, "train.steps": steps}
    resolved = engine.load_config([], options | {"parallel.tensor": str(env.world)}, world=env.world)
    mesh = engine.mesh_of(resolved.config, resolved.derived, env)
    code = engine.launch(lambda ctx: main(resolved, ctx), env, mesh)
    sys.exit(engine.leave(code, env))
