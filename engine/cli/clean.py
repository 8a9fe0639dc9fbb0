"""What is wrong with the options of a verb, all of it at once, before any work is done."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from engine.cli.options import QUALITY_LANGUAGES, Clean, Prepare, TokenizerTrain
from engine.errors import Fault


def prepare_faults(o: Prepare) -> Iterator[Fault]:
    """What is wrong with the options of `engine prepare`."""
    if not o.input:
        yield Fault("", "--input", "", "names nothing to read", "Give files, folders, globs, URLs or -.")
    if not o.output or o.output.endswith("/"):
        yield Fault(
            "", "--output", o.output, "is no prefix of file names", "Use corpus/web for corpus/web-train.bin ..."
        )
    if o.workers < 0:
        yield Fault("", "--workers", o.workers, "is below 0", "Use 0 for one a core.")
    shares = {"--valid-fraction": o.valid_fraction, "--test-fraction": o.test_fraction}
    wrong = {option: share for option, share in shares.items() if not 0 <= share < 1}
    for option, share in wrong.items():
        yield Fault("", option, share, "is not in [0, 1)", "Use 0.01 for a hundredth, 0 for none.")
    if not wrong and sum(shares.values()) >= 1:
        text = f"and --valid-fraction {o.valid_fraction} leave nothing to train on"
        yield Fault("", "--test-fraction", o.test_fraction, text, "Together they have to be below 1.")
    if o.max_document_bytes < 1:
        yield Fault("", "--max-document-bytes", o.max_document_bytes, "is below 1", "Leave it out for 64 MiB.")
    if o.train_vocab_size < 0:
        yield Fault(
            "", "--train-vocab-size", o.train_vocab_size, "is below 0", "Use 0 for the tokenizer that is there."
        )
    if o.train_vocab_size and (o.merges is not None or o.lower_case is not None):
        repair = "Leave them out, or --train-vocab-size."
        yield Fault("", "--train-vocab-size", o.train_vocab_size, "makes one without --merges, --lower-case", repair)
    if o.train_bytes < 0:
        yield Fault("", "--train-bytes", o.train_bytes, "is below 0", "Use 0 for all train documents.")
    if o.train_bytes and not o.train_vocab_size:
        yield Fault("", "--train-bytes", o.train_bytes, "has no meaning without --train-vocab-size", "Leave it out.")


def tokenizer_faults(o: TokenizerTrain) -> Iterator[Fault]:
    """What is wrong with the options of `engine tokenizer train`, besides those of engine.data.tokenize.recipe."""
    if not o.input:
        yield Fault("", "--input", "", "names nothing to read", "Give files, folders, globs, URLs or -.")
    if o.max_bytes < 0:
        yield Fault("", "--max-bytes", o.max_bytes, "is below 0", "Use 0 for everything.")


def clean_faults(o: Clean) -> Iterator[Fault]:
    """What is wrong with the options of `engine clean`."""
    counts = {
        "--tasks": (o.tasks, 1),
        "--workers": (o.workers, 0),
        "--decontaminate-words": (o.decontaminate_words, 1),
        "--minhash-bands": (o.minhash_bands, 0),
        "--minhash-rows": (o.minhash_rows, 1),
        "--minhash-words": (o.minhash_words, 1),
    }
    for option, (value, least) in counts.items():
        if value < least:
            yield Fault("", option, value, f"is below {least}", f"Use {least} or more.")
    if not o.input:
        yield Fault("", "--input", "", "names nothing to read", "Give files, folders, globs, URLs or -.")
    for code in o.language:
        if not re.fullmatch("[a-z]{2,3}", code):  # any other would drop every document
            yield Fault("", "--language", code, "is no ISO 639 code", "Use en, zh, ...")
    if o.quality_language not in ("auto", *QUALITY_LANGUAGES):
        yield Fault(
            "",
            "--quality-language",
            o.quality_language,
            "has no rules: the filters count words, and need a segmenter, stop words and limits for each language",
            f"Use auto, which keeps documents in other languages and counts them, or {', '.join(QUALITY_LANGUAGES)}.",
        )
    if not 0 <= o.language_threshold <= 1:
        yield Fault("", "--language-threshold", o.language_threshold, "is no probability", "Use 0 to 1.")
    if o.executor == "slurm" and not o.slurm_partition:
        yield Fault("", "--slurm-partition", "", "Slurm jobs need one", "Give its name.")
    yield from _without_effect(o)


def _without_effect(o: Clean) -> Iterator[Fault]:
    """Options of steps that are off."""
    steps = {
        "--language": (bool(o.language), ("language_threshold",)),
        "--quality": (bool(o.quality), ("quality_language",)),
        "--decontaminate": (bool(o.decontaminate), ("decontaminate_key", "decontaminate_words", "fold_numbers")),
        "--pii other than off": (o.pii != "off", ("pii_kinds",)),
        "--minhash-bands": (bool(o.minhash_bands), ("minhash_rows", "minhash_words")),
        "--executor slurm": (o.executor == "slurm", ("slurm_partition", "slurm_time")),
        "--executor local, slurm or ray": (o.executor != "here", ("workers",)),
    }
    defaults = {field.name: field.default for field in dataclasses.fields(o)}
    for step, (on, names) in steps.items():
        for name in names:
            if not on and (value := getattr(o, name)) != defaults[name]:
                shown = f"--no-{name}" if value is False else f"--{name}"
                repair = f"Leave it out, or give {step} too."
                yield Fault("", shown.replace("_", "-"), value, f"has no meaning without {step}", repair)
