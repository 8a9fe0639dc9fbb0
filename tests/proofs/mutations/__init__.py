"""Mutation tests: faults that other engines had, injected one at a time by a small patch; a test has to catch each.

    python -m tests.proofs.mutations                        # all of them (`make test-mutations`)
    python -m tests.proofs.mutations --only tied_gradient_counted_twice
    python -m tests.proofs.mutations --zoo                  # the bugs of other projects (docs/zoo.md)
    python -m tests.proofs.mutations --without-extensions   # as if no extension were built

A test that cannot fail proves nothing; the share of caught mutations measures the quality of the tests. Each mutation
names a function and a statement or expression in it, and raises an error if the code no longer has it (`patch.py`).
The modules here are named after the package with the fault; `draws` after the idea. A mutation is applied to a copy of
the repository in a temporary folder, where the named tests must pass without it and fail by an assertion with it. A
mutation that cannot be imported or raises another error counts as broken, and so does a silent hang (`trial.py`).

Where both a custom kernel and torch implement an operation, a fault in one is hidden while the other runs, so such a
mutation declares its `path`. Faults of the torch path always run without the extensions, faults of the kernels' path
with them; without built extensions the latter are listed as not tried.

`threads` cites where other projects had the fault; without one, it is a common fault. `zoo` writes docs/zoo.md from it.
"""

from __future__ import annotations

from . import (
    checkpoint,
    config,
    data,
    distributed,
    draws,
    interop,
    model,
    ops,
    optim,
    parallel,
    pipeline,
    planner,
    proof,
    train,
)

_PACKAGES = (
    config,
    distributed,
    draws,
    ops,
    parallel,
    model,
    optim,
    pipeline,
    planner,
    data,
    train,
    checkpoint,
    interop,
    proof,
)
MUTATIONS = [mutation for package in _PACKAGES for mutation in package.MUTATIONS]
