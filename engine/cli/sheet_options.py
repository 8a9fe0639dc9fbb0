"""The options of `engine train --dry-run`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass

from engine.errors import FieldError


@dataclass(frozen=True)
class SheetOptions:
    """What a dry run shows. gpu_memory: GiB of a device, None: not asked. mfu: in percent, for the days of the run.

    explain: a term (planner.sheet.TERMS), "" for none. full: settings with their defaults too.
    """

    gpu_memory: float | None = None
    mfu: float = 40.0
    explain: str = ""
    json: bool = False
    full: bool = False

    def errors(self, *, dry_run: bool) -> Iterator[FieldError]:
        """The errors of these options. dry_run: whether --dry-run is given."""
        for name in () if dry_run else self.__dataclass_fields__:
            value = getattr(self, name)
            if value != getattr(SheetOptions, name):
                option = f"--{name.replace('_', '-')}"
                yield FieldError(
                    "cli.only-a-dry-run", option, value, "has no effect without --dry-run", "Add --dry-run."
                )
        if self.gpu_memory is not None and not 0 < self.gpu_memory < math.inf:
            fix = "Give the GiB of one device, for example 80."
            yield FieldError("cli.not-above-zero", "--gpu-memory", self.gpu_memory, "is not a number above 0", fix)
        if not 0 < self.mfu <= 100:
            yield FieldError("cli.not-a-percentage", "--mfu", self.mfu, "is not in (0, 100]", "The default is 40.")
        if self.explain:
            yield from self._term_errors()

    def _term_errors(self) -> Iterator[FieldError]:
        from engine.planner.sheet import TERMS

        if self.explain not in TERMS:
            near = difflib.get_close_matches(self.explain, TERMS, n=1, cutoff=0.0)[0]
            problem = f"is not one of {', '.join(TERMS)}"
            yield FieldError("cli.unknown-term", "--explain", self.explain, problem, f"Did you mean {near}?")
