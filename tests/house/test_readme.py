"""The first pages: both READMEs say the same, the pictures are up to date, and the pages name what exists.

Each comparison is a function from texts to complaints; the pages have none, a planted fault has one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.cli.main import _VERBS
from tests.proofs.mutations import MUTATIONS
from tests.support.paths import ROOT
from tools import house_picture, step_picture

README, CHINESE, INDEX = ROOT / "README.md", ROOT / "README.zh.md", ROOT / "docs/index.md"
README_LINES = 120
# The packages of the core and its budget of lines, as tests/test_house.py counts them.
_HOUSE = (ROOT / "tests/test_house.py").read_text(encoding="utf-8")
CORE = ast.literal_eval(re.findall(r"^CORE = (\(.*?\))$", _HOUSE, re.M | re.S)[0])
CORE_LINES = int(re.findall(r"^CORE_LINES = ([\d_]+)$", _HOUSE, re.M)[0])
# Pages whose `paths` and `path: names` are looked up.
MAPS = ("CONTRIBUTING.md", "docs/architecture.md")
# The field's usual terms, which the texts use and the glossary explains.
FIELD_TERMS = (
    *("micro-batch", "global batch", "gradient accumulation", "packed sequence", "document masking", "loss mask"),
    *(
        "all-gather",
        "reduce-scatter",
        "all-reduce",
        "point-to-point",
        "sequence parallelism",
        "replicated",
        "tied stages",
    ),
    *(
        "activation recomputation",
        "recompute policy",
        "recompute recipe",
        "compute backends",
        "custom kernel",
        "matmul",
    ),
    *(
        "bucket",
        "master weights",
        "state shard",
        "warm-up",
        "skip a step",
        "shard",
        "checkpoint",
        "resume",
        "cu_seqlens",
    ),
    *(
        "tokenizer",
        "vocabulary",
        "saved for backward",
        "transport",
        "schedule",
        "plan",
        "pass",
        "stage",
        "rank",
        "axis",
    ),
)


def blocks(text: str) -> list[str]:
    """The fenced blocks of a page, with their language."""
    return re.findall(r"^```(.*?)^```", text, re.M | re.S)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def tables(text: str) -> list[tuple[int, list[str]]]:
    """Of every table row: the number of its cells, and the numbers in it."""
    rows = [line for line in without_blocks(text).splitlines() if line.startswith("|")]
    return [(len(re.split(r"(?<!\\)\|", row)), re.findall(r"\d+(?:[.,]\d+)*", row)) for row in rows]


def headings(text: str) -> list[int]:
    return [len(marks) for marks in re.findall(r"^(#+) ", without_blocks(text), re.M)]


def links(text: str) -> list[str]:
    """Where links and pictures lead, in any order; the link to the other language aside."""
    return sorted(set(re.findall(r"\]\(([^)]+)\)", text)) - {README.name, CHINESE.name})


def commands(text: str) -> list[str]:
    """The `commands` within sentences."""
    inline = re.findall(r"`([^`\n]+)`", without_blocks(text))
    return sorted({code for code in inline if re.match(r"(make|engine|pip|sbatch|\.) ", code)})


def translated(original: str, other: str) -> Iterator[str]:
    """In what a translation differs from its original."""
    for name, part in (
        ("blocks", blocks),
        ("tables", tables),
        ("headings", headings),
        ("links", links),
        ("commands", commands),
    ):
        if part(original) != part(other):
            yield name


def test_both_readmes_have_the_same_commands_tables_headings_and_links() -> None:
    original, other = README.read_text(encoding="utf-8"), CHINESE.read_text(encoding="utf-8")
    assert list(translated(original, other)) == []
    assert len(blocks(original)) >= 4 and len(tables(original)) >= 10 and len(commands(original)) >= 5


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("--microbatches 8", "--microbatches 9", "blocks"),
        ("| 236 | 122 |", "| 237 | 122 |", "tables"),
        ("\n## ", "\n### ", "headings"),
        ("docs/glossary.md", "docs/words.md", "links"),
        ("`make test`", "`make check`", "commands"),
    ],
)
def test_a_planted_difference_between_the_readmes_is_found(old: str, new: str, part: str) -> None:
    original, other = README.read_text(encoding="utf-8"), CHINESE.read_text(encoding="utf-8")
    assert old in other
    assert list(translated(original, other.replace(old, new))) == [part]


@pytest.mark.parametrize("page", [README, CHINESE], ids=lambda page: str(page.name))
def test_the_readme_is_short_and_names_the_budget_of_the_core(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("\n") < README_LINES
    assert f"{CORE_LINES:,}" in text


def test_the_index_names_every_page_and_every_command() -> None:
    text = INDEX.read_text(encoding="utf-8")
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} - {INDEX.name}
    assert {page for page in pages if f"]({page})" not in text} == set()
    assert [verb for verb in _VERBS if f"`engine {verb}" not in text] == []


def named(text: str) -> Iterator[tuple[str, str]]:
    """Each `path` of a page, and the name after it where that says `path: name` ("" otherwise).

    Paths are from the root, from engine/, or from a folder that the page has named before.
    """
    bases = [ROOT, ROOT / "engine"]
    for code in re.findall(r"`([^`\n]+)`", without_blocks(text)):
        path, _, name = code.partition(": ")
        for word in path.split():
            if "NAME" in word or not re.fullmatch(r"[\w.]+(/[\w.]+)*(\.(py|cpp|cu|h|md|toml|txt|slurm|sh)|/)", word):
                continue
            found = next((base / word for base in bases if (base / word).exists()), None)
            if found is not None:
                bases += [found if found.is_dir() else found.parent]
            yield (str(found.relative_to(ROOT)) if found else word), name


def missing(text: str) -> list[str]:
    """The paths of a page that do not exist, and the names that their file does not have."""
    out = []
    for path, name in named(text):
        if not (ROOT / path).exists():
            out.append(path)
        elif name and not all(re.search(rf"\b{part}\b", (ROOT / path).read_text()) for part in name.split(".")):
            out.append(f"{path}: {name}")
    return out


@pytest.mark.parametrize("page", MAPS)
def test_the_places_that_a_page_names_exist(page: str) -> None:
    assert missing((ROOT / page).read_text(encoding="utf-8")) == []


def test_a_planted_place_is_missing() -> None:
    assert all(len(list(named((ROOT / page).read_text()))) > 60 for page in MAPS)
    text = "`engine/optim/adam.py` and `engine/train/step.py: train_steps`, `batch.py: micro_batches`"
    assert missing(text) == ["engine/optim/adam.py", "engine/train/step.py: train_steps"]


def test_the_commands_for_contributors_name_what_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = re.findall(r"mutations --only (\w+)", text)
    assert names and set(names) <= {mutation.name for mutation in MUTATIONS}
    targets = set(re.findall(r"`make ([\w-]+)`", text))
    assert targets and all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets)
    tests, word = re.findall(r"pytest -q (\S+) -k (\w+)", text)[0]
    assert f"def test_{word}" in (ROOT / tests).read_text() or re.search(
        rf"def test_\w*{word}", (ROOT / tests).read_text()
    )


def test_a_pull_request_states_equal_loss() -> None:
    assert "**Equal loss**" in (ROOT / ".github/pull_request_template.md").read_text(encoding="utf-8")


def test_every_term_of_the_glossary_stands_once() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs/glossary.md").read_text(encoding="utf-8"), re.M)
    terms = [row for row in rows if row != "term"]
    assert len(terms) == len(set(terms)) > 80
    assert [term for term in FIELD_TERMS if not any(term in row for row in rows)] == []


def test_the_picture_of_the_house_is_up_to_date() -> None:
    drawn = house_picture.PICTURE.read_text(encoding="utf-8")
    assert drawn == house_picture.svg(house_picture.imports()), "run python tools/house_picture.py"


def test_the_picture_of_the_house_draws_imports_downwards(tmp_path: Path) -> None:
    graph = house_picture.imports()
    row = {box: number for number, boxes in enumerate(house_picture.rows_of(graph)) for box in boxes}
    assert all(row[a] >= row[b] for a in graph for b in graph[a])
    packages = {path.parent.name for path in (ROOT / "engine").glob("*/__init__.py")}
    assert packages <= set(graph) == set(house_picture.TEXTS)
    assert all(h.removesuffix(".py") in house_picture.CORE for h in CORE)
    for name in ("optim/a.py", "optim/__init__.py", "model/b.py"):
        (tmp_path / "engine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "engine" / name).write_text("from engine.model.b import x\n" if name == "optim/a.py" else "")
    assert house_picture.imports(tmp_path) == {"model": set(), "optim": {"model"}}


def test_the_picture_of_a_step_is_up_to_date_and_names_what_exists() -> None:
    assert step_picture.PICTURE.read_text(encoding="utf-8") == step_picture.svg(), "run python tools/step_picture.py"
    for file, name in (box.place for box in step_picture.BOXES):
        assert re.search(rf"\b(class|def) {name}\b", (ROOT / "engine" / file).read_text()), f"{file}: {name}"
