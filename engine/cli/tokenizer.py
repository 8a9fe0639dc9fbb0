"""`engine tokenizer train`; its options and their checks are engine/data/tokenize/options.py."""

from __future__ import annotations

from engine.cli.common import Help, parse, stops_on_signals
from engine.errors import EXIT_OK, ConfigError, FieldError
from engine.util.signals import Interrupts

HELP = Help(
    examples=(
        (
            "Train a byte-level BPE tokenizer of 32,000 tokens",
            "engine tokenizer train --input raw --vocab-size 32000 --output tokenizers/bpe",
        ),
        (
            "Train a unigram tokenizer on 10 GB of the text",
            "engine tokenizer train --input raw --vocab-size 32000 --output tokenizers/unigram --kind unigram "
            "--max-bytes 10000000000",
        ),
    ),
    groups={
        "input": ("input", "include", "exclude", "json_key", "format", "on_error", "max_bytes"),
        "tokens": ("vocab_size", "kind", "special_tokens", "user_tokens"),
        "splitting": ("normalizer", "split_pattern", "digits"),
        "limits": ("min_frequency", "character_coverage", "limit_alphabet", "max_token_length"),
        "output": ("output", "overwrite"),
    },
)


@stops_on_signals
def run(args: list[str], stop: Interrupts) -> int:
    """Run the command; returns the exit code."""
    from engine.cli.prepare_console import prepare_progress, show_trained
    from engine.data.tokenize.options import TokenizerOptions
    from engine.data.tokenize.train import train_tokenizer

    if args[:1] not in (["train"], ["-h"], ["--help"]):
        word = " ".join(args[:1])
        fix = "Use `engine tokenizer train ...`."
        raise ConfigError([FieldError("cli.tokenizer-not-train", "engine tokenizer", word, "is not `train`", fix)])
    options = parse(TokenizerOptions, args[args[:1] == ["train"] :], "tokenizer train", HELP)
    with prepare_progress() as progress:
        trained = train_tokenizer(options, progress=progress, note=print, stop=stop)
    show_trained(trained, options.recipe, options.output)
    return EXIT_OK
