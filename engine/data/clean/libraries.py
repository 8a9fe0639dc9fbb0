"""Optional packages, imported by the rule that needs them before any work is done."""

from __future__ import annotations

import importlib
from typing import Any

from engine.errors import DataError


def require_package(
    package: str, option: str, install_hint: str = "Install the extra: pip install 'trident-engine[clean]'"
) -> Any:
    """Import a package. Raises DataError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as err:
        raise DataError(
            "clean.package-missing",
            f"{option} needs the package {package.partition('.')[0]}, which cannot be imported ({err}). "
            f"{install_hint}.",
        ) from err
