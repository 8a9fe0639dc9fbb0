"""The verb merge-datasets."""

from __future__ import annotations

from dataclasses import asdict

from engine.errors import EXIT_OK, ConfigError, Fault


def merge_datasets(args: list[str]) -> int:
    """join tokenised corpora to one, as Megatron-LM's merge_datasets.py"""
    import tyro
    from rich.console import Console

    from engine.commands.checkpoints import tell
    from engine.data.merge import merge
    from engine.data.merge_options import MergeDatasets
    from engine.monitor.prepared import prepare_progress

    o = tyro.cli(MergeDatasets, args=args, prog="engine merge-datasets")
    faults = [] if o.input else [Fault("--input", "", "names nothing to merge", "Give prefixes, or a folder.")]
    if not o.output_prefix or o.output_prefix.endswith("/"):
        text = "is no prefix of file names"
        faults.append(Fault("--output-prefix", o.output_prefix, text, "Use corpus/all for corpus/all.bin ..."))
    if faults:
        raise ConfigError(faults)
    with prepare_progress(quiet=o.json) as progress:
        report = merge(o.input, o.output_prefix, multimodal=o.multimodal, overwrite=o.overwrite, progress=progress)
    if o.json:
        tell([], {"verb": "merge-datasets", **asdict(report)})
        return EXIT_OK
    console = Console(highlight=False, soft_wrap=True)
    rate = report.tokens / 1e6 / max(report.elapsed_s, 1e-9)
    for number, prefix in enumerate(report.corpora, 1):
        console.print(f"{number}. {prefix}", markup=False)
    console.print(
        f"{report.output}: {report.sequences:,} sequences, {report.documents:,} documents, {report.tokens:,} tokens of "
        f"{report.dtype} from {len(report.corpora):,} corpora; {report.elapsed_s:.1f} s, {rate:,.1f} million tokens/s",
        markup=False,
    )
    if report.why_no_sidecar:
        console.print(f"no {report.output}.json: {report.why_no_sidecar}", markup=False)
    else:
        digest = f", tokenizer digest {report.tokenizer_digest[:16]}" if report.tokenizer_digest else ""
        console.print(f"unigram entropy {report.unigram_entropy:.4f} nats{digest}", markup=False)
    return EXIT_OK
