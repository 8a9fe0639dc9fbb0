"""A fault of tests/proofs/mutations in this process and its forks, without a copy of the repository."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

from tests.proofs.mutations import MUTATIONS
from tests.proofs.mutations.patch import ROOT


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Context in which the function that the mutation changes runs its changed code."""
    mutation = next(m for m in MUTATIONS if m.name == name)
    module, _, path = mutation.where.partition(":")
    function: Any = importlib.import_module(module)
    for part in path.split("."):
        function = inspect.getattr_static(function, part)
    function = getattr(function, "__func__", function)  # of a static method
    file = mutation.file(ROOT)
    changed = _code(compile(mutation.patch(file.read_text()), str(file), "exec", dont_inherit=True), path)
    before, function.__code__ = function.__code__, changed
    try:
        yield
    finally:
        function.__code__ = before


def _code(within: CodeType, path: str) -> CodeType:
    """The code of a function by its qualified name."""
    for code in (x for x in within.co_consts if isinstance(x, CodeType)):
        if code.co_qualname == path:
            return code
        if path.startswith(f"{code.co_qualname}."):
            return _code(code, path)
    raise LookupError(path)
