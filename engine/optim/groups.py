"""Parameter groups: which rule, learning-rate factor and weight decay a parameter has, and whether it is frozen.

`optimizer.groups` selects parameters by canonical name and role; the first row that matches a parameter wins. Those
that no row matches have the settings of the optimizer section: weight decay for all but vectors. Needs no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from engine.config.group_table import GroupConfig
from engine.config.schema import OptimizerConfig
from engine.distributed.specs import Role, ShardSpec
from engine.errors import FieldError
from engine.optim.update_rules import RULES


@dataclass(frozen=True)
class ParameterGroup:
    """How some parameters are updated. row: number of the row in optimizer.groups, 0 if no row matches them.

    rule: name in RULES. lr_factor: factor of the learning rate. frozen: not updated at all.
    """

    row: int
    rule: str
    lr_factor: float
    weight_decay: float
    frozen: bool = False

    @property
    def states(self) -> tuple[str, ...]:
        """The kinds of optimizer state that these parameters have."""
        return () if self.frozen else RULES[self.rule].states

    @property
    def whole_matrices(self) -> bool:
        """Whether the rule updates whole canonical tensors, so that a replica owns whole parameters."""
        return not self.frozen and RULES[self.rule].whole_matrices


def group_of(spec: ShardSpec, cfg: OptimizerConfig) -> ParameterGroup:
    """The group of a parameter: that of the first row of optimizer.groups that matches all its canonical tensors."""
    usual = 0.0 if spec.role is Role.VECTOR else cfg.weight_decay
    for number, row in enumerate(cfg.groups, 1):
        if all(_matches(row, chunk.name, spec.role) for chunk in spec.chunks):
            if row.frozen:
                return ParameterGroup(number, cfg.rule, 1.0, 0.0, frozen=True)
            decay = usual if row.weight_decay is None else row.weight_decay
            return ParameterGroup(number, row.rule or cfg.rule, row.lr_factor, decay)
    return ParameterGroup(0, cfg.rule, 1.0, usual)


def _matches(row: GroupConfig, name: str, role: Role) -> bool:
    by_name = not row.names.split() or any(fnmatchcase(name, pattern) for pattern in row.names.split())
    return by_name and row.role in ("", role.value)


def row_errors(cfg: OptimizerConfig) -> Iterator[FieldError]:
    """The errors of the optimizer section that do not depend on the model."""
    rules = {"optimizer.rule": cfg.rule}
    rules |= {f"optimizer.groups.{number}.rule": row.rule for number, row in enumerate(cfg.groups, 1) if row.rule}
    for path, name in rules.items():
        if name not in RULES:
            near = difflib.get_close_matches(name, RULES, n=1, cutoff=0.0)[0]
            problem = f"is not one of {', '.join(RULES)}"
            yield FieldError("optim.unknown-rule", path, name, problem, f"Did you mean {near}?")
    for number, row in enumerate(cfg.groups, 1):
        at = f"optimizer.groups.{number}"
        if not row.names.split() and not row.role:
            fix = 'Give names, for example "embed.weight", or role, for example vector; names "*" are all.'
            yield FieldError("optim.group-selects-nothing", at, "", "has neither names nor role", fix)
        given = {"lr_factor": row.lr_factor != 1, "weight_decay": row.weight_decay is not None, "rule": row.rule}
        for name in given:
            if row.frozen and given[name]:
                problem = "has no effect on frozen parameters"
                yield FieldError(
                    "optim.frozen-has-no-rate", f"{at}.{name}", getattr(row, name), problem, "Leave it out."
                )
        if not (row.frozen or any(given.values())):
            fix = "Give lr_factor, weight_decay, frozen or rule."
            yield FieldError("optim.group-changes-nothing", at, row.names or row.role, "changes no setting", fix)


def group_errors(specs: Sequence[ShardSpec], cfg: OptimizerConfig) -> Iterator[FieldError]:
    """The errors of optimizer.groups for a whole model. specs: of all its parameters."""
    roles = {chunk.name: spec.role for spec in specs for chunk in spec.chunks}
    earlier: set[str] = set()
    for number, row in enumerate(cfg.groups, 1):
        at = f"optimizer.groups.{number}"
        found = {name for name, role in roles.items() if _matches(row, name, role)}
        yield from _pattern_errors(at, row, roles)
        for spec in specs:
            names = [chunk.name for chunk in spec.chunks]
            if row.names and 0 < len(found & set(names)) < len(names):
                inside, outside = (", ".join(n for n in names if (n in found) is one) for one in (True, False))
                problem = f"matches {inside} but not {outside}, which are stored and updated together"
                fix = "Match all of them or none, for example with layers.*.attention.*."
                yield FieldError("optim.group-splits-a-parameter", f"{at}.names", row.names, problem, fix)
                break
        if found and found <= earlier:
            fix = "The first row that matches wins: put the narrower row first."
            problem = "matches only tensors that earlier rows match"
            yield FieldError("optim.group-has-no-effect", at, row.names or row.role, problem, fix)
        earlier |= found
    if specs and all(group_of(spec, cfg).frozen for spec in specs):
        fix = "Leave at least one parameter trainable, or use engine evaluate."
        yield FieldError("optim.everything-frozen", "optimizer.groups", "frozen", "freezes every parameter", fix)


def _pattern_errors(at: str, row: GroupConfig, roles: dict[str, Role]) -> Iterator[FieldError]:
    """Patterns that match no tensor, and roles that no tensor has."""
    if row.role and row.role not in roles.values():
        tied = row.role == Role.HEAD.value and Role.EMBEDDING in roles.values()
        fix = "The head is the embedding (model.tie_embeddings): use role embedding." if tied else "Use another role."
        yield FieldError("optim.group-matches-nothing", f"{at}.role", row.role, "no tensor of the model has it", fix)
    for pattern in row.names.split():
        if not any(fnmatchcase(name, pattern) for name in roles):
            near = difflib.get_close_matches(pattern, roles, n=1, cutoff=0.0)[0]
            problem = f"no tensor of the model matches {pattern}"
            yield FieldError("optim.group-matches-nothing", f"{at}.names", row.names, problem, f"Nearest: {near}.")
    if row.names and row.role and not any(_matches(row, name, role) for name, role in roles.items()):
        problem = f"no tensor that it matches has role {row.role}"
        yield FieldError("optim.group-matches-nothing", f"{at}.names", row.names, problem, "Omit the role.")
