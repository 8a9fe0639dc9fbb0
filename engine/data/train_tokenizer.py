"""A tokenizer from raw text: `engine tokenizer train`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from engine.data.ahead import read_ahead
from engine.data.report import ProgressEvent
from engine.data.sources import Source
from engine.data.tokenizer import END_OF_TEXT, Tokenizer
from engine.errors import DataError


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: Path,
    vocab_size: int,
    *,
    kind: str = "bpe",
    special_tokens: Sequence[str] = (END_OF_TEXT,),
    max_bytes: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    json_key: Sequence[str] = ("text",),
    format: str = "",
    on_error: str = "stop",
    overwrite: bool = False,
    progress: Callable[[ProgressEvent], None] | None = None,
) -> tuple[Tokenizer, Counter[str]]:
    """Train on the documents of `inputs` (see Tokenizer.train) and write the folder; also what was left out, by reason.

    Raises DataError for bad input, an `output` that has a tokenizer unless `overwrite`, and inputs without text.
    """
    if (output / "tokenizer.json").exists() and not overwrite:
        raise DataError(f"{output / 'tokenizer.json'}: already there. Choose another folder, or give --overwrite.")
    source = Source.of(inputs, include, exclude, keys=tuple(json_key), format=format)
    dropped: Counter[str] = Counter()
    total = sum(file.num_bytes for file in source.files)
    began, chars, documents = time.monotonic(), 0, 0

    def texts() -> Iterator[str]:
        nonlocal chars, documents
        for batch in read_ahead(source.batches()):
            for drop in batch.drops:
                if drop.stops and on_error != "skip":
                    raise drop.refuse()
                dropped[drop.reason] += 1
            for text in batch.texts:
                if max_bytes and chars >= max_bytes:
                    return
                chars += len(text) if text.isascii() else len(text.encode())
                documents += 1
                yield text
            if progress is not None:
                elapsed = time.monotonic() - began
                consumed = (batch.consumed, max(total, batch.consumed))
                progress(ProgressEvent("train tokenizer", *consumed, documents, 0, elapsed, batch.consumed, 0))

    tokenizer = Tokenizer.train(texts(), vocab_size, kind=kind, special_tokens=special_tokens)
    if not chars:
        raise DataError(f"no text in {', '.join(map(str, inputs))} (dropped: {dict(dropped)})")
    tokenizer.save(output)
    return tokenizer, dropped
