"""The `engine` command: one verb a capability. Heavy imports wait until the verb needs them."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import EXIT_CONFIG, EXIT_ERROR, EXIT_OK, ConfigError, EngineError, Fault, PlanError

if TYPE_CHECKING:
    import torch

    from engine.options import Inspect, Schedule


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb and exit with its code: 0 done, 1 error, 2 config error, 75 saved on a signal."""
    args = list(sys.argv[1:] if argv is None else argv)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # one line, without our source text
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        sys.exit(EXIT_OK if args else EXIT_CONFIG)
    verb = _VERBS.get(args[0])
    if verb is None:
        print(f"error: no verb {args[0]!r}\n\n{_overview()}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    try:
        code = verb(args[1:])
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        code = EXIT_ERROR
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _overview() -> str:
    lines = [f"  {name:<10} {(verb.__doc__ or '').strip()}" for name, verb in _VERBS.items()]
    return "usage: engine VERB [OPTIONS]   (engine VERB --help shows a verb's options)\n\n" + "\n".join(lines)


def _prepare(args: list[str]) -> int:
    """raw text -> tokenizer and memory-mapped train/valid files"""
    import tyro

    from engine.data.prepare import prepare
    from engine.faults import prepare_faults
    from engine.monitor.prepared import prepare_progress, show_prepared
    from engine.options import Prepare

    o = tyro.cli(Prepare, args=args, prog="engine prepare")
    if faults := list(prepare_faults(o)):
        raise ConfigError(faults)
    if o.workers:
        from engine.launch import limit_encoder_threads

        limit_encoder_threads(o.workers)
    with prepare_progress() as progress:
        report = prepare(
            list(o.input),
            o.output,
            tokenizer=o.tokenizer,
            train_vocab_size=o.train_vocab_size or None,
            valid_fraction=o.valid_fraction,
            include=o.include,
            exclude=o.exclude,
            json_key=o.json_key,
            format=o.format,
            on_error=o.on_error,
            max_document_bytes=o.max_document_bytes,
            append_eod=o.append_eod,
            parse_special=o.parse_special,
            fast=o.encoder == "auto",
            workers=o.workers,
            seed=o.seed,
            overwrite=o.overwrite,
            progress=progress,
            note=print,
        )
    show_prepared(report)
    return EXIT_OK


def _clean(args: list[str]) -> int:
    """raw text -> cleaned text: filters, test questions, personal data, duplicates"""
    import tyro

    from engine.data.clean import clean
    from engine.data.cleaner import Rules
    from engine.data.ngrams import MinHash
    from engine.faults import clean_faults
    from engine.monitor.clean import show_clean_report
    from engine.monitor.prepared import prepare_progress
    from engine.options import Clean

    o = tyro.cli(Clean, args=args, prog="engine clean")
    if faults := list(clean_faults(o)):
        raise ConfigError(faults)
    executor_options: dict[str, Any] = {"workers": o.workers or (os.cpu_count() or 1 if o.executor == "local" else -1)}
    if o.executor == "slurm":
        executor_options |= {"partition": o.slurm_partition, "time": o.slurm_time}
    rules = Rules(
        normalise=o.normalise,
        fix_mojibake=o.fix_mojibake,
        languages=o.language,
        language_threshold=o.language_threshold,
        quality=o.quality,
        decontaminate=o.decontaminate,
        decontaminate_keys=o.decontaminate_key,
        decontaminate_words=o.decontaminate_words,
        pii=o.pii,
        pii_kinds=o.pii_kinds,
        exact=o.exact_duplicates,
        minhash=MinHash(o.minhash_bands, o.minhash_rows, o.minhash_words),
    )
    with prepare_progress() as progress:
        report = clean(
            o.input,
            o.output,
            rules,
            include=o.include,
            exclude=o.exclude,
            json_key=o.json_key,
            on_error=o.on_error,
            tasks=o.tasks,
            executor=o.executor,
            executor_options=executor_options,
            dropped_text=o.dropped_text,
            overwrite=o.overwrite,
            progress=progress,
        )
    if report is None:
        print(f"tasks of {o.output} are still at work; when they are done, give the same command again to finish it")
    else:
        show_clean_report(report)
    return EXIT_OK


def _tokenizer(args: list[str]) -> int:
    """train a tokenizer: engine tokenizer train ..."""
    import tyro

    from engine.data.train_tokenizer import train_tokenizer
    from engine.monitor.prepared import prepare_progress
    from engine.options import TokenizerTrain

    if args[:1] not in (["train"], ["-h"], ["--help"]):
        raise ConfigError([Fault("engine tokenizer", " ".join(args[:1]), "is not train", "engine tokenizer train ...")])
    o = tyro.cli(TokenizerTrain, args=args[args[:1] == ["train"] :], prog="engine tokenizer train")
    with prepare_progress() as progress:
        tokenizer, dropped = train_tokenizer(
            o.input,
            o.output,
            o.vocab_size,
            kind=o.kind,
            special_tokens=o.special_tokens,
            max_bytes=o.max_bytes,
            include=o.include,
            exclude=o.exclude,
            json_key=o.json_key,
            format=o.format,
            on_error=o.on_error,
            overwrite=o.overwrite,
            progress=progress,
        )
    for reason, count in sorted(dropped.items()):
        print(f"dropped: {count:,} {reason}")
    print(f"tokenizer {o.output}: {o.kind}, {tokenizer.vocab_size:,} tokens, digest {tokenizer.digest[:16]}")
    if tokenizer.vocab_size < o.vocab_size:
        print(f"--vocab-size was {o.vocab_size:,}, but the text offers no more")
    return EXIT_OK


def _inspect(args: list[str]) -> int:
    """look at a corpus (counts, lengths, samples) or at a checkpoint (tensors, norms, lineage)"""
    from pathlib import Path

    import tyro
    from rich.console import Console

    from engine.config import DataConfig
    from engine.data import inspect
    from engine.data.corpora import end_of_document
    from engine.data.indexed import IndexedDataset
    from engine.data.special import fill_in_the_middle
    from engine.data.tokenizer import Tokenizer
    from engine.monitor.plot import plot_lengths
    from engine.options import Inspect

    o = tyro.cli(Inspect, args=args, prog="engine inspect")
    least = {"--samples": (o.samples, 0), "--seq-len": (o.seq_len, 1), "--seed": (o.seed, 0)}
    faults = [Fault(k, v, f"is below {n}", f"Use {n} or more.") for k, (v, n) in least.items() if v < n]
    if o.output.suffix not in (".png", ".svg"):
        faults.append(Fault("--output", str(o.output), "is neither a .png nor a .svg file", "End it in .png."))
    faults += [
        Fault(f"--{k.replace('_', '-')}", v, "is not a share", "Use a number of 0 to 1.")
        for k, v in (("fim_rate", o.fim_rate), ("fim_spm_rate", o.fim_spm_rate))
        if not 0 <= v <= 1
    ]
    if o.fim_tokens and not o.fim_rate:
        faults.append(Fault("--fim-tokens", o.fim_tokens, "has no meaning without --fim-rate", "Such as 0.5."))
    if faults:
        raise ConfigError(faults)
    if Path(o.data).is_dir() and not Path(f"{o.data}.idx").exists():
        return _inspect_checkpoint(o)
    dataset = IndexedDataset(o.data)
    folder = inspect.find_tokenizer(o.data, o.tokenizer)
    fim_options = {"fim_rate": o.fim_rate, "fim_spm_rate": o.fim_spm_rate, "fim_tokens": o.fim_tokens}
    data = DataConfig(tokenizer=str(folder or ""), **fim_options)
    tokenizer = Tokenizer.load(folder) if folder else None
    c, console = inspect.count(dataset), Console(highlight=False, soft_wrap=True)
    for line in (
        f"{o.data}: {c.documents:,} documents, {c.tokens:,} tokens, {c.bytes:,} bytes of {c.dtype}",
        f"tokens a document: {c.shortest:,} to {c.longest:,} (document {c.longest_document}), median {c.median:,}, "
        f"mean {c.mean:,.1f}",
        *([f"bytes of text a token: {c.text_bytes / max(1, c.tokens):.3f}"] if c.text_bytes else []),
        f"tokenizer: {folder or 'none given and none beside the corpus: samples are not decoded'}",
    ):
        console.print(line, markup=False)
    if o.verify:
        for line in inspect.verify(dataset, tokenizer):
            console.print(f"right: {line}", markup=False)
    if tokenizer is not None and o.samples:
        eod = end_of_document([dataset], "fim_rate", o.fim_rate) if o.fim_rate else 0
        fim = fill_in_the_middle(data, tokenizer, eod, o.seed) if o.fim_rate else None
        for text in inspect.decoded_samples(dataset, tokenizer, o.seq_len, o.samples, o.seed, fim):
            console.print(text, markup=False)
    plot_lengths(*inspect.histogram(dataset), o.data, o.output)
    console.print(f"wrote {o.output}", markup=False)
    return EXIT_OK


def _inspect_checkpoint(o: Inspect) -> int:
    from pathlib import Path

    from rich.console import Console

    from engine.checkpoint.format import find, verify_files
    from engine.checkpoint.inspect import summary, tensor_facts
    from engine.checkpoint.load import Reader

    console = Console(highlight=False, soft_wrap=True)
    with Reader(find(Path(o.data))) as reader:
        for line in summary(reader):
            console.print(line, markup=False)
        if o.verify:
            verify_files(reader.folder, reader.manifest)
            console.print("every digest is right")
        width = max(map(len, (name for names in reader.manifest.tensors.values() for name in names)), default=0)
        for t in tensor_facts(reader, norms=o.norms):
            norm = f"  norm {t.norm:.6g}" if o.norms else ""
            shape = " x ".join(map(str, t.shape))
            console.print(
                f"{t.kind:10}  {t.name:{width}}  {t.dtype:4}  {shape:14}  {t.files} files{norm}", markup=False
            )
    return EXIT_OK


def _train(args: list[str]) -> int:
    """train a model, on one process or on many under torchrun"""
    from engine.config import layout_of, load
    from engine.options import parse_train

    options = parse_train(args, "engine train")
    if options.world_size < 0 or (options.world_size and not options.dry_run):
        text = (
            "is not a number of ranks"
            if options.world_size < 0
            else "is for --dry-run; torchrun says how many there are"
        )
        raise ConfigError([Fault("--world-size", options.world_size, text, "Use 0 for what the degrees need.")])
    if options.dry_run:
        resolved = load(options.files, options.overrides, unknown=options.unknown, world=options.world_size or None)
        from rich.console import Console

        from engine.data.special import check
        from engine.preview import show  # needs torch: faults are told before

        check(resolved.config)
        show(resolved, Console())
        return EXIT_OK
    from engine.data.special import check
    from engine.launch import StopRequest, leave, pick_device, read_env, run
    from engine.optim.precision import PRECISIONS
    from engine.train import train

    env = read_env()
    try:
        resolved = load(options.files, options.overrides, unknown=options.unknown, world=env.world)
        device = pick_device(resolved.config.train.device, env)
        check(resolved.config)
    except ConfigError:
        if env.rank > 0:  # every rank finds the same faults: rank 0 tells them, and torchrun then ends the others
            time.sleep(30)
        raise
    cfg = resolved.config
    stop = StopRequest()
    code = run(
        lambda ctx: train(resolved, ctx, stop),
        env,
        layout_of(cfg),
        num_kv_heads=cfg.model.num_kv_heads,
        dtype=PRECISIONS[cfg.train.precision].compute,
        device=device,
        timeout_s=cfg.parallel.timeout_s,
    )
    return leave(code, env)


def _evaluate(args: list[str]) -> int:
    """validation loss, perplexity and bits per byte of a checkpoint"""
    import tyro

    from engine.config import layout_of, relations
    from engine.evaluate import evaluate
    from engine.inference import config_of
    from engine.launch import leave, pick_device, read_env, run
    from engine.optim.precision import PRECISIONS
    from engine.options import Evaluate

    o = tyro.cli(Evaluate, args=args, prog="engine evaluate")
    degrees = {"--tensor": o.tensor, "--pipeline": o.pipeline}
    if wrong := [Fault(k, v, "a degree is at least 1", "Use 1 or more.") for k, v in degrees.items() if v < 1]:
        raise ConfigError(wrong)
    env = read_env()
    cfg = config_of(o.checkpoint, tensor=o.tensor, pipeline=o.pipeline, world=env.world)
    if faults := relations(cfg, env.world):
        raise ConfigError(faults)
    code = run(
        lambda ctx: evaluate(cfg, ctx, o.checkpoint, o.data or cfg.data.valid, o.batches),
        env,
        layout_of(cfg),
        num_kv_heads=cfg.model.num_kv_heads,
        dtype=PRECISIONS[cfg.train.precision].compute,
        device=pick_device(cfg.train.device, env),
        timeout_s=cfg.parallel.timeout_s,
    )
    return leave(code, env)


def _generate(args: list[str]) -> int:
    """continue a prompt with a checkpoint"""
    import tyro

    from engine.generate import sample
    from engine.inference import load_model, load_tokenizer
    from engine.options import Generate

    o = tyro.cli(Generate, args=args, prog="engine generate")
    _single_process("generate")
    model, tokenizer = load_model(o.checkpoint), load_tokenizer(o.checkpoint, o.tokenizer)
    print(o.prompt, end="", flush=True)
    for text in sample(
        model,
        tokenizer,
        o.prompt,
        max_tokens=o.max_tokens,
        temperature=o.temperature,
        top_k=o.top_k,
        seed=o.seed,
    ):
        print(text, end="", flush=True)
    print()
    return EXIT_OK


def _export(args: list[str]) -> int:
    """write a checkpoint as a Hugging Face folder"""
    import tyro

    from engine.checkpoint.format import find
    from engine.checkpoint.hf import export
    from engine.inference import compare_with_transformers, config_of, load_tokenizer, tokenizer_folder
    from engine.options import Export

    o = tyro.cli(Export, args=args, prog="engine export")
    _single_process("export")
    cfg, tokenizer = config_of(o.checkpoint), load_tokenizer(o.checkpoint, o.tokenizer)
    size = export(
        find(o.checkpoint),
        o.output,
        dtype=_dtype(o.dtype or cfg.train.precision),
        tokenizer=tokenizer_folder(o.checkpoint, o.tokenizer),
        eod=tokenizer.eod,
    )
    print(f"wrote {o.output}: {size:,} bytes of weights, config.json, generation_config.json, tokenizer")
    if o.verify:
        difference, largest = compare_with_transformers(o.checkpoint, o.output)
        print(f"transformers gives the same logits: largest difference {difference:.2e} (largest logit {largest:.2f})")
    return EXIT_OK


def _verify(args: list[str]) -> int:
    """check every file of a checkpoint against its digest"""
    import tyro

    from engine.checkpoint.format import find, read_manifest, verify_files
    from engine.options import Verify

    folder = find(tyro.cli(Verify, args=args, prog="engine verify").checkpoint)
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    size = sum(entry.size for entry in manifest.files.values())
    print(f"{folder}: step {manifest.step}, {len(manifest.files)} files, {size:,} bytes, every digest is right")
    return EXIT_OK


def _plot(args: list[str]) -> int:
    """draw the loss curve of runs"""
    import tyro

    from engine.monitor.plot import plot_loss
    from engine.options import Plot

    o = tyro.cli(Plot, args=args, prog="engine plot")
    plot_loss(o.runs, o.output)
    print(f"wrote {o.output}")
    return EXIT_OK


def _schedule(args: list[str]) -> int:
    """prove, simulate, draw, compare and search pipeline schedules"""
    import functools

    import tyro
    from rich.console import Console

    from engine.options import Schedule
    from engine.pipeline import report
    from engine.pipeline.schedules import load_plan
    from engine.pipeline.simulate import Costs

    o = tyro.cli(Schedule, args=args, prog="engine schedule")
    if faults := list(_schedule_faults(o)):
        raise ConfigError(faults)
    names = o.compare or ((o.name,) if o.name else () if o.plan or o.run else ("1f1b",))
    entries, costs, unit = [], Costs.parse(o.costs), ""
    ranks, microbatches = o.ranks, o.microbatches
    if o.run is not None:
        entries, costs, unit = *report.measured(o.run), "ms"
        ranks, microbatches = entries[0].plan.num_ranks, entries[0].plan.microbatches
    plan_of = functools.partial(report.plan_of, memory_cap=o.memory_cap, seed=o.seed, iterations=o.iterations)
    plans = [plan_of(name, ranks, microbatches, o.chunks or None, costs) for name in names]
    plans += [load_plan(o.plan)] if o.plan else []
    entries += [report.simulated(plan.name, plan, costs) for plan in plans]
    report.show(entries, Console(highlight=False), unit, o.memory_cap)
    if o.text:
        print("\n\n".join(map(str, dict.fromkeys(entry.plan for entry in entries))))
    written = [*report.picture(entries, o.output, unit)]
    if o.save is not None:
        report.save(entries[-1].plan, o.save)
        written.append(o.save)
    print(f"wrote {', '.join(map(str, written))}")
    return EXIT_OK


def _schedule_faults(o: Schedule) -> Iterator[Fault]:
    """What is wrong with the options of `engine schedule`."""
    import difflib

    from engine.pipeline.report import NAMES
    from engine.pipeline.schedules import SCHEDULES
    from engine.pipeline.search import share_costs
    from engine.pipeline.simulate import Costs

    for option, name in [("--name", o.name), *(("--compare", name) for name in o.compare)]:
        if name and name not in NAMES:
            near = difflib.get_close_matches(name.lower(), NAMES, n=1, cutoff=0.0)[0]
            yield Fault(option, name, f"is none of {', '.join(NAMES)}", f"Did you mean {near}?")
    counts = {"--ranks": (o.ranks, 1), "--microbatches": (o.microbatches, 1), "--chunks": (o.chunks, 0)}
    counts["--iterations"] = (o.iterations or 0, 0)
    bad = [Fault(k, v, f"is below {least}", f"Use {least} or more.") for k, (v, least) in counts.items() if v < least]
    yield from bad
    needed = SCHEDULES[o.name].chunks if o.name in SCHEDULES and not o.compare else None
    if o.chunks > 0 and needed is not None and o.chunks != needed:
        text = f"{o.name} places {needed} stage{'s' if needed > 1 else ''} on each rank"
        yield Fault("--chunks", o.chunks, text, "Leave it out, or choose interleaved, which takes any number.")
    try:
        costs = Costs.parse(o.costs)
        if not bad and not (o.plan or o.run):
            share_costs(costs, o.ranks, o.ranks)
    except PlanError as error:
        yield Fault("--costs", o.costs, str(error), "Write them as f=1,i=1,w=0.5,comm=0.1.")
    if o.memory_cap is not None and not o.memory_cap > 0:
        yield Fault("--memory-cap", o.memory_cap, "is not above 0", "Give microbatches, or leave it out for no cap.")
    if o.output.suffix not in (".png", ".svg"):
        yield Fault("--output", str(o.output), "is neither a .png nor a .svg file", "End it in .png; both are written.")
    if o.name and o.compare:
        yield Fault("--name", o.name, "stands beside --compare", "Give one of them.")
    if o.costs and o.run:
        yield Fault("--costs", o.costs, "stands beside --from, which has costs of its own", "Give one of them.")
    if o.save is not None and len(o.compare) + bool(o.name) + bool(o.plan) > 1:
        yield Fault(
            "--save", str(o.save), "takes one plan, and here are several", "Save each with a --name of its own."
        )


def _dtype(name: str) -> torch.dtype:
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    if name not in dtypes:
        raise ConfigError([Fault("--dtype", name, f"is none of {', '.join(dtypes)}", "Choose one.")])
    return dtypes[name]


def _single_process(verb: str) -> None:
    from engine.launch import read_env

    world = read_env().world
    if world > 1:
        fault = Fault(
            "WORLD_SIZE", world, f"{verb} runs on one process", f"Start `engine {verb} ...` without torchrun."
        )
        raise ConfigError([fault])


_VERBS: dict[str, Callable[[list[str]], int]] = {
    "clean": _clean,
    "prepare": _prepare,
    "tokenizer": _tokenizer,
    "inspect": _inspect,
    "train": _train,
    "evaluate": _evaluate,
    "generate": _generate,
    "export": _export,
    "verify": _verify,
    "plot": _plot,
    "schedule": _schedule,
}
