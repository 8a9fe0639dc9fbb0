"""`engine import` and `engine export` under the argument names of Megatron-LM's tools/checkpoint/convert.py.

    --loader hf --saver trident     a Hugging Face folder -> a run folder with one checkpoint  (engine import)
    --loader core --saver trident   a checkpoint of Megatron-LM -> the same                    (engine import)
    --loader trident --saver hf     a checkpoint or run folder -> a Hugging Face folder        (engine export)

A checkpoint contains whole, unfused tensors as rectangles and loads in any layout, so the target sizes of Megatron's
command are accepted, named in a note, and have no effect.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence

from engine.cli.main import main as engine
from engine.errors import EXIT_CONFIG, ConfigError, FieldError

HF = ("hf", "huggingface", "llama_mistral")
OURS = ("trident",)
MEGATRON = ("core", "mcore", "legacy", "megatron")
WITHOUT_EFFECT = {
    "--target-tensor-parallel-size": int,
    "--target-pipeline-parallel-size": int,
    "--target-expert-parallel-size": int,
    "--megatron-path": str,
    "--model-size": str,
    "--checkpoint-type": str,
    "--max-queue-size": int,
    "--no-checking": None,
    "--make-vocab-size-divisible-by": int,
}
REFUSED = {
    "--vocab-file": "Give --tokenizer-model a folder with tokenizer.json.",
    "--trust-remote-code": "Code from a model repository is never run here.",
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments; raises ConfigError with all unsupported or unknown ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model-type", required=True, help="GPT")
    parser.add_argument("--loader", required=True, help=f"{', '.join((*HF, *MEGATRON))}, or {OURS[0]}")
    parser.add_argument("--saver", default="", help=f"{OURS[0]}, or {', '.join(HF)}; default: the other of the two")
    parser.add_argument("--load-dir", required=True, help="folder to read")
    parser.add_argument("--save-dir", required=True, help="new folder to write")
    parser.add_argument("--tokenizer-model", default="", help="export: folder with tokenizer.json")
    parser.add_argument("--true-vocab-size", type=int, default=0, help="loader core: vocabulary size without padding")
    for name, kind in WITHOUT_EFFECT.items():
        action = {"action": "store_true", "default": None} if kind is None else {"type": kind}
        parser.add_argument(name, help="accepted, without effect", **action)
    parsed, rest = parser.parse_known_args(argv)
    known = [option for action in parser._actions for option in action.option_strings]
    errors = [_fault(word.partition("=")[0], known) for word in rest if word.startswith("--")]
    if not errors and rest:
        errors.append(
            FieldError("convert.stray-argument", "argument", rest[0], "belongs to no option", "Leave it out.")
        )
    if parsed.model_type != "GPT":
        errors.append(
            FieldError("convert.not-gpt", "--model-type", parsed.model_type, "is not GPT", "Decoders only: Use GPT.")
        )
    parsed.saver = parsed.saver or (HF[0] if parsed.loader in OURS else OURS[0])
    for option, name, known_names in (
        ("--loader", parsed.loader, (*HF, *MEGATRON, *OURS)),
        ("--saver", parsed.saver, (*HF, *OURS)),
    ):
        if name in MEGATRON and option == "--saver":
            fix = "Save a Hugging Face folder, and import that with Megatron's own loader."
            errors.append(
                FieldError(
                    "convert.format-not-written", option, name, "Megatron-LM's formats are read, not written", fix
                )
            )
        elif name not in known_names:
            errors.append(
                FieldError(
                    "convert.format-unknown", option, name, f"is none of {', '.join(known_names)}", "Choose one."
                )
            )
    if not errors and (parsed.loader in OURS) == (parsed.saver in OURS):
        errors.append(
            FieldError(
                "convert.both-of-one-side",
                "--saver",
                parsed.saver,
                f"is the same side as --loader {parsed.loader}",
                "Leave it out.",
            )
        )
    if parsed.true_vocab_size and parsed.loader not in MEGATRON:
        errors.append(
            FieldError(
                "convert.vocab-size-unused",
                "--true-vocab-size",
                parsed.true_vocab_size,
                "is for --loader core",
                "Leave it out.",
            )
        )
    if errors:
        raise ConfigError(errors)
    return parsed


def _fault(option: str, known: Sequence[str]) -> FieldError:
    if option in REFUSED:
        return FieldError(
            "convert.option-not-supported",
            option,
            "given",
            "is an option of Megatron-LM that is not supported here",
            REFUSED[option],
        )
    near = difflib.get_close_matches(option, known, n=1)
    return FieldError(
        "convert.option-unknown", option, "given", "is unknown", f"Did you mean {near[0]}?" if near else "See --help."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Convert and exit with the code of the `engine` command."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        print(f"error: {error.report()}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    for name in WITHOUT_EFFECT:
        if getattr(args, name[2:].replace("-", "_")) is not None:
            print(f"note: {name} has no effect here: a checkpoint loads in any layout")
    words = ["export" if args.loader in OURS else "import", args.load_dir, args.save_dir]
    if args.tokenizer_model and args.loader in OURS:
        words += ["--tokenizer", args.tokenizer_model]
    if args.true_vocab_size:
        words += ["--vocab-size", str(args.true_vocab_size)]
    engine(words)


if __name__ == "__main__":
    main()
