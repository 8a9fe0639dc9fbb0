"""The `engine` command: one verb a capability, each in the file of its name."""

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
    """Run a verb and exit with its code: 0 done, 1 error, 2 config error, 75 saved on a signal, 141 nobody reads."""
    if argv is None:
        _ensure_utf8()
    args = list(sys.argv[1:] if argv is None else argv)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # one line, without our source text
    try:
        with watch_output():
            code = _run(args)
    except OutputError as error:  # what was buffered found no room
        print(f"error: {error.report()}", file=sys.stderr)
        code = error.exit_code
    if argv is None and args[:1] == ["prepare"] and code == EXIT_OK:
        os._exit(code)  # all is written; to take libraries and their tables apart would be a tenth of a second
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
        print(f"error: no verb {args[0]!r}{hint}\n\n{_overview()}", file=sys.stderr)
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
    """The module of engine.cli that a verb is in."""
    return "import_" if verb == "import" else verb.replace("-", "_")  # import is a word of Python


def _ensure_utf8() -> None:
    """Start again in Python's UTF-8 mode where the locale is another one.

    Names of files, arguments and what is printed are then UTF-8 as the content of every file is: a config written under
    one locale is read under another. (Python does so by itself for the C locale, unless it is told PYTHONUTF8=0.)
    """
    if sys.getfilesystemencoding() != "utf-8" and "utf8" not in sys._xoptions:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _overview() -> str:
    lines = [f"  {name:<14} {text}" for name, text in _VERBS.items()]
    if text := missing_extensions():
        lines += ["", text]
    return "usage: engine VERB [OPTIONS]   (engine VERB --help shows a verb's options)\n\n" + "\n".join(lines)


_VERBS = {
    "clean": "raw text -> cleaned text: filters, test questions, personal data, duplicates",
    "prepare": "raw text -> tokenizer and memory-mapped train/valid/test files",
    "merge-datasets": "join tokenised corpora to one, as Megatron-LM's merge_datasets.py",
    "tokenizer": "train a tokenizer: engine tokenizer train ...",
    "inspect": "look at a corpus (counts, lengths, samples) or at a checkpoint (tensors, norms, lineage)",
    "train": "train a model, on one process or on many under torchrun",
    "evaluate": "validation loss, perplexity and bits per byte of a checkpoint",
    "generate": "continue a prompt with a checkpoint",
    "import": "write a Hugging Face folder or a checkpoint of Megatron-LM as a checkpoint",
    "export": "write a checkpoint as a Hugging Face folder",
    "verify": "check every file of a checkpoint against its digests",
    "plot": "draw the loss curve of runs",
    "schedule": "prove, simulate, draw, compare and search pipeline schedules",
    "doctor": "what is installed, which kernels run here, and whether they and gloo work",
}

# Verbs that answer signals from their first line on, those too that came before (engine.__main__).
_HANDLES_SIGNALS = ("clean", "prepare", "merge-datasets", "tokenizer", "inspect", "train")

_SYNONYMS = {  # what others call it
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
