"""Names of the files that make up a tokenizer's folder; of the whole room alone, data.read may know these."""

from __future__ import annotations

from pathlib import Path

DEFINITION = "tokenizer.json"
MODEL = "tokenizer.model"  # sentencepiece's, where no tokenizer.json gives its ids
TRAINING = "training.json"  # how it was trained, if here
# What transformers keeps beside tokenizer.json: carried along unread, but for the name of the end token.
COMPANIONS = (
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json"),
    *("chat_template.json", "vocab.json", "merges.txt", MODEL),
)
TEMPLATES = "additional_chat_templates"  # a folder of *.jinja
FILES = (DEFINITION, TRAINING, *COMPANIONS)


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer as `Tokenizer.save` writes it."""
    return any((folder / name).is_file() for name in (DEFINITION, MODEL))
