"""Missing C++ extensions: which, why (`setup.py` recorded it when it built the package), and how to build them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shlex
from pathlib import Path
from urllib.parse import unquote, urlsplit

from engine.util.files import read_json

DISTRIBUTION = "trident-engine"
EXTENSIONS = ("engine._index", "engine._shared", "engine._ops")
_HERE = Path(__file__).parent.parent
_NOTES = _HERE / "_build.json"
_TOOLS = "pip install setuptools wheel pybind11"


def why_not_built(name: str) -> str:
    """Why "engine._index", "engine._shared", "engine._ops" or "cuda" (its kernels) was not built; "" if unknown."""
    try:
        notes = read_json(_NOTES)
    except (OSError, ValueError):
        return ""
    why = notes.get(name, "") if isinstance(notes, dict) else ""
    return why if isinstance(why, str) else ""


def missing_extensions() -> str:
    """One line that names the missing extensions and how to build them; "" if none is missing. Imports none."""
    absent = [name for name in EXTENSIONS if importlib.util.find_spec(name) is None]
    if not absent:
        return ""
    reasons = [f"{name} ({why})" if (why := why_not_built(name)) else name for name in absent]
    return f"not built: {', '.join(reasons)}: the fallbacks are slower; {how_to_build()}"


def how_to_build() -> str:
    """ "build it: COMMAND". The command compiles against the installed torch; pip's isolated build has no torch."""
    tree = _HERE.parent
    if (tree / "setup.py").is_file() and (tree / "csrc").is_dir():
        where = "." if tree == Path.cwd() else shlex.quote(str(tree))
        return f"build it: pip install --no-build-isolation --no-deps -e {where}"
    return f"build it: {_TOOLS} && pip install --no-build-isolation --no-deps --force-reinstall {_source()}"


def _source() -> str:
    """Source of the installed package for pip (direct_url.json, PEP 610); a placeholder if it came from a wheel."""
    try:
        record = importlib.metadata.distribution(DISTRIBUTION).read_text  # always as UTF-8
        fields = json.loads(record("direct_url.json") or "{}")
        url = str(fields.get("url", ""))
    except (importlib.metadata.PackageNotFoundError, AttributeError, OSError, ValueError):
        url = ""
    if not url or url.endswith(".whl"):
        return f"--no-binary {DISTRIBUTION} SOURCE (a folder or .tar.gz with this version's sources)"
    parts = urlsplit(url)
    if parts.scheme == "file":
        return shlex.quote(unquote(parts.path))
    vcs = fields.get("vcs_info")
    return shlex.quote(f"{vcs['vcs']}+{url}@{vcs['commit_id']}" if vcs else url)
