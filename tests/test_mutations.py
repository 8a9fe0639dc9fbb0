"""The mutation runner: every mutation still fits the code; a caught, a surviving and a broken one are told apart."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import MUTATIONS, ROOT, Mutation, judge

BY_NAME = {mutation.name: mutation for mutation in MUTATIONS}


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(MUTATIONS) >= 24


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_it_fits_the_code_once(mutation: Mutation, tmp_path: Path) -> None:
    """So a change of the code that leaves a mutation behind shows here, in a moment, with its name."""
    target = tmp_path / mutation.file
    target.parent.mkdir(parents=True)
    shutil.copy(ROOT / mutation.file, target)
    mutation.apply(tmp_path)
    compile(target.read_text(), mutation.file, "exec")
    for test in mutation.tests:
        path, _, rest = test.partition("::")
        assert f"def {rest.partition('[')[0]}(" in (ROOT / path).read_text(), test


SCRIPT = """
import json, sys
from dataclasses import asdict, replace
import mutations as m
known = {x.name: x for x in m.MUTATIONS}["bf16_without_masters"]
tried = [known, *(replace(known, name=new, new=new) for new in (known.old, "bucket.part(", "no_such_name(master)"))]
tried.append(replace(known, name="old", old="no such text"))
m.WARM = "torch hypothesis torch.utils.flop_counter"
m.warm()
json.dump({x.name: [x.caught, x.by] for x in m.attempt(tried)}, sys.stdout)
"""


@pytest.mark.timeout(300)
def test_a_fault_is_caught_and_told_from_survivors_and_broken_ones() -> None:
    """In a process of its own: the runner forks, and must not have the engine imported when it does."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT / "tests", capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found.pop("bf16_without_masters") == [True, "test_optim.py::test_bf16_does_not_lose_tiny_updates"]
    assert found.pop(BY_NAME["bf16_without_masters"].old) == [False, "SURVIVED"]
    assert {name: caught for name, (caught, _) in found.items()} == dict.fromkeys(found, False)
    assert found["bucket.part("][1].startswith("BROKEN: pytest exit code")
    assert found["no_such_name(master)"][1].startswith("BROKEN: E")
    assert "occurs 0 times in engine/optim/adamw.py" in found["old"][1]


def test_a_silent_hang_is_not_caught() -> None:
    assert judge(None, "") == (False, "HANG of 400 s without a word from the harness")
