"""Verbs that use a model: train, evaluate, generate; plot; and doctor."""

from __future__ import annotations

import time
from pathlib import Path

from engine.errors import EXIT_ERROR, EXIT_OK, ConfigError, Fault
from engine.util.signals import StopRequest


def train(args: list[str]) -> int:
    """train a model, on one process or on many under torchrun"""
    stop = StopRequest()  # first: what follows takes seconds
    from engine.cli.train_options import parse_train
    from engine.config.load import load

    options = parse_train(args, "engine train")
    if options.world_size < 0 or (options.world_size and not options.dry_run):
        text = (
            "is not a number of ranks"
            if options.world_size < 0
            else "is for --dry-run; torchrun says how many there are"
        )
        raise ConfigError([Fault("", "--world-size", options.world_size, text, "Use 0 for what the degrees need.")])
    if options.dry_run:
        stop.release()
        world = options.world_size or None
        resolved = load(options.files, options.overrides, unknown=options.unknown, world=world, refuse_idle=True)
        from rich.console import Console

        from engine.cli.dry_run import show  # needs torch: faults are told before
        from engine.data.samples.special import check

        check(resolved.config)
        show(resolved, Console(), full=options.full)
        return EXIT_OK
    from engine.cli.output import outlive
    from engine.data.samples.special import check
    from engine.distributed.env import leave_code, read_env
    from engine.distributed.launch import leave, run
    from engine.monitor.ending import Ending
    from engine.train.loop import train
    from engine.train.state import mesh_of

    outlive()  # a run of weeks does not end because the terminal it was started from is closed
    env = read_env()
    try:
        resolved = load(options.files, options.overrides, unknown=options.unknown, world=env.world, refuse_idle=True)
        resolved = resolved.anchored()
        mesh = mesh_of(resolved.config, env)
        check(resolved.config)
    except ConfigError as error:
        leave_code(error.exit_code)
        if env.rank > 0:  # every rank finds the same faults: rank 0 tells them, and torchrun then ends the others
            stop.release()  # torchrun's SIGTERM ends the wait, or all would be told twice
            time.sleep(30)
        raise
    ending = Ending(Path(resolved.config.run.dir))
    code = run(lambda ctx: train(resolved, ctx, stop, ending), env, mesh, told=ending.write)
    return leave(code, env)


def evaluate(args: list[str]) -> int:
    """validation loss, perplexity and bits per byte of a checkpoint"""
    import tyro

    from engine.checkpoint.seal import storage_of
    from engine.cli.options import Evaluate
    from engine.config.checks import relations
    from engine.distributed.env import read_env
    from engine.distributed.launch import leave, run
    from engine.inference.load import config_of
    from engine.train.evaluate import evaluate
    from engine.train.state import mesh_of

    o = tyro.cli(Evaluate, args=args, prog="engine evaluate")
    degrees = {"--tensor": o.tensor, "--pipeline": o.pipeline}
    wrong = [Fault("", k, v, "a degree is at least 1", "Use 1 or more.") for k, v in degrees.items() if v < 1]
    if o.batches < 0:
        wrong.append(Fault("", "--batches", o.batches, "is below 0", "Use 0 for the whole corpus."))
    if wrong:
        raise ConfigError(wrong)
    env = read_env()
    storage = storage_of(o.secret)
    cfg = config_of(o.checkpoint, storage, tensor=o.tensor, pipeline=o.pipeline, world=env.world)
    if faults := relations(cfg, env.world):
        raise ConfigError(faults)
    code = run(
        lambda ctx: evaluate(cfg, ctx, o.checkpoint, o.data or cfg.data.valid, o.batches, storage),
        env,
        mesh_of(cfg, env),
    )
    return leave(code, env)


def generate(args: list[str]) -> int:
    """continue a prompt with a checkpoint"""
    import tyro

    from engine.checkpoint.seal import storage_of
    from engine.cli.options import Generate
    from engine.inference.generate import sample
    from engine.inference.load import load_model, load_tokenizer

    o = tyro.cli(Generate, args=args, prog="engine generate")
    single_process("generate")
    storage = storage_of(o.secret)
    model, tokenizer = load_model(o.checkpoint, storage), load_tokenizer(o.checkpoint, o.tokenizer, storage)
    print(o.prompt, end="", flush=True)
    for text in sample(
        model,
        tokenizer,
        o.prompt,
        max_tokens=o.max_tokens,
        temperature=o.temperature,
        top_k=o.top_k,
        prepend_bos=o.prepend_bos,
        seed=o.seed,
    ):
        print(text, end="", flush=True)
    print()
    return EXIT_OK


def plot(args: list[str]) -> int:
    """draw the loss curve of runs"""
    import tyro

    from engine.cli.options import Plot
    from engine.monitor.plot import plot_loss

    o = tyro.cli(Plot, args=args, prog="engine plot")
    for note in plot_loss(o.runs, o.output):
        print(f"note: {note}")
    print(f"wrote {o.output}")
    return EXIT_OK


def doctor(args: list[str]) -> int:
    """what is installed, which kernels run here, and whether they and gloo work"""
    import tyro

    from engine.cli.options import Doctor

    o = tyro.cli(Doctor, args=args, prog="engine doctor")
    if o.timeout_s <= 0:
        raise ConfigError([Fault("", "--timeout-s", o.timeout_s, "is no time to wait", "Use a number above 0.")])
    single_process("doctor")
    from engine.cli.doctor import examine  # loads torch: faults are told before

    faults = []
    for finding in examine(o.timeout_s):
        print(f"{finding.topic:<16} {finding.text}", flush=True)  # at once: the next may end the process
        faults += [finding] if finding.broken else []
    if not faults:
        print("nothing is broken")
        return EXIT_OK
    print("broken:")
    for finding in faults:
        print(f"  {finding.topic}: {finding.text}")
    return EXIT_ERROR


def single_process(verb: str) -> None:
    """ConfigError where torchrun started several processes of a verb that runs on one."""
    from engine.distributed.env import read_env

    world = read_env().world
    if world > 1:
        fault = Fault(
            "", "WORLD_SIZE", world, f"{verb} runs on one process", f"Start `engine {verb} ...` without torchrun."
        )
        raise ConfigError([fault])
