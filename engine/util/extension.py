"""Loads the C++ extensions, reports why one cannot be used, and warns about it in one line."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

from engine.util.build_notes import how_to_build, why_not_built


def _open_module(name: str) -> tuple[Any, str]:
    """(module, its version "interface N"), from its attribute `interface`; 0 if it has none."""
    module = importlib.import_module(name)
    return module, f"interface {getattr(module, 'interface', 0)}"


def load(name: str, wanted: str, open_: Callable[[str], tuple[Any, str]] = _open_module) -> tuple[Any, str]:
    """(the extension, "") or (None, the reason): not built, cannot be loaded, or built for another engine version.

    wanted: the version that the engine needs, such as "interface 4"; a build for which `open_` returns another one is
    not used.
    """
    if importlib.util.find_spec(name) is None:
        why = why_not_built(name)
        return None, f"{name} is not built ({why})" if why else f"{name} is not built"
    try:
        extension, found = open_(name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return None, f"{name} cannot be loaded: {(str(error) or type(error).__name__).splitlines()[0]}"
    return (extension, "") if found == wanted else (None, f"{name} was built for {found}, this is {wanted}")


def warn(why: str, instead: str) -> None:
    """Warn the user in one line: why an extension is not used, the fallback, and the command that builds it."""
    warnings.warn(f"{why}: {instead}; {how_to_build()}", stacklevel=6)
