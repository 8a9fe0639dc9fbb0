"""Every error the engine raises on purpose, and the exit code each one ends the process with.

An error says what is wrong, where, why, and what to do. A `FieldError` is that sentence in four parts, so that a
configuration with seven errors reports seven of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_CONFIG = 2
EXIT_REQUEUE = 75  # EX_TEMPFAIL: the state was saved on a signal, please start the same command again
EXIT_READER_GONE = 141  # 128 + SIGPIPE, as a shell says of a command whose output nobody reads any more


_SHOWN = 200  # characters of a value that a message has room for


def format_value(value: object) -> str:
    """A value for a message: what stands in other people's files may be of any length and depth."""
    if isinstance(value, str | bytes) and len(value) > _SHOWN:
        return f"{value[:_SHOWN]!r}... ({len(value):,} in all)"
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; a whole number of thousands of digits
        return f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters in all)"


def truncate(text: str, most: int = 2 * _SHOWN) -> str:
    """The beginning of a text that should be short."""
    return text if len(text) <= most else f"{text[:most]}..."


class EngineError(Exception):
    """Base of all expected failures: its text is meant for a person, no traceback needed.

    `code`: "room.what-is-wrong", the same whatever the wording becomes; scripts and tests go by it.
    """

    exit_code = EXIT_ERROR

    def __init__(self, code: str, message: str):
        super().__init__(code, message)  # both: an error that crosses processes is made again of them
        self.code = code

    def __str__(self) -> str:
        return str(self.args[1])

    def report(self) -> str:
        """The text as it is printed: with the code at its end, as what to search for."""
        return f"{self} [{self.code}]"


@dataclass(frozen=True)
class FieldError:
    """One wrong value of a configuration: `path = value`, the problem, and the fix."""

    code: str
    path: str
    value: object
    problem: str
    fix: str

    def __str__(self) -> str:
        problem = truncate(self.problem, 1000)
        return f"{truncate(self.path)} = {format_value(self.value)}: {problem}. {self.fix} [{self.code}]"


class ConfigError(EngineError):
    """The configuration cannot be run. Carries all errors found, not only the first."""

    exit_code = EXIT_CONFIG

    def __init__(self, errors: Sequence[FieldError]):
        self.errors = tuple(errors)
        count = f"{len(errors)} errors" if len(errors) != 1 else "1 error"
        text = f"configuration has {count}:\n" + "\n".join(f"  - {f}" for f in self.errors)
        super().__init__("config.faults", text)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[Sequence[FieldError]]]:
        return type(self), (self.errors,)

    def report(self) -> str:
        """The text as it is printed: each error has its code."""
        return str(self)


class LayoutError(EngineError):
    """Parallel degrees do not fit the number of ranks or the model."""


class PlanError(EngineError):
    """A pipeline plan is incomplete, out of order, mismatched or would deadlock."""


class DataError(EngineError):
    """Data on disk or text input is missing, damaged or does not fit the model."""


class CheckpointError(EngineError):
    """A checkpoint is missing, damaged, does not fit, or could not be written."""


class DamageError(CheckpointError):
    """A checkpoint is not as it was written: torn, cut, changed bytes, files missing. Another one may do."""


class SecretError(CheckpointError):
    """A checkpoint that is signed or encrypted, and no secret; or a secret, and a checkpoint that is not."""


class WrongSecretError(SecretError):
    """A signature that is not the secret's: another secret made it, or the file was changed."""


class TrainingError(EngineError):
    """Training cannot go on: non-finite loss or gradient, or ranks that disagree."""


def out_of_memory_help(error: BaseException) -> str:
    """What to do about an error that says that memory has run out, torch's on GPUs and CPUs or Python's; else empty."""
    text = str(error)
    names = {kind.__name__ for kind in type(error).__mro__}
    if not (names & {"MemoryError", "OutOfMemoryError"} or "DefaultCPUAllocator" in text or "std::bad_alloc" in text):
        return ""
    why = next((line for line in text.splitlines() if "alloc" in line), text.partition("\n")[0])
    return (
        f"out of memory: {why.strip() or type(error).__name__}\n"
        "  For activations: a smaller train.micro_batch_size, or train.recompute selective or full.\n"
        "  For weights and optimizer: more ranks, parallel.tensor or parallel.pipeline; --dry-run says what they take."
    )
