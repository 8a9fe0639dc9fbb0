"""Why an extension is not there: what `setup.py` noted when the package was built."""

from __future__ import annotations

import json
from pathlib import Path

_NOTES = Path(__file__).with_name("_build.json")


def why_not(what: str) -> str:
    """Why "engine._index", "engine._ops" or "cuda" (its CUDA kernels) was not built; "" if nothing is known."""
    try:
        notes = json.loads(_NOTES.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    why = notes.get(what, "") if isinstance(notes, dict) else ""
    return why if isinstance(why, str) else ""
