"""The objectives that training can minimise, and the section [objective]. Needs no torch.

To add an objective, write its file and an entry here. `engine.train.objective.Objective` is what it implements.
"""

from __future__ import annotations

from engine.config.section import Section

# name -> "module:name" of a function or class that makes the objective from the section
OBJECTIVES: dict[str, str] = {
    "pretrain": "engine.train.objective:LanguageModel",
}


class ObjectiveConfig(Section):
    """What training minimises."""

    kind: str = "pretrain"
    """pretrain: mean cross entropy of the next token, over the counted tokens"""
