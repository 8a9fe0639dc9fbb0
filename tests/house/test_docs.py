"""The documentation does what it says: every block marked `bash test` is run, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import BIN, ROOT

PAGES = [
    "README.md",
    "docs/data.md",
    "docs/cleaning.md",
    "docs/training.md",
    "docs/library.md",
    "docs/parallelism.md",
    "docs/schedules.md",
    "docs/multinode.md",
    "docs/checkpoints.md",
    "docs/huggingface.md",
    "docs/reliability.md",
    "docs/coming_from.md",
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page(page: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The README's as a user runs them, all others in processes that start fast."""
    blocks = re.findall(r"^```bash test\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    assert blocks, f"{page} shows no command that is tested"
    for name in ("docs", "examples", "tools", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = [] if page == "README.md" else [request.getfixturevalue("warm")]
    path = ":".join(map(str, [*commands, BIN, os.environ["PATH"]]))
    script = "set -euo pipefail\n" + "\n".join(blocks)
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_folder_of_the_engine_is_in_the_map() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    folders = [p.parent.name for p in (ROOT / "engine").glob("*/__init__.py")]
    assert folders and all(f"`engine/{name}/`" in text for name in folders)


def test_tables_have_as_many_cells_in_every_row() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        width = 0
        for number, line in enumerate(page.read_text().splitlines(), 1):
            cells = len(re.split(r"(?<!\\)\|", line)) if line.startswith("|") else 0
            assert not width or not cells or cells == width, f"{page.name}:{number}: {cells} cells, not {width}"
            width = cells
