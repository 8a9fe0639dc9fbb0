"""`engine generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from engine.cli.common import Help, parse, single_process
from engine.errors import EXIT_OK


@dataclass
class GenerateOptions:
    """Continue a prompt with a checkpoint."""

    checkpoint: tyro.conf.Positional[Path]
    """run folder (its newest checkpoint) or step folder"""
    prompt: str
    """text to continue"""
    prepend_bos: bool = False
    """start with the tokenizer's BOS token, for a model whose data was prepared with `engine prepare --prepend-bos`"""
    max_tokens: int = 128
    """maximum number of tokens to generate"""
    temperature: float = 0.8
    """sampling temperature; lower is more predictable; 0 always takes the most likely token"""
    top_k: int = 50
    """sample among this many most likely tokens; 0: all"""
    seed: int = 0
    """seed of the sampling; the same seed and prompt give the same text"""
    tokenizer: Path | None = None
    """folder with tokenizer.json; not set: the copy in the run folder"""
    secret: str = ""
    """file:PATH or env:NAME of the secret of a signed or encrypted checkpoint"""


HELP = Help(
    examples=(
        (
            "Continue a prompt with the newest checkpoint of a run",
            'engine generate runs/demo --prompt "Once upon a time"',
        ),
        (
            "Take the most likely token each time, from one checkpoint",
            'engine generate runs/demo/checkpoints/step_00000100 --prompt "Once" --temperature 0',
        ),
    ),
)


def run(args: list[str]) -> int:
    """Run the command; returns the exit code."""

    from engine.checkpoint.seal import open_storage
    from engine.inference.generate import sample
    from engine.inference.load import load_model, load_tokenizer

    o = parse(GenerateOptions, args, "generate", HELP)
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
