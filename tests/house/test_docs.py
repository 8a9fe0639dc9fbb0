"""The commands of the documentation work: every block marked `bash test` runs, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import BIN, ROOT

DOCS = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [*sorted(ROOT.glob("*.md")), *DOCS]
PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in DOCS if "```bash test\n" in p.read_text())]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page(page: str, tmp_path: Path, warm: Path) -> None:
    """In processes that start fast; tests/cli starts the installed commands themselves."""
    blocks = re.findall(r"^```bash test\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    assert blocks, f"{page} shows no command that is tested"
    for name in ("docs", "examples", "tools", "tests", "pyproject.toml", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = ":".join(map(str, [warm, BIN, os.environ["PATH"]]))
    script = "set -euo pipefail\n" + "\n".join(blocks)
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_every_page_opens_with_a_command_and_fits_in_a_reading() -> None:
    for page in DOCS:
        text = page.read_text()
        assert text.count("\n") <= 250, f"{page.name} has {text.count(chr(10))} lines"
        if page.parent.name != "lab":  # its commands take too long for a test
            opening, fence, _ = text.partition("```")
            first = text[len(opening) :].startswith("```bash test\n")
            assert fence and first, f"{page.name} opens without a tested command"
            assert opening.count("\n") <= 12 and "\n## " not in opening, f"{page.name}: the first command comes late"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere() -> None:
    for page in TEXTS:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", page.read_text()):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(file), f"{page.name} links to {target}#{anchor}"


def test_every_folder_of_the_engine_is_in_the_map() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    folders = [p.parent.name for p in (ROOT / "engine").glob("*/__init__.py")]
    assert folders and all(f"`engine/{name}/`" in text for name in folders)


def test_tables_have_as_many_cells_in_every_row() -> None:
    for page in TEXTS:
        width = 0
        for number, line in enumerate(page.read_text().splitlines(), 1):
            cells = len(re.split(r"(?<!\\)\|", line)) if line.startswith("|") else 0
            assert not width or not cells or cells == width, f"{page.name}:{number}: {cells} cells, not {width}"
            width = cells
