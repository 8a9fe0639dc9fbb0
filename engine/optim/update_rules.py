"""The update rules that exist, and what each keeps and needs. Needs no torch: config, dry run and memory sheet read it.

To add a rule, write its file and an entry here. `engine.optim.optimizer.Rule` is what a rule implements.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RuleEntry:
    """An update rule.

    maker: "module:name" of a function or class that makes the rule from an OptimizerConfig. states: the kinds of state
    it keeps, each as large as the parameters. whole_matrices: it updates whole canonical tensors, so each replica owns
    whole parameters; otherwise any range of elements can be updated alone.
    """

    maker: str
    states: tuple[str, ...]
    whole_matrices: bool = False


MODEL = "model"  # the kind of state that is the (master) weights; all other kinds belong to a rule

RULES: dict[str, RuleEntry] = {
    "adamw": RuleEntry("engine.optim.adamw:AdamW", ("exp_avg", "exp_avg_sq")),
}
