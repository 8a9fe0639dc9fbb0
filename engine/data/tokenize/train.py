"""Trains a tokenizer on input files, for `engine tokenizer train` and `engine prepare --train-vocab-size`."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import normalizers

import engine
from engine.data.read.account import ReadSummary
from engine.data.read.own import OwnFiles
from engine.data.read.progress import Progress, ProgressEvent, StepEvent
from engine.data.tokenize.equivalence import EDGE_CASES
from engine.data.tokenize.file_names import FILES, TRAINING
from engine.data.tokenize.options import TokenizerOptions
from engine.data.tokenize.recipe import Recipe
from engine.data.tokenize.tokenizer import Tokenizer
from engine.data.tokenize.train_process import TrainProcess
from engine.errors import ConfigError, DataError
from engine.util.files import sync_folder
from engine.util.prefetch import read_ahead
from engine.util.signals import Interrupts

_SAMPLES, _SAMPLE_CHARS = 64, 2000


@dataclass
class Trained:
    """A trained tokenizer, the documents and text bytes it was trained on, seconds by step, and skipped items."""

    tokenizer: Tokenizer
    documents: int
    text_bytes: int
    seconds: dict[str, float]
    account: ReadSummary = field(default_factory=ReadSummary)


class TextSampler:
    """Selects at most `max_bytes` of text, evenly spread over all the input; 0: everything.

    total: stored bytes of the input, 0: unknown (then the first texts are taken).
    """

    def __init__(self, max_bytes: int, total: int):
        self._max, self._total = max_bytes, total
        self.documents = self.text_bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether no more documents will be selected."""
        return bool(self._max) and not self._total and self.text_bytes >= self._max

    def take(self, texts: Sequence[str], consumed: int) -> Iterator[str]:
        """The selected ones of `texts`, which end at stored byte `consumed` of the input."""
        sizes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
        due = self._max * min(1.0, consumed / self._total) if self._total else 0.0
        share, before, passed = (due - self.text_bytes) / max(1, sum(sizes)), self.text_bytes, 0
        for text, size in zip(texts, sizes):
            passed += size
            left = share * passed - (self.text_bytes - before) if self._total else self._max - self.text_bytes
            if not self._max or left > 0:
                self.text_bytes += size
                self.documents += 1
                yield text


def train_tokenizer(
    options: TokenizerOptions,
    *,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda text: None,
    stop: Interrupts | None = None,
) -> Trained:
    """Train a tokenizer on the documents of the inputs and write its folder atomically.

    Raises ConfigError for invalid options; DataError for bad input, for inputs without text, and for an `output` with a
    tokenizer unless `overwrite`; Stopped if `stop` receives a signal.
    """
    o, stop = options, stop or Interrupts(listen=False)
    if errors := list(o.errors()):
        raise ConfigError(errors)
    _check_output(o)
    source = o.source(OwnFiles([o.output / name for name in FILES]))
    account = ReadSummary()
    total = sum(file.num_bytes for file in source.files)
    sampler = TextSampler(o.max_bytes, total)
    began = time.monotonic()

    def texts() -> Iterator[str]:
        for batch in read_ahead(source.batches()):
            for drop in batch.drops:
                if drop.stops and not o.skip_errors:
                    raise drop.error()
            for text in account.add(batch):
                note(f"note: {text}")
            yield from sampler.take(batch.texts, batch.consumed)
            if progress is not None:
                elapsed = time.monotonic() - began
                consumed = (batch.consumed, max(total, batch.consumed))
                progress(ProgressEvent("train tokenizer", *consumed, sampler.documents, 0, elapsed, batch.consumed, 0))
            if sampler.is_full:
                break
        if not sampler.text_bytes:
            raise account.error(source)

    trained = train_in_subprocess(texts(), o.recipe, sampler, progress)
    trained.account = account
    with stop.deferred():
        save_atomically(trained.tokenizer, o.output)
        stop.resume_hint = lambda: f"{o.output} is written"
    return trained


def train_in_subprocess(
    texts: Iterable[str], recipe: Recipe, sampler: TextSampler, progress: Progress | None
) -> Trained:
    """Train in a subprocess on `texts`, which `sampler` has selected; verify the result on samples of them."""
    samples: list[str] = []

    def sampled() -> Iterator[str]:
        for text in texts:
            if sampler.documents.bit_count() == 1 or len(samples) < _SAMPLES // 2:  # document 1, 2, 4, 8 ... too
                samples.append(text[:_SAMPLE_CHARS])
            yield text

    with TrainProcess(recipe, progress) as process:
        process.send(sampled())
        definition, companions = process.finish()
    if progress is not None:
        progress(StepEvent("verifying", 0, 0, 0.0))
    began = time.monotonic()
    metadata = {"engine": engine.__version__, "tokenizers": tokenizers.__version__, **recipe.metadata()}
    metadata |= {"documents": sampler.documents, "text_bytes": sampler.text_bytes}
    companions[TRAINING] = (json.dumps(metadata, ensure_ascii=False, indent=1) + "\n").encode()
    tokenizer = Tokenizer(definition, companions)
    _verify(tokenizer, recipe, samples)
    seconds = {**process.seconds, "verifying": time.monotonic() - began}
    return Trained(tokenizer, sampler.documents, sampler.text_bytes, seconds)


def _verify(tokenizer: Tokenizer, recipe: Recipe, samples: Sequence[str]) -> None:
    """Raise DataError unless texts decode to themselves, after Unicode normalisation if the recipe has one."""
    if recipe.kind == "wordpiece":  # it drops white space
        return
    normal = {"nfc": normalizers.NFC(), "nfkc": normalizers.NFKC()}.get(recipe.normalizer)
    for text in (*samples, *EDGE_CASES):
        expected = text if normal is None else normal.normalize_str(text)
        if (found := tokenizer.decode(tokenizer.encode(text))) != expected:
            raise DataError(
                "tokenize.loses-text",
                f"the trained tokenizer loses text: {expected[:60]!r} comes back as {found[:60]!r}. "
                f"Nothing was written. Try another --split-pattern or --kind.",
            )


def _check_output(options: TokenizerOptions) -> None:
    """Before hours of work: raise DataError for problems that would prevent writing the result."""
    output = options.output
    if options.kind == "unigram" and importlib.util.find_spec("sentencepiece") is None:
        raise DataError(
            "tokenize.sentencepiece-missing",
            "--kind unigram needs sentencepiece: `pip install 'trident-engine[formats]'`.",
        )
    if (output / "tokenizer.json").exists() and not options.overwrite:
        raise DataError(
            "tokenize.output-exists",
            f"{output / 'tokenizer.json'}: already exists. Choose another folder, or give --overwrite.",
        )
    parent = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise DataError(
            "tokenize.not-writable",
            f"{output}: cannot be created, as {parent} is not a writable folder. Choose another.",
        )


def save_atomically(tokenizer: Tokenizer, output: Path) -> None:
    """Write the folder via a temporary one, tokenizer.json last. After an error the previous tokenizer is intact."""
    output = output.absolute()
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        tokenizer.save(temporary)
        output.mkdir(parents=True, exist_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "tokenizer.json"):
            os.replace(path, output / path.name)
        sync_folder(output)
    except OSError as err:
        raise DataError(
            "tokenize.not-writable", f"{output}: cannot write the tokenizer: {err.strerror or err}. Choose another."
        ) from err
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
