"""Small corpora of drawn documents, with what the data options of a config need: documents, a blend, a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.mixture import read_mixture
from engine.config.schema import Config
from engine.data.samples.indexed_writer import IndexedWriter
from engine.data.samples.special import FAMILIES
from engine.data.tokenize.tokenizer import END_OF_TEXT, Tokenizer

_DOCUMENTS = 40
_MOST_TOKENS = 40  # of a document: most samples contain several
_TEXT = "the quick brown fox jumps over the lazy dog"


def with_small_data(cfg: Config, folder: Path) -> Config:
    """Write corpora, blend and tokenizer of a shrunk config into a folder; returns the config with their paths."""
    data = cfg.data
    meta: dict[str, Any] = {"eod": 0}
    changed: dict[str, Any] = {"tokenizer": ""}
    tokens = np.arange(min(1, cfg.model.vocab_size - 1), cfg.model.vocab_size)
    if data.fim_rate or data.mask_tokens:
        words = f"{data.fim_tokens or ' '.join(FAMILIES[0])} {data.mask_tokens}".split()
        special = tuple(dict.fromkeys((END_OF_TEXT, *words)))
        tokenizer = Tokenizer.train([_TEXT], len(special) + 256, special_tokens=special)
        tokenizer.save(folder / "tokenizer")
        changed["tokenizer"] = str(folder / "tokenizer")
        meta["tokenizer_digest"] = tokenizer.digest
        masked = [n for word in data.mask_tokens.split() if (n := tokenizer.token_id(word)) is not None]
        tokens = np.array([*tokenizer.encode(_TEXT), *masked])
    changed["train"] = _training(cfg, folder, tokens, meta)
    if data.valid:
        changed["valid"] = _corpus(folder / "valid", cfg, 1000, tokens, meta)
    return cfg.model_copy(update={"data": data.model_copy(update=changed)})


def _training(cfg: Config, folder: Path, tokens: np.ndarray[Any, Any], meta: dict[str, Any]) -> str:
    """data.train of the small corpora: one, or a blend with the names, weights and other fields of the config's."""
    if not cfg.data.train:
        return _corpus(folder / "train", cfg, 0, tokens, meta)
    mixture = read_mixture(cfg.data.train)
    prefixes = [_corpus(folder / f"train{k}", cfg, k, tokens, meta) for k in range(len(mixture.prefixes))]
    lines = []
    for name, prefix, amount, fim in zip(mixture.names, prefixes, mixture.amounts, mixture.fim):
        lines += ["[[source]]", f"name = {json.dumps(name)}", f"prefix = {json.dumps(prefix)}"]
        lines += [f"{mixture.kind} = {float(amount)!r}", *([f"fim = {json.dumps(fim)}"] if fim is not None else [])]
    (folder / "blend.toml").write_text("\n".join(lines), encoding="utf-8")
    return prefixes[0] if len(prefixes) == 1 and mixture.fim == (None,) else str(folder / "blend.toml")


def _corpus(prefix: Path, cfg: Config, number: int, tokens: np.ndarray[Any, Any], meta: dict[str, Any]) -> str:
    """Write a corpus of documents of drawn tokens, each ended by token `eod` of `meta`; returns its prefix."""
    draw = np.random.default_rng([cfg.train.seed, number])
    with IndexedWriter(prefix, cfg.model.vocab_size) as writer:
        for length in draw.integers(1, _MOST_TOKENS, _DOCUMENTS):
            writer.add(np.append(draw.choice(tokens, length), meta["eod"]))
        writer.finish(meta)
    return str(prefix)
