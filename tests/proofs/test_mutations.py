"""Mutations: all fit the code; errors explain a misfit; caught, surviving and broken mutations are distinguished."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.proofs.mutations import MUTATIONS, zoo
from tests.proofs.mutations.patch import ROOT, Mutation
from tests.proofs.mutations.trial import judge, node_id

BY_NAME = {mutation.name: mutation for mutation in MUTATIONS}


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(MUTATIONS) >= 90


def test_the_page_of_the_zoo_is_that_of_the_mutations() -> None:
    """A bug of another project is a mutation that cites threads; its tests are of one kind, which the page names."""
    bugs = zoo.zoo()
    assert len(bugs) >= zoo.MIN_BUGS
    for bug in bugs:
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#[1-9]\d*", thread) for thread in bug.threads), bug.name
        assert len({zoo.kind_of(test) for test in bug.tests}) == 1, bug.name
        assert "#" not in bug.why and "|" not in bug.why, f"{bug.name}: threads are a field of their own"
    named = [thread for bug in bugs for thread in bug.threads]
    assert len(set(named)) >= zoo.MIN_BUGS
    assert zoo.PAGE.read_text() == zoo.page(), "run `python -m tests.proofs.mutations.zoo`"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_every_mutation_fits_and_changes_the_code(mutation: Mutation) -> None:
    """A change of the code that makes a mutation obsolete fails here, quickly and with its name."""
    source = mutation.file(ROOT).read_text()
    faulty = ast.dump(ast.parse(mutation.patch(source)))
    assert faulty != ast.dump(ast.parse(source))
    reformatted = ast.unparse(ast.parse(source))  # no comments, other quotes, other lines
    assert ast.dump(ast.parse(mutation.patch(reformatted))) == faulty
    for test in mutation.tests:
        assert (ROOT / node_id(test).partition("::")[0]).is_file()


def test_the_cases_that_catch_them_exist() -> None:
    """A case that was renamed or has new parameters fails here, not only in a run of the mutations."""
    ids = sorted({node_id(test) for mutation in MUTATIONS for test in mutation.tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:xdist", *ids]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert collected.returncode == 0, collected.stderr


SOURCE = """
class Öfen:
    def heat(self, x):
        # why
        self.ü = {"ä": x * (2 + 1)}; return self.total(x,
            x * (2
                 + 1))

    def total(self, *values):
        def first(x):
            return f"{x}" + x
        if values:
            values.sort()
        return sum(v for v in values)
"""


def planted(function: str, old: str, new: str, nth: tuple[int, int] = (1, 1)) -> Mutation:
    return Mutation("planted", "", f"engine.kitchen:{function}", old, new, (), nth)


@pytest.mark.parametrize(
    ("mutation", "text", "patched"),
    [
        (planted("Öfen.heat", "x*(2+1)", "x if x else 1", (1, 2)), "x * (2 + 1)", "(x if x else 1)"),
        (planted("Öfen.heat", "x * (2 + 1)", "0", (2, 2)), "x * (2\n                 + 1)", "(0)"),
        (planted("Öfen.heat", 'self.ü = {"ä": x * (2 + 1)}', "pass"), 'self.ü = {"ä": x * (2 + 1)}', "pass"),
        (planted("Öfen.total", "values.sort()", "pass"), "values.sort()", "pass"),
        (
            planted("Öfen.total", "values.sort()", "if values[1:]:\n    values.sort()"),
            "values.sort()",
            "if values[1:]:\n                values.sort()",
        ),
        (planted("Öfen.total", "(v for v in values)", "values"), "(v for v in values)", "(values)"),
        (planted("Öfen.total.first", "x", "1"), "+ x", "+ (1)"),
    ],
)
def test_a_patch_changes_what_it_names_and_no_other_text(mutation: Mutation, text: str, patched: str) -> None:
    number = mutation.nth[0] if text in mutation.old else 1
    parts = SOURCE.split(text)
    expected = text.join(parts[:number]) + patched + text.join(parts[number:])
    assert mutation.patch(SOURCE) == expected
    ast.parse(expected)


@pytest.mark.parametrize(
    ("mutation", "complaint"),
    [
        (planted("Öfen.cool", "x", "1"), "engine.kitchen has 0 functions Öfen.cool, not one"),
        (planted("heat", "x", "1"), "engine.kitchen has 0 functions heat, not one"),
        (planted("Öfen.heat", "x - 1", "1"), "engine.kitchen:Öfen.heat has 0 of `x - 1`, not 1"),
        (planted("Öfen.heat", "x * (2 + 1)", "1"), "engine.kitchen:Öfen.heat has 2 of `x * (2 + 1)`, not 1"),
        (planted("Öfen.heat", "x * (2 + 1)", "1", (2, 3)), "engine.kitchen:Öfen.heat has 2 of `x * (2 + 1)`, not 3"),
        (planted("Öfen.total", "return values", "pass"), "engine.kitchen:Öfen.total has 0 of `return values`, not 1"),
    ],
)
def test_a_misfit_is_explained(mutation: Mutation, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(LookupError) as missing:
        mutation.file(tmp_path)
    assert "there is no module engine.kitchen" in str(missing.value)
    (tmp_path / "engine/kitchen").mkdir(parents=True)
    (tmp_path / "engine/kitchen/__init__.py").write_text(SOURCE)
    with pytest.raises(LookupError) as unfit:
        mutation.apply(tmp_path)
    assert f"mutation planted: {complaint}" in str(unfit.value)


def test_an_ambiguous_function_is_an_error() -> None:
    with pytest.raises(LookupError, match=r"engine\.kitchen has 2 functions Öfen\.total, not one"):
        planted("Öfen.total", "values.sort()", "pass").patch(SOURCE + "    def total(self): ...\n")


@pytest.mark.parametrize(
    ("test", "complaint"),
    [
        ("test_no_such_thing[1]", "found in no module"),
        ("test_kitchen::test_names_are_unique", "found in no module"),
        ("test_layout_equals_one_process[x]", "test_shapes.py"),
    ],
)
def test_an_unknown_or_ambiguous_test_is_an_error(test: str, complaint: str) -> None:
    with pytest.raises(LookupError) as error:
        node_id(test)
    assert complaint in str(error.value)


SCRIPT = """
import json, sys
from dataclasses import replace
from tests.proofs.mutations import MUTATIONS, trial
known = {x.name: x for x in MUTATIONS}["bf16_without_masters"]
tried = [known, *(replace(known, name=new, new=new) for new in (known.old, "await master", "no_such_name(master)"))]
tried.append(replace(known, name="old", old="no_such_text"))
trial.PRELOADED = "torch hypothesis torch.utils.flop_counter"
trial.preload()
json.dump({x.name: [x.caught, x.by] for x in trial.attempt(tried)}, sys.stdout)
"""


@pytest.mark.timeout(300)
def test_caught_surviving_and_broken_mutations_are_distinguished() -> None:
    """In a separate process, because the runner forks and must not have imported the engine."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    found = json.loads(done.stdout)
    known = BY_NAME["bf16_without_masters"]
    assert found.pop(known.name) == [True, node_id(known.tests[0]).removeprefix("tests/")]
    assert found.pop(known.old) == [False, "SURVIVED"]
    assert {name: caught for name, (caught, _) in found.items()} == dict.fromkeys(found, False)
    assert found["await master"][1].startswith("BROKEN: pytest exit code")
    assert found["no_such_name(master)"][1].startswith("BROKEN: E")
    assert "has 0 of `no_such_text`" in found["old"][1]


def test_a_silent_hang_is_not_caught() -> None:
    assert judge(None, "") == (False, "HANG of 400 s without a report from the harness")
