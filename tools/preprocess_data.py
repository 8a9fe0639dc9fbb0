"""`engine prepare` under the argument names of Megatron-LM's preprocess_data.py, for commands and scripts that exist.

Writes PREFIX_KEY_document.bin/.idx for every key, in Megatron's format. Options without effect here are accepted and
named in a note; options that would change the result are errors that give an alternative.
"""

from __future__ import annotations

import argparse
import difflib
import json
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from engine.util.signals import STOP_SIGNALS, Interrupts, interruptible

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until `interruptible` answers them

from engine.cli.output import watch_output
from engine.cli.prepare_console import prepare_progress, show_prepared
from engine.data.prepare.options import PrepareOptions
from engine.data.prepare.run import prepare
from engine.data.tokenize.tokenizer import Tokenizer
from engine.errors import EXIT_OK, ConfigError, DataError, EngineError, FieldError
from engine.util.words import StrTuple

# The tokenizer: of which option, and whether BERT's texts are put in lower case first.
TOKENIZER_TYPES: dict[str, tuple[tuple[str, ...], bool | None]] = {
    "HuggingFaceTokenizer": (("--tokenizer-model", "--vocab-file"), None),
    "SentencePieceTokenizer": (("--tokenizer-model",), None),
    "GPTSentencePieceTokenizer": (("--tokenizer-model",), None),
    "Llama2Tokenizer": (("--tokenizer-model",), None),
    "TikTokenizer": (("--tokenizer-model",), None),
    "GPT2BPETokenizer": (("--vocab-file", "--tokenizer-model"), None),
    "BertWordPieceLowerCase": (("--vocab-file",), True),
    "BertWordPieceCase": (("--vocab-file",), False),
}
_WRITE_IDS = "Its texts are token ids: write them with engine.data.samples.indexed_writer.IndexedWriter."
REFUSED_TYPES = {
    "NullTokenizer": _WRITE_IDS,
    "NullMultimodalTokenizer": _WRITE_IDS,
    "MultimodalTokenizer": "Images are not prepared here; for the text alone give HuggingFaceTokenizer.",
    "SFTTokenizer": "Chat templates are not applied: write the conversations as text first.",
}
# Always: all cores are used, the order is the input order, and gigatoken encodes if it supports the tokenizer.
WITHOUT_EFFECT = {
    **{"--partitions": int, "--log-interval": int, "--keep-sequential-samples": None, "--chunk-size": int},
    **{"--use-gigatoken": None, "--tokenizer-hf-no-use-fast": None, "--keep-newlines": None, "--lang": str},
}
_TIKTOKEN = "Write NAME.json with the pattern and the special tokens next to NAME.tiktoken (docs/tokenizers.md)."
_SIZES = "Leave it out: a corpus does not depend on it, and the tokenizer says how many tokens it has."
_OPTIMAL = "Leave it out: all cores are used."
REFUSED = {
    "--split-sentences": "Sentences are not split: give a list of strings as the text, or split beforehand.",
    **dict.fromkeys(("--vocab-size", "--padded-vocab-size", "--pad-vocab-size", "--no-pad-vocab-size"), _SIZES),
    **dict.fromkeys(("--make-vocab-size-divisible-by", "--tensor-model-parallel-size", "--vocab-extra-ids"), _SIZES),
    **dict.fromkeys(("--tiktoken-pattern", "--tiktoken-special-tokens", "--tiktoken-num-special-tokens"), _TIKTOKEN),
    **dict.fromkeys(("--find-optimal-num-workers", "--workers-to-check"), _OPTIMAL),
    "--max-documents": "Give an input of that many lines, such as `head -n N FILE | ... --input -`.",
    "--num-docs": "Leave it out: progress is reported in bytes.",
    "--performance-dir": "Leave it out: the rate is printed and written to PREFIX_KEY_document-report.json.",
    "--trust-remote-code": "Code from a model repository is never run here; a tokenizer.json does without.",
    "--chat-template": "Chat templates are not applied: write the conversations as text first.",
    "--tokenizer-metadata": "Leave it out: the tokenizer's file says what it is.",
    **dict.fromkeys(
        ("--tokenizer-special-tokens", "--special-tokens"), "Give a tokenizer that has them, such as a tokenizer.json."
    ),
    "--tokenizer-sentencepiece-legacy": "Give a .model that was trained with its special tokens.",
    "--tokenizer-sentencepiece-ignore-extra-whitespaces": "Leave it out: the .model says what happens to blanks.",
    **dict.fromkeys(
        ("--null-tokenizer-eod-id", "--null-tokenizer-pad-id"), "They belong to NullTokenizer, which is not supported."
    ),
    "--tokenizer-name-or-path": "Give --tokenizer-model its folder; nothing is downloaded.",
    "--jsonl-keys": "Give --json-keys.",
    "--ftfy": "Run `engine clean --fix-mojibake` first.",
    "--no-new-tokens": "Leave it out: no tokens are added.",
}


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([FieldError("preprocess.bad-arguments", "arguments", "given", message, "See --help.")])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments; raises ConfigError with all unsupported, missing or unknown ones."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    types = ", ".join(TOKENIZER_TYPES)
    parser.add_argument("--input", nargs="+", default=[], help="JSON lines with any file name; also .gz .zst .bz2 .xz")
    parser.add_argument("--output-prefix", default="", help="writes PREFIX_KEY_document.bin, .idx, .json")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="one corpus is written for each of these keys")
    parser.add_argument("--tokenizer-model", type=Path, help="a file or folder that `engine prepare --tokenizer` takes")
    parser.add_argument("--tokenizer-type", default="", help=f"{types}; checked, but the file itself decides")
    parser.add_argument("--vocab-file", type=Path, help="GPT-2's vocab.json or BERT's vocab.txt, with any name")
    parser.add_argument("--merge-file", type=Path, help="GPT-2's merges.txt")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument("--prepend-bos", action="store_true", help="begin each document with the tokenizer's BOS")
    parser.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="HuggingFaceTokenizer: without the BOS that its template adds to every text",
    )
    parser.add_argument("--workers", type=int, default=0, help="threads that encode; 0: one a core")
    parser.add_argument("--dataset-impl", default="mmap", help="mmap, the only one")
    parser.add_argument("--on-error", default="stop", help="stop or skip, as in `engine prepare`")
    parser.add_argument("--overwrite", action="store_true", help="as in `engine prepare`")
    for name, kind in WITHOUT_EFFECT.items():
        action = {"action": "store_true"} if kind is None else {"type": kind}
        parser.add_argument(name, help="accepted; has no effect here", default=None, **action)  # type: ignore[arg-type]
    parsed, rest = parser.parse_known_args(argv)
    known = [option for action in parser._actions for option in action.option_strings]
    errors = [_unsupported(word.partition("=")[0], known) for word in rest if word.startswith("--")]
    if not errors and rest:
        errors.append(
            FieldError("preprocess.stray-argument", "argument", rest[0], "belongs to no option", "Leave it out.")
        )
    if errors := [*errors, *_errors(parsed)]:
        raise ConfigError(errors)
    return parsed


def _unsupported(option: str, known: Sequence[str]) -> FieldError:
    if option in REFUSED:
        return FieldError(
            "preprocess.unsupported-option",
            option,
            "given",
            "is an option of Megatron-LM that is not supported here",
            REFUSED[option],
        )
    near = difflib.get_close_matches(option, known, n=1)
    return FieldError(
        "preprocess.unknown-option",
        option,
        "given",
        "is unknown",
        f"Did you mean {near[0]}?" if near else "See --help.",
    )


def _errors(args: argparse.Namespace) -> Iterator[FieldError]:
    if not args.input:
        yield FieldError("preprocess.no-input", "--input", "", "names nothing to read", "Give files of JSON lines.")
    once = [name for name in args.input if name == "-" or Path(name).is_fifo()]
    if once and len(set(args.json_keys)) > 1:
        how = "Give a file, or a command for each key."
        yield FieldError(
            "preprocess.input-read-only-once",
            "--json-keys",
            " ".join(args.json_keys),
            f"are several, and {once[0]} can be read only once",
            how,
        )
    if not args.output_prefix:
        yield FieldError(
            "preprocess.no-output-prefix", "--output-prefix", "", "is missing", "Such as --output-prefix corpus/mine."
        )
    kind = args.tokenizer_type
    if kind in REFUSED_TYPES:
        yield FieldError(
            "preprocess.unsupported-tokenizer-type",
            "--tokenizer-type",
            kind,
            "is a tokenizer of Megatron-LM that is not here",
            REFUSED_TYPES[kind],
        )
    elif kind and kind not in TOKENIZER_TYPES:
        near = difflib.get_close_matches(kind, TOKENIZER_TYPES, n=1)
        hint = f"Did you mean {near[0]}? Or leave" if near else "Leave"
        text = f"is none of {', '.join(TOKENIZER_TYPES)}"
        yield FieldError(
            "preprocess.unknown-tokenizer-type",
            "--tokenizer-type",
            kind,
            text,
            f"{hint} it out: the tokenizer's file says what it is.",
        )
    else:
        yield from _tokenizer_faults(args)
    if args.dataset_impl != "mmap":
        yield FieldError(
            "preprocess.unsupported-format",
            "--dataset-impl",
            args.dataset_impl,
            "is not mmap, the only format",
            "Leave it out.",
        )
    if args.workers < 0:
        yield FieldError(
            "preprocess.number-too-small", "--workers", args.workers, "is below 0", "Use 0 for one a core."
        )
    if args.on_error not in ("stop", "skip"):
        yield FieldError(
            "preprocess.unknown-choice",
            "--on-error",
            args.on_error,
            "is neither stop nor skip",
            "Leave it out to stop.",
        )


def _tokenizer_faults(args: argparse.Namespace) -> Iterator[FieldError]:
    given = {"--tokenizer-model": args.tokenizer_model, "--vocab-file": args.vocab_file}
    wanted, _ = TOKENIZER_TYPES[args.tokenizer_type or "HuggingFaceTokenizer"]
    there = [option for option, path in given.items() if path is not None]
    if len(there) == 2:
        yield FieldError(
            "preprocess.two-tokenizers",
            "--vocab-file",
            str(args.vocab_file),
            "excludes --tokenizer-model",
            "Give one of them.",
        )
    elif there and there[0] not in wanted:
        text = f"is not a file of {args.tokenizer_type}"
        yield FieldError("preprocess.wrong-tokenizer-file", there[0], str(given[there[0]]), text, f"Give {wanted[0]}.")
    elif not there:
        how = f"Give {wanted[0]} a file; nothing is downloaded."
        yield FieldError("preprocess.no-tokenizer", wanted[0], "", "is missing: there is no tokenizer", how)
    for option, path in (("--vocab-file", args.vocab_file), ("--merge-file", args.merge_file)):
        if path is not None and not path.is_file():
            how = "Nothing is downloaded: give the path of the file, or --tokenizer-model a folder with tokenizer.json."
            yield FieldError("preprocess.no-such-file", option, str(path), "is no file", how)
    if args.merge_file is not None and args.vocab_file is None:
        yield FieldError(
            "preprocess.merges-without-vocabulary",
            "--merge-file",
            str(args.merge_file),
            "needs --vocab-file",
            "Give both, or neither.",
        )
    if args.tokenizer_type == "GPT2BPETokenizer" and args.vocab_file is not None and args.merge_file is None:
        yield FieldError(
            "preprocess.no-merges",
            "--merge-file",
            "",
            "is missing: a vocabulary alone does not say how texts are cut",
            "Give it too.",
        )


def adds_bos(args: argparse.Namespace) -> bool:
    """Whether documents are to begin with BOS: as asked, or as Megatron stores what a Hugging Face template adds.

    Raises ConfigError for a template that adds anything else.
    """
    if args.prepend_bos or args.tokenizer_type != "HuggingFaceTokenizer" or args.tokenizer_model is None:
        return bool(args.prepend_bos)
    if args.tokenizer_hf_no_include_special_tokens:
        return False
    tokenizer = Tokenizer.load(args.tokenizer_model)
    before, behind = tokenizer.template
    if not before and not behind:
        return False
    if behind or before != [_bos(tokenizer)]:
        text = f"puts the tokens {before} before and {behind} behind every text, as Megatron stores it"
        fix = "Give --tokenizer-hf-no-include-special-tokens for the text alone, as that option gives in Megatron."
        raise ConfigError(
            [FieldError("preprocess.template-adds-tokens", "--tokenizer-model", str(args.tokenizer_model), text, fix)]
        )
    print(
        f"note: the template of {args.tokenizer_model} begins every text with token {before[0]} (BOS), which Megatron "
        f"stores, so it is stored; --tokenizer-hf-no-include-special-tokens leaves it out"
    )
    return True


def _bos(tokenizer: Tokenizer) -> int | None:
    try:
        return tokenizer.bos
    except DataError:
        return None


def _keys_left(args: argparse.Namespace, bos: bool) -> list[str]:
    """All keys; if the same command was interrupted after some of them, only the remaining ones."""
    prefixes = {key: f"{args.output_prefix}_{key}_document" for key in args.json_keys}
    done = [key for key, prefix in prefixes.items() if Path(f"{prefix}-report.json").exists()]
    if args.overwrite or len(done) in (0, len(prefixes)) or not all(_same(args, bos, prefixes[key]) for key in done):
        return list(prefixes)
    for key in done:
        print(f"note: {prefixes[key]} exists already: continuing with the missing keys")
    return [key for key in prefixes if key not in done]


def _same(args: argparse.Namespace, bos: bool, prefix: str) -> bool:
    """Whether the corpus was made with this tokenizer, EOD and BOS, and no input is younger than its report."""
    path = Path(f"{prefix}-report.json")
    report = json.loads(path.read_bytes())
    tokenizer = Tokenizer.load(args.tokenizer_model or args.vocab_file, merges=args.merge_file, lower_case=_lower(args))
    wanted = [tokenizer.digest, tokenizer.eod if args.append_eod else None, tokenizer.bos if bos else None]
    written = path.stat().st_mtime
    younger = any(Path(name).exists() and Path(name).stat().st_mtime > written for name in args.input)
    return [report.get(name) for name in ("tokenizer_digest", "eod", "bos")] == wanted and not younger


def _lower(args: argparse.Namespace) -> bool | None:
    return TOKENIZER_TYPES[args.tokenizer_type or "HuggingFaceTokenizer"][1]


def _prepare(args: argparse.Namespace, key: str, bos: bool, stop: Interrupts) -> None:
    options = PrepareOptions(
        StrTuple(args.input),
        f"{args.output_prefix}_{key}_document",
        args.tokenizer_model or args.vocab_file,
        merges=args.merge_file,
        lower_case=_lower(args),
        json_key=StrTuple((key,)),
        format="jsonl",
        on_error=args.on_error,
        append_eod=args.append_eod,
        prepend_bos=bos,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    suffixes = ("", "-valid", "-test")
    with prepare_progress() as progress:
        report = prepare(options, suffixes=suffixes, progress=progress, note=print, stop=stop)
    show_prepared(report)


def _run(args: argparse.Namespace) -> None:
    for name in WITHOUT_EFFECT:
        if getattr(args, name[2:].replace("-", "_")) is not None:
            print(f"note: {name} has no effect here: all cores are used, and the order is the input order")
    if args.tokenizer_type.startswith("BertWordPiece"):
        print("note: texts alone are stored, without [CLS] and [SEP] around them and without <extra_id_N> tokens")
    if args.workers:
        from engine.distributed.env import limit_encoder_threads

        limit_encoder_threads(args.workers)
    with interruptible("nothing is written; give the same command again") as stop:
        bos = adds_bos(args)
        for key in _keys_left(args, bos):
            stop.resume_hint = lambda key=key: f"{key} is not begun; give the same command again"  # type: ignore[misc]
            _prepare(args, key, bos, stop)


def main(argv: Sequence[str] | None = None) -> int:
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        with watch_output():
            _run(parse(sys.argv[1:] if argv is None else argv))
    except EngineError as error:
        print(f"error: {error.report()}", file=sys.stderr)
        return error.exit_code
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
