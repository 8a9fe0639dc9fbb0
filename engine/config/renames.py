"""Renamed settings of earlier versions: an error in user input, translated in files that the engine wrote.

An old name in a user's file or command line is an error that gives the new name. Files of the engine itself (a run
folder's config.toml, a checkpoint's manifest) are read with the names translated.
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
    """Translate a saved config (section -> name -> value) to the current names; entries that are not sections stay."""
    found: dict[str, Any] = {section: values for section, values in config.items() if not isinstance(values, dict)}
    for section, values in config.items():
        for name, value in values.items() if isinstance(values, dict) else ():
            new_section, _, new_name = SETTINGS.get(f"{section}.{name}", f"{section}.{name}").partition(".")
            found.setdefault(new_section, {})[new_name] = value
    return found


def is_run_folder_config(file: Path) -> bool:
    """Whether a config file is the config.toml that a run wrote into its folder."""
    return file.name == "config.toml" and file.with_name("metrics.jsonl").is_file()
