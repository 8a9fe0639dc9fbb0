"""What a run writes besides checkpoints: in UTF-8, through no link, and never at the cost of the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_names_and_output_are_utf8_whatever_the_locale(tmp_path: Path) -> None:
    """With PYTHONUTF8=0 in the C locale, Python itself takes everything for ASCII."""
    (tmp_path / "größe.toml").write_text('[run]\ndir = "läufe/größe"\n', encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "engine", "train", "--config", "größe.toml", "--data.train", "döcs", "--dry-run"],
        cwd=tmp_path,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(name.encode() in done.stdout for name in ("größe.toml", "läufe/größe", "döcs"))
