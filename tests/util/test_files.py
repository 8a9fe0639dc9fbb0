"""Bounded reads of small files, and of JSON."""

from __future__ import annotations

import os
from pathlib import Path

import orjson
import pytest

from engine.util.files import read_json, read_regular


def test_a_json_file_gives_its_value(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'{"a": [1, "\xc3\xa9"]}')
    (tmp_path / "link").symlink_to("a")
    for path in (tmp_path / "a", tmp_path / "link"):
        assert read_json(path) == read_json(path, loads=orjson.loads) == {"a": [1, "é"]}
    assert read_regular(tmp_path / "a", 16) == (tmp_path / "a").read_bytes()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a": 1} 2'])
def test_what_is_no_json_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError):
        read_json(tmp_path / "a")


def test_what_has_no_end_is_not_read(tmp_path: Path) -> None:
    """Reading a pipe would block; a file may be too large for memory."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"[" + b"1," * 50 + b"1]")
    for name in ("pipe", "large", "none", "."):
        with pytest.raises(OSError, match=name.replace(".", str(tmp_path))):
            read_json(tmp_path / name, 100)
