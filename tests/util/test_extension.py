"""engine/util/extension.py: which extensions are rejected, and with which message."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.util import build_notes, extension


def test_what_does_not_load_or_was_built_for_another_engine_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its reason in one line; a module that fits is returned."""
    (tmp_path / "broken_extension.py").write_text("raise ImportError('undefined symbol: x\\nand more')")
    (tmp_path / "older_extension.py").write_text("interface = 3")
    (tmp_path / "silent_extension.py").touch()
    (tmp_path / "notes.json").write_text(json.dumps({"no_extension": "no compiler"}))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(build_notes, "_NOTES", tmp_path / "notes.json")
    rejected = {
        "no_extension": "no_extension is not built (no compiler)",
        "other_extension": "other_extension is not built",
        "broken_extension": "broken_extension cannot be loaded: undefined symbol: x",
        "older_extension": "older_extension was built for interface 3, this is interface 4",
        "silent_extension": "silent_extension was built for interface 0, this is interface 4",
    }
    assert {name: extension.load(name, "interface 4") for name in rejected} == {
        n: (None, w) for n, w in rejected.items()
    }
    found, why = extension.load("older_extension", "interface 3")
    assert found is sys.modules["older_extension"] and why == ""
    stand_in = SimpleNamespace()
    assert extension.load("older_extension", "torch 2", lambda name: (stand_in, "torch 2")) == (stand_in, "")


def test_a_warning_is_one_line_with_the_command_that_builds_it() -> None:
    with pytest.warns(UserWarning) as caught:
        extension.warn("engine._x is not built", "the old way runs")
    (text,) = (str(warning.message) for warning in caught)
    assert text == f"engine._x is not built: the old way runs; {build_notes.how_to_build()}" and "\n" not in text
