"""Settings that earlier versions had under another name: an error for who writes one, a translation for what is saved.

A person's file or command line with an old name is refused, and the error names the new one. What the engine itself
wrote (a run folder's config.toml, a checkpoint's manifest) is read as it is meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SETTINGS = {  # old path -> new path
    "schedule.kind": "lr_schedule.kind",
    "schedule.warmup_steps": "lr_schedule.warmup_steps",
    "schedule.decay_steps": "lr_schedule.decay_steps",
    "schedule.horizon_steps": "lr_schedule.horizon_steps",
    "schedule.min_lr_ratio": "lr_schedule.min_lr_ratio",
    "train.eval_every": "eval.every",
    "train.eval_batches": "eval.batches",
}


def to_current_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config (section -> name -> value) with today's names; what is not a section of names stays as it is."""
    found: dict[str, Any] = {section: values for section, values in config.items() if not isinstance(values, dict)}
    for section, values in config.items():
        for name, value in values.items() if isinstance(values, dict) else ():
            new_section, _, new_name = SETTINGS.get(f"{section}.{name}", f"{section}.{name}").partition(".")
            found.setdefault(new_section, {})[new_name] = value
    return found


def is_run_folder_config(file: Path) -> bool:
    """Whether a config file is the one that a run wrote into its folder."""
    return file.name == "config.toml" and file.with_name("metrics.jsonl").is_file()
