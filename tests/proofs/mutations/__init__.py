"""Mutations: faults that peers really had, put in one at a time by a small patch, each to be caught by a test.

    python -m tests.proofs.mutations                        # all of them (`make test-mutations`)
    python -m tests.proofs.mutations --only tied_gradient_counted_twice
    python -m tests.proofs.mutations --without-extensions   # the same where nothing is built

A test that cannot fail proves nothing; this is the figure for how good the tests are. Every mutation names a function
and a statement or an expression in it, and says so when the code has moved on (`patch.py`). The tables are named by
the room that the fault is in. A mutation is applied to a copy of the repository in a temporary folder, where the named
tests must pass without it and fail by an assertion with it: a mutation that cannot be imported, or that stops in an
error of its own, counts as broken, and so does a silent hang (`trial.py`).
Where a kernel of ours and plain torch do the same, a fault in one is hidden while the other runs: such a mutation says
which `path` it is on. Faults of the torch path are tried without the built extensions, always; those of the kernels'
path with them, and where there are none they are named as not tried.
The issues are those that the faults come from; where none is given, the fault is a classic that has many.
"""

from __future__ import annotations

from . import checkpoint, data, distributed, interop, model, ops, optim, parallel, pipeline, train

_ROOMS = (distributed, ops, parallel, model, optim, pipeline, data, train, checkpoint, interop)
MUTATIONS = [mutation for room in _ROOMS for mutation in room.MUTATIONS]
