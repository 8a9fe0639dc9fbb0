"""The C++ extensions: the one way to load one, to say why it cannot be used, and to warn of that in one line."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

from engine.util.build_notes import how_to_build, why_not_built


def _open_module(name: str) -> tuple[Any, str]:
    """A Python module and what it was built for: its attribute `interface`, 0 where it has none."""
    module = importlib.import_module(name)
    return module, f"interface {getattr(module, 'interface', 0)}"


def load(name: str, wanted: str, open_: Callable[[str], tuple[Any, str]] = _open_module) -> tuple[Any, str]:
    """(the extension, "") or (None, why it cannot be used): not built, does not load, or built for another engine.

    wanted: what the engine calls, such as "interface 4"; a build that `open_` finds to be for anything else is refused.
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
    """One line for the user: why an extension is not used, what runs instead, and the command that builds it."""
    warnings.warn(f"{why}: {instead}; {how_to_build()}", stacklevel=6)
