"""Verbs that make and show data: prepare, clean, merge-datasets, tokenizer, inspect."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EXIT_OK, ConfigError, Fault
from engine.util.signals import Interrupts, interruptible

if TYPE_CHECKING:
    from engine.data.read.progress import Progress, ProgressEvent, StepEvent


def _interruptible(verb: Callable[[list[str], Interrupts], int]) -> Callable[[list[str]], int]:
    """The verb, ended by signals with a line on how to go on."""

    @functools.wraps(verb)
    def run(args: list[str]) -> int:
        with interruptible("nothing is written; give the same command again") as stop:
            return verb(args, stop)

    return run


@contextlib.contextmanager
def _progress_later() -> Iterator[Callable[[ProgressEvent | StepEvent], None]]:
    """prepare_progress, loaded (it needs rich) with the first event: by then other threads are at work."""
    with contextlib.ExitStack() as stack:
        shows: list[Progress] = []

        def progress(event: ProgressEvent | StepEvent) -> None:
            from engine.cli.prepare_console import prepare_progress

            if not shows:
                shows.append(stack.enter_context(prepare_progress()))
            shows[0](event)

        yield progress


@_interruptible
def prepare(args: list[str], stop: Interrupts) -> int:
    """raw text -> tokenizer and memory-mapped train/valid/test files"""
    import tyro

    from engine.cli.checks import prepare_faults
    from engine.cli.options import Prepare
    from engine.data.prepare.run import prepare

    o = tyro.cli(Prepare, args=args, prog="engine prepare")
    if faults := list(prepare_faults(o)):
        raise ConfigError(faults)
    if o.workers:
        from engine.distributed.env import limit_encoder_threads

        limit_encoder_threads(o.workers)
    with _progress_later() as progress:
        report = prepare(
            list(o.input),
            o.output,
            tokenizer=o.tokenizer,
            merges=o.merges,
            lower_case=o.lower_case,
            train_vocab_size=o.train_vocab_size or None,
            train_bytes=o.train_bytes,
            valid_fraction=o.valid_fraction,
            test_fraction=o.test_fraction,
            include=o.include,
            exclude=o.exclude,
            json_key=o.json_key,
            format=o.format,
            on_error=o.on_error,
            max_document_bytes=o.max_document_bytes,
            append_eod=o.append_eod,
            prepend_bos=o.prepend_bos,
            parse_special=o.parse_special,
            fast=o.encoder == "auto",
            workers=o.workers,
            seed=o.seed,
            overwrite=o.overwrite,
            progress=progress,
            note=print,
            stop=stop,
        )
    from engine.cli.prepare_console import show_prepared

    show_prepared(report)
    return EXIT_OK


@_interruptible
def clean(args: list[str], stop: Interrupts) -> int:
    """raw text -> cleaned text: filters, test questions, personal data, duplicates"""
    import tyro

    from engine.cli.checks import clean_faults
    from engine.cli.clean_console import show_clean_report
    from engine.cli.options import Clean
    from engine.cli.prepare_console import prepare_progress
    from engine.data.clean.ngrams import MinHash
    from engine.data.clean.rules import Rules
    from engine.data.clean.run import clean

    o = tyro.cli(Clean, args=args, prog="engine clean")
    if faults := list(clean_faults(o)):
        raise ConfigError(faults)
    executor_options: dict[str, Any] = {"workers": o.workers or (os.cpu_count() or 1 if o.executor == "local" else -1)}
    if o.executor == "slurm":
        executor_options |= {"partition": o.slurm_partition, "time": o.slurm_time}
    rules = Rules(
        normalise=o.normalise,
        fix_mojibake=o.fix_mojibake,
        width=o.width,
        chinese=o.chinese,
        languages=o.language,
        language_threshold=o.language_threshold,
        quality=o.quality,
        quality_language=o.quality_language,
        decontaminate=o.decontaminate,
        decontaminate_keys=o.decontaminate_key,
        decontaminate_words=o.decontaminate_words,
        fold_numbers=o.fold_numbers,
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
            format=o.format,
            keep_columns=o.keep_columns,
            on_error=o.on_error,
            tasks=o.tasks,
            executor=o.executor,
            executor_options=executor_options,
            dropped_text=o.dropped_text,
            overwrite=o.overwrite,
            progress=progress,
            stop=stop,
        )
    if report is None:
        print(f"tasks of {o.output} are still at work; when they are done, give the same command again to finish it")
    else:
        show_clean_report(report)
    return EXIT_OK


@_interruptible
def merge_datasets(args: list[str], stop: Interrupts) -> int:
    """join tokenised corpora to one, as Megatron-LM's merge_datasets.py"""
    from dataclasses import asdict

    import tyro
    from rich.console import Console

    from engine.cli.checkpoints import tell
    from engine.cli.merge_options import MergeDatasets
    from engine.cli.prepare_console import prepare_progress
    from engine.data.prepare.merge import merge

    o = tyro.cli(MergeDatasets, args=args, prog="engine merge-datasets")
    faults = [] if o.input else [Fault("", "--input", "", "names nothing to merge", "Give prefixes, or a folder.")]
    if not o.output_prefix or o.output_prefix.endswith("/"):
        text = "is no prefix of file names"
        faults.append(Fault("", "--output-prefix", o.output_prefix, text, "Use corpus/all for corpus/all.bin ..."))
    if faults:
        raise ConfigError(faults)
    with prepare_progress(quiet=o.json) as progress:
        report = merge(
            o.input, o.output_prefix, multimodal=o.multimodal, overwrite=o.overwrite, progress=progress, stop=stop
        )
    if o.json:
        tell([], {"verb": "merge-datasets", **asdict(report)})
        return EXIT_OK
    console = Console(highlight=False, soft_wrap=True)
    rate = report.tokens / 1e6 / max(report.elapsed_s, 1e-9)
    many = "corpora" if len(report.corpora) > 1 else "corpus"
    for number, prefix in enumerate(report.corpora, 1):
        console.print(f"{number}. {prefix}", markup=False)
    console.print(
        f"{report.output}: {report.sequences:,} sequences, {report.documents:,} documents, {report.tokens:,} tokens of "
        f"{report.dtype} from {len(report.corpora):,} {many}; {report.elapsed_s:.1f} s, {rate:,.1f} million tokens/s",
        markup=False,
    )
    if report.why_no_sidecar:
        console.print(f"no {report.output}.json: {report.why_no_sidecar}", markup=False)
    else:
        digest = f", tokenizer digest {report.tokenizer_digest[:16]}" if report.tokenizer_digest else ""
        console.print(f"unigram entropy {report.unigram_entropy:.4f} nats{digest}", markup=False)
    return EXIT_OK


@_interruptible
def tokenizer(args: list[str], stop: Interrupts) -> int:
    """train a tokenizer: engine tokenizer train ..."""
    import dataclasses

    import tyro

    from engine.cli.checks import tokenizer_faults
    from engine.cli.options import TokenizerTrain
    from engine.cli.prepare_console import prepare_progress, show_trained
    from engine.data.tokenize.recipe import Recipe
    from engine.data.tokenize.train import train_tokenizer

    if args[:1] not in (["train"], ["-h"], ["--help"]):
        raise ConfigError(
            [Fault("", "engine tokenizer", " ".join(args[:1]), "is not train", "engine tokenizer train ...")]
        )
    o = tyro.cli(TokenizerTrain, args=args[args[:1] == ["train"] :], prog="engine tokenizer train")
    recipe = Recipe(**{field.name: getattr(o, field.name) for field in dataclasses.fields(Recipe)})
    if faults := [*tokenizer_faults(o), *recipe.faults()]:
        raise ConfigError(faults)
    with prepare_progress() as progress:
        trained = train_tokenizer(
            o.input,
            o.output,
            recipe,
            max_bytes=o.max_bytes,
            include=o.include,
            exclude=o.exclude,
            json_key=o.json_key,
            format=o.format,
            on_error=o.on_error,
            overwrite=o.overwrite,
            progress=progress,
            note=print,
            stop=stop,
        )
    show_trained(trained, recipe, o.output)
    return EXIT_OK


@_interruptible
def inspect(args: list[str], stop: Interrupts) -> int:
    """look at a corpus (counts, lengths, samples) or at a checkpoint (tensors, norms, lineage)"""

    from dataclasses import asdict

    import tyro
    from rich.console import Console

    from engine.cli.checkpoints import inspect_checkpoint, tell
    from engine.cli.options import Inspect
    from engine.config.schema import DataConfig
    from engine.data.samples import contents as inspect
    from engine.data.samples.corpora import begin_of_document, end_of_document
    from engine.data.samples.indexed import IndexedDataset
    from engine.data.samples.special import fill_in_the_middle
    from engine.data.tokenize.tokenizer import Tokenizer
    from engine.monitor.plot import plot_lengths

    o = tyro.cli(Inspect, args=args, prog="engine inspect")
    least = {"--samples": (o.samples, 0), "--seq-len": (o.seq_len, 1), "--seed": (o.seed, 0)}
    faults = [Fault("", k, v, f"is below {n}", f"Use {n} or more.") for k, (v, n) in least.items() if v < n]
    if o.output.suffix not in (".png", ".svg"):
        faults.append(Fault("", "--output", str(o.output), "is neither a .png nor a .svg file", "End it in .png."))
    faults += [
        Fault("", f"--{k.replace('_', '-')}", v, "is not a share", "Use a number of 0 to 1.")
        for k, v in (("fim_rate", o.fim_rate), ("fim_spm_rate", o.fim_spm_rate))
        if not 0 <= v <= 1
    ]
    if o.fim_tokens and not o.fim_rate:
        faults.append(Fault("", "--fim-tokens", o.fim_tokens, "has no meaning without --fim-rate", "Such as 0.5."))
    if faults:
        raise ConfigError(faults)
    if Path(o.data).is_dir() and not Path(f"{o.data}.idx").exists():
        return inspect_checkpoint(o)
    dataset = IndexedDataset(o.data)
    folder = inspect.find_tokenizer(o.data, o.tokenizer)
    fim_options = {"fim_rate": o.fim_rate, "fim_spm_rate": o.fim_spm_rate, "fim_tokens": o.fim_tokens}
    data = DataConfig(tokenizer=str(folder or ""), **fim_options)
    tokenizer = Tokenizer.load(folder) if folder else None
    c, console = inspect.count(dataset), Console(highlight=False, soft_wrap=True, quiet=o.json)
    facts: dict[str, Any] = {"verb": "inspect", "corpus": o.data, **asdict(c), "tokenizer": str(folder or "") or None}
    facts |= {"proven": [], "samples": [], "picture": str(o.output)}
    for line in (
        f"{o.data}: {c.documents:,} documents, {c.tokens:,} tokens, {c.bytes:,} bytes of {c.dtype}",
        f"tokens a document: {c.shortest:,} to {c.longest:,} (document {c.longest_document}), median {c.median:,}, "
        f"mean {c.mean:,.1f}, 95 % at most {c.p95:,}",
        *([f"bytes of text a token: {c.text_bytes / max(1, c.tokens):.3f}"] if c.text_bytes else []),
        f"tokenizer: {folder or 'none given and none beside the corpus: samples are not decoded'}",
    ):
        console.print(line, markup=False)
    facts["tokenizer_is_the_datas"] = inspect.tokenizer_fits(dataset, tokenizer)
    if facts["tokenizer_is_the_datas"] is False and tokenizer is not None:
        warnings.warn(
            f"the tokenizer {folder} has the digest {tokenizer.digest}, and {o.data} was made with another one, "
            f"{dataset.meta['tokenizer_digest']}: what is decoded is not the text. Give the right one by --tokenizer.",
            stacklevel=2,
        )
    if o.verify:
        for line in inspect.verify(dataset, tokenizer):
            console.print(f"right: {line}", markup=False)
            facts["proven"].append(line)
    if tokenizer is not None and o.samples:
        eod = end_of_document([dataset], "fim_rate", o.fim_rate) if o.fim_rate else 0
        bos = begin_of_document([dataset])
        fim = fill_in_the_middle(data, tokenizer, eod, o.seed, bos=bos) if o.fim_rate else None
        for text in inspect.decoded_samples(dataset, tokenizer, o.seq_len, o.samples, o.seed, fim):
            console.print(text, markup=False)
            facts["samples"].append(str(text))
    marks = {"median": c.median, "mean": c.mean, "95 % of the documents at most": c.p95}
    plot_lengths(*inspect.histogram(dataset), marks, o.data, o.output)
    console.print(f"wrote {o.output}", markup=False)
    if o.json:
        tell([], facts)
    return EXIT_OK
