"""Settings that somebody gave and that would do nothing, or that contradict each other: refused instead of ignored.

Only values that were given count, never defaults, presets or what the weights to start from say; a file counts where
it differs from the default, so that a run's config.toml loads back. What has an effect in some layouts only (zero,
overlap) is left alone: the same settings are for every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from engine.config.schema import Config, fields
from engine.errors import FieldError

# setting: (whether it has an effect, why it has none, what to do)
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
        lambda c: c.checkpoint.every > 0 or not c.checkpoint.keep,  # without keep: engine.config.checks says so
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
        "has no effect where checkpoint.resume is never",
        "Leave it out.",
    ),
    "checkpoint.init": (
        lambda c: c.checkpoint.resume in ("auto", "never"),
        "would be ignored: checkpoint.resume names what to go on from",
        "Leave one of the two out.",
    ),
    "parallel.overlap_gather": (
        lambda c: c.parallel.zero > 0,
        "has no effect where parallel.zero is 0",
        "Leave it out.",
    ),
    "data.fim_spm_rate": (
        lambda c: c.data.fim_rate > 0,
        "has no effect without data.fim_rate",
        "Leave it out, or set the rate.",
    ),
    "model.rope_theta": (
        lambda c: c.model.positions == "rope",
        "belongs to rotary positions, but model.positions is learned",
        "Leave it out.",
    ),
    "model.qk_norm_span": (lambda c: c.model.qk_norm, "has no effect without model.qk_norm", "Leave it out."),
    "lr_schedule.warmup_steps": (
        lambda c: (  # a horizon: this may be the first part of a longer run. wsd: in engine.config.checks
            c.lr_schedule.warmup_steps <= max(c.train.steps, c.lr_schedule.horizon_steps) or c.lr_schedule.kind == "wsd"
        ),
        "is longer than the run (train.steps)",
        "The learning rate would never reach its peak: use a hundredth of the run, or train longer.",
    ),
    "monitor.timeline_step": (
        lambda c: c.monitor.timeline_step <= c.train.steps,
        "is beyond the run (train.steps)",
        "Use a step that there is, or 0 for none.",
    ),
    "train.recompute_layers": (
        lambda c: c.train.recompute_layers <= c.model.num_layers,
        "is more than model.num_layers",
        "Use 0 for all.",
    ),
}


def idle(config: Config, sources: Mapping[str, str], *, given_by: set[str]) -> Iterator[FieldError]:
    """Every setting of RULES that was given and has no effect; given_by: the sources that count as giving."""
    defaults = {f"{section}.{name}": field.default for section, name, field in fields()}
    for path, (has_effect, why, fix) in RULES.items():
        section, name = path.split(".")
        value = getattr(getattr(config, section), name)
        said = sources.get(path) == "command line" or value != defaults[path]
        if sources.get(path) in given_by and said and not has_effect(config):
            yield FieldError("config.without-effect", path, value, why, fix)
