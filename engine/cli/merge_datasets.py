"""`engine merge-datasets`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from engine.cli.common import Help, parse, print_result, stops_on_signals
from engine.errors import EXIT_OK, ConfigError, FieldError
from engine.util.signals import Interrupts


@dataclass
class MergeOptions:
    """Concatenate tokenised corpora (.bin/.idx) into one.

    The result is bitwise that of Megatron-LM's tools/merge_datasets.py. The sidecar (.json) is written if all corpora
    have one. Files appear under the output's name only when all are complete.
    """

    input: tuple[str, ...]
    """prefixes in the desired order, or folders, from which every PREFIX.bin/.idx is taken, sorted by name"""
    output_prefix: Annotated[str, tyro.conf.arg(aliases=("--output",))]
    """prefix of the files to write: OUTPUT.bin, OUTPUT.idx, OUTPUT.json"""
    multimodal: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """the corpora have modes (Megatron-LM's multimodal .idx); merge these too"""
    overwrite: bool = False
    """replace existing files"""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print one JSON object instead of text"""


HELP = Help(
    examples=(
        ("Concatenate two corpora", "engine merge-datasets --input corpus/a corpus/b --output-prefix corpus/all"),
        (
            "Concatenate every corpus of a folder, replacing an earlier result",
            "engine merge-datasets --input corpus/parts --output-prefix corpus/all --overwrite",
        ),
    ),
)


@stops_on_signals
def run(args: list[str], stop: Interrupts) -> int:
    """Run the command; returns the exit code."""
    from rich.console import Console

    from engine.cli.prepare_console import prepare_progress
    from engine.data.prepare.merge import merge

    o = parse(MergeOptions, args, "merge-datasets", HELP)
    errors = []
    if not o.input:
        text = "is empty"
        errors.append(FieldError("prepare.no-input", "--input", "", text, "Give prefixes or a folder."))
    if not o.output_prefix or o.output_prefix.endswith("/"):
        text = "is not a prefix of file names"
        fix = "Use corpus/all to write corpus/all.bin ..."
        errors.append(FieldError("prepare.output-no-prefix", "--output-prefix", o.output_prefix, text, fix))
    if errors:
        raise ConfigError(errors)
    with prepare_progress(quiet=o.json) as progress:
        report = merge(
            o.input, o.output_prefix, multimodal=o.multimodal, overwrite=o.overwrite, progress=progress, stop=stop
        )
    if o.json:
        print_result([], {"verb": "merge-datasets", **asdict(report)})
        return EXIT_OK
    console = Console(highlight=False, soft_wrap=True)
    rate = report.tokens / 1e6 / max(report.elapsed_s, 1e-9)
    noun = "corpora" if len(report.corpora) > 1 else "corpus"
    for number, prefix in enumerate(report.corpora, 1):
        console.print(f"{number}. {prefix}", markup=False)
    console.print(
        f"{report.output}: {report.sequences:,} sequences, {report.documents:,} documents, {report.tokens:,} tokens of "
        f"{report.dtype} from {len(report.corpora):,} {noun}; {report.elapsed_s:.1f} s, {rate:,.1f} million tokens/s",
        markup=False,
    )
    if report.why_no_sidecar:
        console.print(f"{report.output}.json was not written: {report.why_no_sidecar}", markup=False)
    else:
        digest = f", tokenizer digest {report.tokenizer_digest[:16]}" if report.tokenizer_digest else ""
        console.print(f"unigram entropy {report.unigram_entropy:.4f} nats{digest}", markup=False)
    return EXIT_OK
