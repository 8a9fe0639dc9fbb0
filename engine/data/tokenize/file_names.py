"""Names of the files in a tokenizer folder; the only module of this package that data.read may import."""

from __future__ import annotations

from pathlib import Path

DEFINITION = "tokenizer.json"
MODEL = "tokenizer.model"  # sentencepiece's, if no tokenizer.json reproduces its ids
TRAINING = "training.json"  # recipe and statistics of a tokenizer trained by the engine
# Files of transformers next to tokenizer.json: copied without interpretation, except for the end token's name.
COMPANIONS = (
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json"),
    *("chat_template.json", "vocab.json", "merges.txt", MODEL),
)
TEMPLATES = "additional_chat_templates"  # a folder of *.jinja
FILES = (DEFINITION, TRAINING, *COMPANIONS)


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer as `Tokenizer.save` writes it."""
    return any((folder / name).is_file() for name in (DEFINITION, MODEL))
