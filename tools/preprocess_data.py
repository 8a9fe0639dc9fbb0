"""`engine prepare` under the argument names of Megatron-LM's preprocess_data.py, for commands and scripts that exist.

Writes PREFIX_KEY_document.bin/.idx for every key, as Megatron does and reads. Options without a meaning here are
accepted and named; those that would change the result are refused, with what to do instead.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from engine.data.prepare import prepare
from engine.errors import EXIT_OK, ConfigError, EngineError, Fault
from engine.monitor.prepared import prepare_progress, show_prepared

TOKENIZER_TYPES = (
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
)
# Every core is used and the order is the input order, whatever these say.
WITHOUT_MEANING = {"--partitions": 1, "--log-interval": 1, "--keep-sequential-samples": 0}
REFUSED = {
    "--split-sentences": "Sentences are not split: give a list of strings as the text, or split beforehand.",
    "--keep-newlines": "It belongs to --split-sentences, which is not there.",
    "--lang": "It belongs to --split-sentences, which is not there.",
    "--vocab-file": "Give --tokenizer-model a folder with tokenizer.json, a .model or a .tiktoken file.",
    "--merge-file": "Give --tokenizer-model a folder with tokenizer.json, a .model or a .tiktoken file.",
    "--vocab-size": "The tokenizer says how many tokens it has.",
    "--tiktoken-pattern": "Write NAME.json with the pattern beside NAME.tiktoken (docs/data.md).",
    "--tiktoken-special-tokens": "Write NAME.json with the special tokens beside NAME.tiktoken (docs/data.md).",
    "--find-optimal-num-workers": "Leave it out: all cores are used.",
    "--workers-to-check": "Leave it out: all cores are used.",
    "--max-documents": "Give an input of that many lines, such as `head -n N FILE | ... --input -`.",
    "--performance-dir": "Leave it out: the rate is printed and stands in PREFIX_KEY_document-report.json.",
    "--trust-remote-code": "Code from a model repository is never run here; a tokenizer.json does without.",
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; raises ConfigError with all that is refused or unknown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", nargs="+", required=True, help="JSON lines, or anything else `engine prepare` reads")
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX_KEY_document.bin, .idx, .json")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="one corpus is written for each of these keys")
    parser.add_argument(
        "--tokenizer-model", required=True, type=Path, help="tokenizer.json folder, .model or .tiktoken"
    )
    parser.add_argument("--tokenizer-type", default="HuggingFaceTokenizer", help="checked; the file itself decides")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument("--workers", type=int, default=0, help="threads that encode; 0: one a core")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="as in `engine prepare`")
    parser.add_argument("--overwrite", action="store_true", help="as in `engine prepare`")
    for name, values in WITHOUT_MEANING.items():
        action = {"action": "store_true"} if not values else {"type": int}
        parser.add_argument(name, help="accepted; has no meaning here", default=None, **action)  # type: ignore[arg-type]
    parsed, rest = parser.parse_known_args(argv)
    known = [option for action in parser._actions for option in action.option_strings]
    faults = [_fault(word.partition("=")[0], known) for word in rest if word.startswith("--")]
    if not faults and rest:
        faults.append(Fault("argument", rest[0], "belongs to no option", "Leave it out."))
    if parsed.tokenizer_type not in TOKENIZER_TYPES:
        text = f"is none of {', '.join(TOKENIZER_TYPES)}"
        repair = "Give --tokenizer-model a tokenizer.json, .model or .tiktoken file, and leave --tokenizer-type out."
        faults.append(Fault("--tokenizer-type", parsed.tokenizer_type, text, repair))
    if parsed.workers < 0:
        faults.append(Fault("--workers", parsed.workers, "is below 0", "Use 0 for one a core."))
    if faults:
        raise ConfigError(faults)
    return parsed


def _fault(option: str, known: Sequence[str]) -> Fault:
    if option in REFUSED:
        return Fault(option, "given", "is an option of Megatron-LM that is not supported here", REFUSED[option])
    near = difflib.get_close_matches(option, known, n=1)
    return Fault(option, "given", "is unknown", f"Did you mean {near[0]}?" if near else "See --help.")


def main(argv: Sequence[str] | None = None) -> int:
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        for name in WITHOUT_MEANING:
            if getattr(args, name[2:].replace("-", "_")) is not None:
                print(f"note: {name} has no meaning here: all cores are used, and the order is the input order")
        if args.workers:
            from engine.launch import limit_encoder_threads

            limit_encoder_threads(args.workers)
        for key in args.json_keys:
            with prepare_progress() as progress:
                report = prepare(
                    args.input,
                    f"{args.output_prefix}_{key}_document",
                    tokenizer=args.tokenizer_model,
                    append_eod=args.append_eod,
                    json_key=(key,),
                    on_error=args.on_error,
                    workers=args.workers,
                    suffixes=("", "-valid", "-test"),
                    overwrite=args.overwrite,
                    progress=progress,
                    note=print,
                )
            show_prepared(report)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
