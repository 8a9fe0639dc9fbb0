"""`engine generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from engine.cli.common import single_process
from engine.errors import EXIT_OK


@dataclass
class GenerateOptions:
    """Continue a prompt with a checkpoint."""

    checkpoint: tyro.conf.Positional[Path]
    """run folder (its newest checkpoint) or step folder"""
    prompt: str
    """text to continue"""
    prepend_bos: bool = False
    """begin with the tokenizer's BOS, for a model whose data was made with `engine prepare --prepend-bos`"""
    max_tokens: int = 128
    """tokens to add at most"""
    temperature: float = 0.8
    """0 takes the likeliest token every time"""
    top_k: int = 50
    """draw among so many likeliest tokens; 0: all"""
    seed: int = 0
    """the draws follow from it"""
    tokenizer: Path | None = None
    """folder with tokenizer.json; default: the copy in the run folder"""
    secret: str = ""
    """file:PATH or env:NAME of the secret of a signed or encrypted checkpoint"""


def run(args: list[str]) -> int:
    """Run the verb; returns the exit code."""

    from engine.checkpoint.seal import open_storage
    from engine.inference.generate import sample
    from engine.inference.load import load_model, load_tokenizer

    o = tyro.cli(GenerateOptions, args=args, prog="engine generate")
    single_process("generate")
    storage = open_storage(o.secret)
    model, tokenizer = load_model(o.checkpoint, storage), load_tokenizer(o.checkpoint, o.tokenizer, storage)
    print(o.prompt, end="", flush=True)
    for text in sample(
        model,
        tokenizer,
        o.prompt,
        max_tokens=o.max_tokens,
        temperature=o.temperature,
        top_k=o.top_k,
        prepend_bos=o.prepend_bos,
        seed=o.seed,
    ):
        print(text, end="", flush=True)
    print()
    return EXIT_OK
