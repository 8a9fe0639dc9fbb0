"""`engine tokenizer train`; its options and their checks are engine/data/tokenize/options.py."""

from __future__ import annotations

from engine.cli.common import parse, stops_on_signals
from engine.errors import EXIT_OK, ConfigError, FieldError
from engine.util.signals import Interrupts


@stops_on_signals
def run(args: list[str], stop: Interrupts) -> int:
    """Run the verb; returns the exit code."""
    from engine.cli.prepare_console import prepare_progress, show_trained
    from engine.data.tokenize.options import TokenizerOptions
    from engine.data.tokenize.train import train_tokenizer

    if args[:1] not in (["train"], ["-h"], ["--help"]):
        told = " ".join(args[:1])
        fix = "engine tokenizer train ..."
        raise ConfigError([FieldError("cli.tokenizer-not-train", "engine tokenizer", told, "is not train", fix)])
    options = parse(TokenizerOptions, args[args[:1] == ["train"] :], "tokenizer train")
    with prepare_progress() as progress:
        trained = train_tokenizer(options, progress=progress, note=print, stop=stop)
    show_trained(trained, options.recipe, options.output)
    return EXIT_OK
