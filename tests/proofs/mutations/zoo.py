"""Writes docs/zoo.md from the mutations that cite a thread: `python -m tests.proofs.mutations.zoo`.

A test of test_mutations.py fails if the page is out of date.
"""

from __future__ import annotations

from collections import Counter

from tests.proofs.located import FAULTS

from . import MUTATIONS
from .patch import ROOT, Mutation
from .trial import node_id

PAGE = ROOT / "docs/zoo.md"
MIN_BUGS = 60
# kind of test -> what it compares, and its modules
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "equivalence": (
        "losses, gradients, norms and weights of a layout with those of one process, or of one process with those of "
        "plain torch, in float64",
        (
            "test_equivalence",
            "test_shapes",
            "test_rules",
            "test_dropout",
            "test_documents",
            "test_evaluate",
            "test_parts",
        ),
    ),
    "bitwise": (
        "two runs that must not differ in a bit: resumed or not, with recomputation or not, saved at once or later",
        ("test_bitwise", "test_reproducible", "test_async_save", "test_loader", "test_groups"),
    ),
    "reference": (
        "one operation or one number with another implementation: transformers, plain torch, a formula by hand",
        ("test_ops", "test_draws", "test_attention", "test_weights", "test_optim", "test_order"),
    ),
    "behaviour": ("what the engine does with what a rule says: files, errors, counts", ()),
}
_HEAD = """# The zoo

{count} bugs that other projects had, injected into this engine one at a time. For each, a test that passes without the
bug has to fail with it:

```bash test
python -m tests.proofs.mutations --only only_the_last_microbatch_trained
```

All of them, on a copy of the repository in a temporary folder; the exit code is 1 if one is not caught:

    python -m tests.proofs.mutations --zoo

A bug is a mutation: a function of the engine, an expression or statement in it, and what replaces it
(`tests/proofs/mutations/`). The threads are issues and pull requests where the bug was reported or fixed. The engine
has other code than that project, so a mutation has the effect of the bug, not its text. Mutations that cite no thread
are not listed. `python -m tests.proofs.mutations.zoo` writes this page.

| caught by | compares | bugs |
|---|---|---|
{kinds}

"Located": the bug changes a value of a step, and [`engine diff`](proofs.md#first-difference) finds it without a test.
`python -m tests.proofs.located` fails unless the first difference is at the operation or layer with the bug for nine of
ten such mutations.

## Bugs

| bug | threads | injected into | caught by | located |
|---|---|---|---|---|
{rows}
"""


def zoo() -> list[Mutation]:
    """The mutations that cite a thread, in the order of the packages."""
    return [mutation for mutation in MUTATIONS if mutation.threads]


def kind_of(test: str) -> str:
    """The kind of a test, from its module."""
    module = node_id(test).partition("::")[0].rpartition("/")[2].removesuffix(".py")
    return next((kind for kind, (_, modules) in KINDS.items() if module in modules), "behaviour")


def page() -> str:
    """The text of docs/zoo.md."""
    bugs = zoo()
    counts = Counter(kind_of(bug.tests[0]) for bug in bugs)
    kinds = [f"| {kind} | {what} | {counts[kind]} |" for kind, (what, _) in KINDS.items()]
    return _HEAD.format(count=len(bugs), kinds="\n".join(kinds), rows="\n".join(map(_row, bugs)))


def _row(bug: Mutation) -> str:
    links = ", ".join(_link(thread) for thread in bug.threads)
    kind, function = kind_of(bug.tests[0]), bug.tests[0].rpartition("::")[2].partition("[")[0]
    located = "yes" if bug.name in FAULTS else ""
    return f"| {bug.why} | {links} | `{bug.where.removeprefix('engine.')}` | {kind}: `{function}` | {located} |"


def _link(thread: str) -> str:
    """GitHub redirects /issues/N to /pull/N for pull requests."""
    repository, _, number = thread.partition("#")
    return f"[{thread}](https://github.com/{repository}/issues/{number})"


if __name__ == "__main__":
    PAGE.write_text(page())
