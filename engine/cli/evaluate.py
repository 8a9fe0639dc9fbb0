"""`engine evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from engine.cli.common import Help, parse
from engine.errors import ConfigError, FieldError


@dataclass
class EvaluateOptions:
    """Compute validation loss, perplexity and bits per byte of a checkpoint.

    Runs on one process, or on several under torchrun.
    """

    checkpoint: tyro.conf.Positional[Path]
    """run folder (its newest checkpoint) or step folder"""
    data: str = ""
    """prefix of the corpus to score; empty: the run's data.valid"""
    batches: int = 0
    """number of global batches to score (the same samples in every layout); 0: the whole corpus"""
    tensor: int = 1
    """ranks that split each matrix; use more than 1 if the model does not fit on one device"""
    pipeline: int = 1
    """ranks that split the layers; the remaining processes split the batch"""
    secret: str = ""
    """file:PATH or env:NAME of the secret of a signed or encrypted checkpoint"""


HELP = Help(
    examples=(
        ("Score the run's validation corpus with its newest checkpoint", "engine evaluate runs/demo"),
        (
            "Score another corpus on four processes, each matrix split across two of them",
            "torchrun --nproc-per-node 4 -m engine evaluate runs/demo --data corpus/web-test --tensor 2",
        ),
    ),
)


def run(args: list[str]) -> int:
    """Run the command; returns the exit code."""

    from engine.checkpoint.seal import open_storage
    from engine.config.checks import config_errors
    from engine.config.derived import derive
    from engine.distributed.env import read_env
    from engine.distributed.launch import leave
    from engine.distributed.launch import run as run_on_ranks
    from engine.inference.load import config_of
    from engine.train.evaluate import evaluate
    from engine.train.state import mesh_of

    o = parse(EvaluateOptions, args, "evaluate", HELP)
    degrees = {"--tensor": o.tensor, "--pipeline": o.pipeline}
    wrong = [
        FieldError("cli.too-small", k, v, "is below 1", "Use 1 or more ranks.") for k, v in degrees.items() if v < 1
    ]
    if o.batches < 0:
        wrong.append(FieldError("cli.too-small", "--batches", o.batches, "is below 0", "Use 0 for the whole corpus."))
    if wrong:
        raise ConfigError(wrong)
    env = read_env()
    storage = open_storage(o.secret)
    cfg = config_of(o.checkpoint, storage, tensor=o.tensor, pipeline=o.pipeline, world=env.world)
    if errors := config_errors(cfg, env.world):
        raise ConfigError(errors)
    derived = derive(cfg)
    code = run_on_ranks(
        lambda ctx: evaluate(cfg, derived, ctx, o.checkpoint, o.data or cfg.data.valid, o.batches, storage),
        env,
        mesh_of(cfg, derived, env),
    )
    return leave(code, env)
