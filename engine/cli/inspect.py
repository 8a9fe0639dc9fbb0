"""`engine inspect`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from engine.cli.common import Help, parse, print_result, stops_on_signals
from engine.errors import EXIT_OK, ConfigError, FieldError
from engine.util.signals import Interrupts

if TYPE_CHECKING:
    from engine.data.samples.indexed import IndexedDataset
    from engine.data.tokenize.tokenizer import Tokenizer


@dataclass
class InspectOptions:
    """Show the contents of a corpus or of a checkpoint.

    Of a corpus: counts, a histogram of document lengths, and random samples as training sees them. Of a checkpoint:
    step, data position, lineage, and every tensor with shape, dtype and norm.
    """

    data: tyro.conf.Positional[str]
    """prefix of a corpus (.bin/.idx); or a checkpoint: run folder (its newest one) or step folder"""
    norms: bool = True
    """checkpoint: read every tensor and print its L2 norm; --no-norms is faster"""
    tokenizer: Path | None = None
    """corpus: folder with tokenizer.json that decodes the samples; not set: PREFIX-tokenizer, or a folder `tokenizer`
    next to the corpus"""
    samples: int = 3
    """corpus: number of random samples to decode; 0: none"""
    seq_len: int = 256
    """corpus: tokens per sample"""
    seed: int = 0
    """corpus: seed that selects the samples"""
    fim_rate: float = 0.0
    """corpus: show samples after fill-in-the-middle, as a run with train.seed = --seed and this data.fim_rate sees
    them"""
    fim_spm_rate: float = 0.5
    """corpus: as data.fim_spm_rate"""
    fim_tokens: str = ""
    """corpus: as data.fim_tokens"""
    output: Path = Path("lengths.png")
    """corpus: PNG or SVG file for the histogram of document lengths"""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """read everything: every token and every field of the sidecar of a corpus; every digest of a checkpoint"""
    secret: str = ""
    """checkpoint: file:PATH or env:NAME of the secret of a signed or encrypted one"""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print one JSON object instead of text"""


HELP = Help(
    examples=(
        ("Show a corpus and decode five random samples", "engine inspect corpus/web-train --samples 5"),
        ("Show a checkpoint without reading its tensors", "engine inspect runs/demo --no-norms"),
    ),
    groups={
        "samples": ("tokenizer", "samples", "seq_len", "seed", "fim_rate", "fim_spm_rate", "fim_tokens"),
        "checkpoint": ("norms", "secret"),
        "output": ("output", "verify", "json"),
    },
)


@stops_on_signals
def run(args: list[str], stop: Interrupts) -> int:
    """Run the command; returns the exit code."""
    o = parse(InspectOptions, args, "inspect", HELP)
    if errors := list(inspect_errors(o)):
        raise ConfigError(errors)
    if Path(o.data).is_dir() and not Path(f"{o.data}.idx").exists():
        return inspect_checkpoint(o)
    return inspect_corpus(o)


def inspect_errors(o: InspectOptions) -> Iterator[FieldError]:
    """The errors of the options of `engine inspect`."""
    for option, (value, least) in {
        "--samples": (o.samples, 0),
        "--seq-len": (o.seq_len, 1),
        "--seed": (o.seed, 0),
    }.items():
        if value < least:
            yield FieldError("cli.too-small", option, value, f"is below {least}", f"Use {least} or more.")
    if o.output.suffix not in (".png", ".svg"):
        text = "is neither a .png nor a .svg file"
        yield FieldError("cli.no-picture-format", "--output", str(o.output), text, "End it in .png.")
    for option, share in (("--fim-rate", o.fim_rate), ("--fim-spm-rate", o.fim_spm_rate)):
        if not 0 <= share <= 1:
            yield FieldError("cli.no-share", option, share, "is not between 0 and 1", "Use a fraction, such as 0.5.")
    if o.fim_tokens and not o.fim_rate:
        text = "has no effect without --fim-rate"
        yield FieldError("cli.without-effect", "--fim-tokens", o.fim_tokens, text, "Add --fim-rate, such as 0.5.")


def inspect_corpus(o: InspectOptions) -> int:
    """Run `engine inspect` for a corpus."""
    from rich.console import Console

    from engine.data.samples import contents
    from engine.data.samples.indexed import IndexedDataset
    from engine.data.tokenize.tokenizer import Tokenizer
    from engine.monitor.plot import plot_lengths

    dataset = IndexedDataset(o.data)
    folder = contents.find_tokenizer(o.data, o.tokenizer)
    tokenizer = Tokenizer.load(folder) if folder else None
    c, console = contents.count(dataset), Console(highlight=False, soft_wrap=True, quiet=o.json)
    fields: dict[str, Any] = {"verb": "inspect", "corpus": o.data, **asdict(c), "tokenizer": str(folder or "") or None}
    fields |= {"proven": [], "samples": [], "picture": str(o.output)}
    for line in (
        f"{o.data}: {c.documents:,} documents, {c.tokens:,} tokens, {c.bytes:,} bytes of {c.dtype}",
        f"tokens per document: {c.shortest:,} to {c.longest:,} (document {c.longest_document}), median {c.median:,}, "
        f"mean {c.mean:,.1f}, 95 % have at most {c.p95:,}",
        *([f"bytes of text per token: {c.text_bytes / max(1, c.tokens):.3f}"] if c.text_bytes else []),
        f"tokenizer: {folder or 'none given and none next to the corpus, so samples are not decoded'}",
    ):
        console.print(line, markup=False)
    fields["tokenizer_is_the_datas"] = contents.tokenizer_fits(dataset, tokenizer)
    if fields["tokenizer_is_the_datas"] is False and tokenizer is not None:
        warnings.warn(
            f"the tokenizer {folder} has the digest {tokenizer.digest}, but {o.data} was encoded with another one, "
            f"{dataset.meta['tokenizer_digest']}: decoded samples are wrong. Give the right one with --tokenizer.",
            stacklevel=2,
        )
    if o.verify:
        for line in contents.verify(dataset, tokenizer):
            console.print(f"verified: {line}", markup=False)
            fields["proven"].append(line)
    if tokenizer is not None and o.samples:
        for text in _samples(o, dataset, tokenizer, folder):
            console.print(text, markup=False)
            fields["samples"].append(str(text))
    marks = {"median": c.median, "mean": c.mean, "95 % of the documents at most": c.p95}
    plot_lengths(*contents.histogram(dataset), marks, o.data, o.output)
    console.print(f"wrote {o.output}", markup=False)
    if o.json:
        print_result([], fields)
    return EXIT_OK


def _samples(o: InspectOptions, dataset: IndexedDataset, tokenizer: Tokenizer, folder: Path | None) -> Iterator[object]:
    """Decode random samples as a run with these settings sees them."""
    from engine.config.schema import DataConfig
    from engine.data.samples.contents import decoded_samples
    from engine.data.samples.corpora import begin_of_document, end_of_document
    from engine.data.samples.special import fill_in_the_middle

    fim = None
    if o.fim_rate:
        options = {"fim_rate": o.fim_rate, "fim_spm_rate": o.fim_spm_rate, "fim_tokens": o.fim_tokens}
        data = DataConfig(tokenizer=str(folder or ""), **options)
        eod, bos = end_of_document([dataset], "fim_rate", o.fim_rate), begin_of_document([dataset])
        fim = fill_in_the_middle(data, tokenizer, eod, o.seed, bos=bos)
    return decoded_samples(dataset, tokenizer, o.seq_len, o.samples, o.seed, fim)


def inspect_checkpoint(o: InspectOptions) -> int:
    """Run `engine inspect` for a checkpoint."""
    from engine.checkpoint.format import find_checkpoint, verify_all
    from engine.checkpoint.load import Reader
    from engine.checkpoint.seal import open_storage
    from engine.checkpoint.summary import summary, tensor_stats

    storage = open_storage(o.secret)
    with Reader(find_checkpoint(Path(o.data), storage), storage) as reader:
        text = list(summary(reader))
        fields: dict[str, Any] = {"verb": "inspect", "checkpoint": str(reader.folder), "step": reader.manifest.step}
        fields |= {"summary": list(text), "digests_proven": o.verify, "tensors": []}
        if o.verify:
            verify_all(reader.folder, reader.manifest, storage)
            text.append("all digests match")
        width = max(map(len, (name for names in reader.manifest.tensors.values() for name in names)), default=0)
        if not o.json:
            print_result(text)
        for t in tensor_stats(reader, norms=o.norms):
            norm = f"  norm {t.norm:.6g}" if o.norms else ""
            shape = " x ".join(map(str, t.shape))
            fields["tensors"].append({**asdict(t), "norm": t.norm if o.norms else None})
            if not o.json:
                print_result([f"{t.kind:10}  {t.name:{width}}  {t.dtype:4}  {shape:14}  {t.files} files{norm}"])
    if o.json:
        print_result([], fields)
    return EXIT_OK
