"""The engine's exceptions, and the exit code of each.

A message names the problem, the place, the reason and the fix. A `FieldError` holds these as separate fields, so that a
configuration with seven errors reports all seven at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_CONFIG = 2
EXIT_REQUEUE = 75  # EX_TEMPFAIL: stopped on a signal after saving; start the same command again to resume
EXIT_READER_GONE = 141  # 128 + SIGPIPE, the code a shell reports for a command whose output pipe was closed


_MAX_VALUE_CHARS = 200  # longest value that a message prints in full


def format_value(value: object) -> str:
    """repr of a value for a message, shortened: values from users' files may be of any length and depth."""
    if isinstance(value, str | bytes) and len(value) > _MAX_VALUE_CHARS:
        return f"{value[:_MAX_VALUE_CHARS]!r}... ({len(value):,} in all)"
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of thousands of digits
        return f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[:_MAX_VALUE_CHARS]}... ({len(text):,} characters in all)"


def truncate(text: str, max_chars: int = 2 * _MAX_VALUE_CHARS) -> str:
    """The text, cut after `max_chars` characters."""
    return text if len(text) <= max_chars else f"{text[:max_chars]}..."


class EngineError(Exception):
    """Base of all expected errors: the message is for the user, and no traceback is printed.

    code: "package.short-name", stable when the wording changes; scripts and tests match it.
    """

    exit_code = EXIT_ERROR

    def __init__(self, code: str, message: str):
        super().__init__(code, message)  # both, because unpickling in another process calls the class with these
        self.code = code

    def __str__(self) -> str:
        return str(self.args[1])

    def report(self) -> str:
        """The message as printed: it ends with the code, to search for."""
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
        value = "" if self.value is None else f" = {format_value(self.value)}"  # None: not given
        return f"{truncate(self.path)}{value}: {problem}. {self.fix} [{self.code}]"


class ConfigError(EngineError):
    """The configuration is not valid. Carries all errors found, not only the first."""

    exit_code = EXIT_CONFIG

    def __init__(self, errors: Sequence[FieldError]):
        self.errors = tuple(errors)
        count = f"{len(errors)} errors" if len(errors) != 1 else "1 error"
        text = f"configuration has {count}:\n" + "\n".join(f"  - {f}" for f in self.errors)
        super().__init__("config.faults", text)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[Sequence[FieldError]]]:
        return type(self), (self.errors,)

    def report(self) -> str:
        """The message as printed: each line ends with the code of its error."""
        return str(self)


class LayoutError(EngineError):
    """Parallel degrees do not fit the number of ranks or the model."""


class PlanError(EngineError):
    """A pipeline plan is incomplete, out of order, mismatched or would deadlock."""


class DataError(EngineError):
    """Data on disk or text input is missing, corrupt or does not fit the model."""


class CheckpointError(EngineError):
    """A checkpoint is missing, corrupt, does not fit, or could not be written."""


class DamageError(CheckpointError):
    """A checkpoint is corrupt: torn, truncated, bytes changed or files missing. An older one may be intact."""


class SecretError(CheckpointError):
    """A signed or encrypted checkpoint was opened without a secret, or a plain checkpoint with one."""


class WrongSecretError(SecretError):
    """The signature does not match the secret: it was made with another secret, or the file was changed."""


class TrainingError(EngineError):
    """Training cannot continue: non-finite loss or gradient, or ranks that disagree."""


def out_of_memory_help(error: BaseException) -> str:
    """Advice for an out-of-memory error of torch (GPU or CPU) or Python; empty for any other error."""
    text = str(error)
    names = {kind.__name__ for kind in type(error).__mro__}
    if not (names & {"MemoryError", "OutOfMemoryError"} or "DefaultCPUAllocator" in text or "std::bad_alloc" in text):
        return ""
    why = next((line for line in text.splitlines() if "alloc" in line), text.partition("\n")[0])
    return (
        f"out of memory: {why.strip() or type(error).__name__}\n"
        "  For activations: lower train.micro_batch_size, or set train.recompute to selective or full.\n"
        "  For weights and optimizer state: use more ranks, or raise parallel.tensor or parallel.pipeline; --dry-run "
        "estimates the memory."
    )
