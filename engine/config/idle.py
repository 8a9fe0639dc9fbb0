"""Settings that were given but have no effect, or contradict each other: an error instead of being ignored.

Only given values count, not defaults, presets or model fields of the initial weights; a value in a file counts if it
differs from the default, so that a run's config.toml loads back. Settings with an effect in some layouts only (zero,
overlap) are not checked, so that one config serves every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from engine.config.schema import Config, fields
from engine.errors import FieldError

# setting: (whether it has an effect, problem, fix)
_Rule = tuple[Callable[[Config], bool], str, str]

RULES: dict[str, _Rule] = {
    "eval.every": (
        lambda c: bool(c.data.valid),
        "has no effect without data.valid",
        "Give one, or leave it out.",
    ),
    "eval.batches": (
        lambda c: bool(c.data.valid),
        "has no effect without data.valid",
        "Give one, or leave it out.",
    ),
    "train.loss_scale": (
        lambda c: c.train.precision == "fp16",
        "is for train.precision fp16 only",
        "Leave it out, or use fp16.",
    ),
    "train.loss_scale_window": (
        lambda c: c.train.precision == "fp16",
        "is for train.precision fp16 only",
        "Leave it out, or use fp16.",
    ),
    "lr_schedule.min_lr_ratio": (
        lambda c: c.lr_schedule.kind != "constant",
        "has no effect for lr_schedule.kind constant",
        "Leave it out.",
    ),
    "checkpoint.keep": (
        lambda c: c.checkpoint.every > 0,
        "has no effect without checkpoint.every: only the last step is saved",
        "Set every as well.",
    ),
    "checkpoint.keep_every": (
        lambda c: c.checkpoint.every > 0 or not c.checkpoint.keep,  # without keep: an error of engine.config.checks
        "has no effect without checkpoint.every: only the last step is saved",
        "Set every as well.",
    ),
    "checkpoint.async_save": (
        lambda c: c.checkpoint.every > 0,
        "has no effect without checkpoint.every: the last save is always waited for",
        "Leave it out, or set every.",
    ),
    "checkpoint.allow": (
        lambda c: c.checkpoint.resume != "never",
        "has no effect if checkpoint.resume is never",
        "Leave it out.",
    ),
    "checkpoint.init": (
        lambda c: c.checkpoint.resume in ("auto", "never"),
        "would be ignored, because checkpoint.resume names the checkpoint to resume from",
        "Leave one of the two out.",
    ),
    "parallel.overlap_gather": (
        lambda c: c.parallel.zero > 0,
        "has no effect if parallel.zero is 0",
        "Leave it out.",
    ),
    "data.fim_spm_rate": (
        lambda c: c.data.fim_rate > 0,
        "has no effect without data.fim_rate",
        "Leave it out, or set the rate.",
    ),
    "model.rope_theta": (
        lambda c: c.model.positions == "rope",
        "is for rotary positions, but model.positions is learned",
        "Leave it out.",
    ),
    "model.qk_norm_span": (lambda c: c.model.qk_norm, "has no effect without model.qk_norm", "Leave it out."),
    "lr_schedule.warmup_steps": (
        lambda c: (  # with a horizon this may be the first part of a longer run; wsd: see engine.config.checks
            c.lr_schedule.warmup_steps <= max(c.train.steps, c.lr_schedule.horizon_steps) or c.lr_schedule.kind == "wsd"
        ),
        "is longer than the run (train.steps)",
        "The learning rate would never reach its peak: use 1 % of the run, or train longer.",
    ),
    "monitor.timeline_step": (
        lambda c: c.monitor.timeline_step <= c.train.steps,
        "is after the end of the run (train.steps)",
        "Use a step of the run, or 0 for none.",
    ),
    "train.recompute_layers": (
        lambda c: c.train.recompute_layers <= c.model.num_layers,
        "is more than model.num_layers",
        "Use 0 for all.",
    ),
}


def idle(config: Config, sources: Mapping[str, str], *, given_by: set[str]) -> Iterator[FieldError]:
    """Errors of all settings of RULES that were given and have no effect. given_by: sources that count as given."""
    defaults = {f"{section}.{name}": field.default for section, name, field in fields()}
    for path, (has_effect, why, fix) in RULES.items():
        section, name = path.split(".")
        value = getattr(getattr(config, section), name)
        typed_or_changed = sources.get(path) == "command line" or value != defaults[path]
        if sources.get(path) in given_by and typed_or_changed and not has_effect(config):
            yield FieldError("config.without-effect", path, value, why, fix)
