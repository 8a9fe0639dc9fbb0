"""The `engine` command: one verb a capability (engine.commands)."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence

import engine
from engine.cli import checkpoints, data, run, schedule
from engine.cli.output import OutputError, watched
from engine.config.hints import nearest
from engine.errors import EXIT_CONFIG, EXIT_ERROR, EXIT_OK, EngineError
from engine.util.build_notes import missing
from engine.util.signals import ASKING


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb and exit with its code: 0 done, 1 error, 2 config error, 75 saved on a signal, 141 nobody reads."""
    if argv is None:
        _speak_utf8()
    args = list(sys.argv[1:] if argv is None else argv)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # one line, without our source text
    try:
        with watched():
            code = _run(args)
    except OutputError as error:  # what was buffered found no room
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    if argv is None and args[:1] == ["prepare"] and code == EXIT_OK:
        os._exit(code)  # all is written; to take libraries and their tables apart would be a tenth of a second
    sys.exit(code)


def _run(args: list[str]) -> int:
    if args[:1] in (["-V"], ["--version"]):
        print(f"engine {engine.__version__}")
        print(missing(), end="\n" * bool(missing()), file=sys.stderr)
        return EXIT_OK
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return EXIT_OK if args else EXIT_CONFIG
    verb = _VERBS.get(args[0])
    if verb is None:
        meant = _MEANT.get(args[0].strip("-").replace("-", "_"), "") or nearest(args[0], _VERBS)
        hint = f". Did you mean {meant}?" if meant else ""
        print(f"error: no verb {args[0]!r}{hint}\n\n{_overview()}", file=sys.stderr)
        return EXIT_CONFIG
    try:
        if args[0] not in _HEARS:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
        return verb(args[1:])
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return 130


def _speak_utf8() -> None:
    """Start again in Python's UTF-8 mode where the locale is another one.

    Names of files, arguments and what is printed are then UTF-8 as the content of every file is: a config written under
    one locale is read under another. (Python does so by itself for the C locale, unless it is told PYTHONUTF8=0.)
    """
    if sys.getfilesystemencoding() != "utf-8" and "utf8" not in sys._xoptions:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _overview() -> str:
    lines = [f"  {name:<14} {(verb.__doc__ or '').strip()}" for name, verb in _VERBS.items()]
    if text := missing():
        lines += ["", text]
    return "usage: engine VERB [OPTIONS]   (engine VERB --help shows a verb's options)\n\n" + "\n".join(lines)


_VERBS: dict[str, Callable[[list[str]], int]] = {
    "clean": data.clean,
    "prepare": data.prepare,
    "merge-datasets": data.merge_datasets,
    "tokenizer": data.tokenizer,
    "inspect": data.inspect,
    "train": run.train,
    "evaluate": run.evaluate,
    "generate": run.generate,
    "import": checkpoints.import_,
    "export": checkpoints.export,
    "verify": checkpoints.verify,
    "plot": run.plot,
    "schedule": schedule.schedule,
    "doctor": run.doctor,
}

# Verbs that answer signals from their first line on, those too that came before (engine.__main__).
_HEARS = ("clean", "prepare", "merge-datasets", "tokenizer", "inspect", "train")

_MEANT = {  # what others call it
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
