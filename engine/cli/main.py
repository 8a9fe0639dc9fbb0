"""The `engine` command: dispatches to engine.cli.NAME.run and turns errors into messages and exit codes."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence

import engine
from engine.cli.output import OutputError, watch_output
from engine.config.hints import nearest
from engine.errors import EXIT_CONFIG, EXIT_ERROR, EXIT_OK, EngineError
from engine.util.build_notes import missing_extensions
from engine.util.signals import STOP_SIGNALS


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code.

    0: done, 1: error, 2: config error, 75: saved after a signal, 130: interrupted, 141: the output's reader has gone.
    """
    if argv is None:
        _ensure_utf8()
    args = list(sys.argv[1:] if argv is None else argv)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # one line, without our source text
    try:
        with watch_output():
            code = _run(args)
    except OutputError as error:  # the buffered output did not fit on the disk
        print(f"error: {error.report()}", file=sys.stderr)
        code = error.exit_code
    if argv is None and args[:1] == ["prepare"] and code == EXIT_OK:
        os._exit(code)  # everything is written; freeing the libraries' tables would take 0.1 s
    sys.exit(code)


def _run(args: list[str]) -> int:
    if args[:1] in (["-V"], ["--version"]):
        print(f"engine {engine.__version__}")
        print(missing_extensions(), end="\n" * bool(missing_extensions()), file=sys.stderr)
        return EXIT_OK
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return EXIT_OK if args else EXIT_CONFIG
    if args[0] not in _VERBS:
        suggestion = _SYNONYMS.get(args[0].strip("-").replace("-", "_"), "") or nearest(args[0], _VERBS)
        hint = f". Did you mean {suggestion}?" if suggestion else ""
        print(f"error: unknown command {args[0]!r}{hint}\n\n{_overview()}", file=sys.stderr)
        return EXIT_CONFIG
    try:
        if args[0] not in _HANDLES_SIGNALS:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        code: int = importlib.import_module(f"engine.cli.{_file(args[0])}").run(args[1:])
        return code
    except EngineError as error:
        print(f"error: {error.report()}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return 130


def _file(verb: str) -> str:
    """Name of the module of engine.cli that contains a command."""
    return "import_" if verb == "import" else verb.replace("-", "_")  # import is a keyword of Python


def _ensure_utf8() -> None:
    """Restart in Python's UTF-8 mode if the locale has another encoding.

    File names, arguments and output are then UTF-8, like the content of all files, so that a config written under one
    locale can be read under another. (Python does this itself for the C locale, unless PYTHONUTF8=0.)
    """
    if sys.getfilesystemencoding() != "utf-8" and "utf8" not in sys._xoptions:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _overview() -> str:
    lines = [f"  {name:<14} {text}" for name, text in _VERBS.items()]
    if text := missing_extensions():
        lines += ["", text]
    return "usage: engine COMMAND [OPTIONS]   (engine COMMAND --help lists its options)\n\n" + "\n".join(lines)


_VERBS = {
    "clean": "filter raw text; remove test questions, personal data and duplicates",
    "prepare": "convert raw text to memory-mapped train/valid/test files",
    "merge-datasets": "concatenate tokenised corpora, as Megatron-LM's merge_datasets.py",
    "tokenizer": "train a tokenizer: engine tokenizer train ...",
    "inspect": "show a corpus (counts, lengths, samples) or a checkpoint (tensors, lineage)",
    "train": "train a model, on one process or on many under torchrun",
    "prove": "compare a config's layout with one process, on a tiny model",
    "evaluate": "compute validation loss, perplexity and bits per byte of a checkpoint",
    "generate": "continue a prompt with a checkpoint",
    "import": "convert a Hugging Face folder or a Megatron-LM checkpoint",
    "export": "write a checkpoint as a Hugging Face folder",
    "diff": "find the first tensor in which two layouts or runs differ",
    "verify": "check every file of a checkpoint against its digests",
    "plot": "draw the loss curve of runs",
    "schedule": "check, simulate, draw, compare and search pipeline schedules",
    "doctor": "report versions and devices, and test kernels and communication",
}

# Commands that handle signals from their first line on, also those that arrived earlier (engine.__main__).
_HANDLES_SIGNALS = ("clean", "prepare", "merge-datasets", "tokenizer", "inspect", "train")

_SYNONYMS = {  # command names of other engines
    "pretrain": "train",
    "finetune": "train",
    "run": "train",
    "resume": "train",
    "eval": "evaluate",
    "validate": "evaluate",
    "infer": "generate",
    "inference": "generate",
    "chat": "generate",
    "preprocess": "prepare",
    "preprocess_data": "prepare",
    "tokenize": "prepare",
    "merge": "merge-datasets",
    "merge_data": "merge-datasets",
    "dedup": "clean",
    "convert": "import or export",
    "info": "inspect",
    "show": "inspect",
    "check": "verify",
    "env": "doctor",
}
