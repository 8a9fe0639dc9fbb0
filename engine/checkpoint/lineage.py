"""Checks whether a run may resume from a checkpoint, and records its lineage (the checkpoints it resumed from).

Resuming with another model, corpus, tokenizer, blend, sequence length or seed would silently continue a different run.
Each such difference is an error that shows the old and the new value, unless its field is named in `checkpoint.allow`.
Allowed differences are recorded in the lineage of every later checkpoint, and so are changes that need no permission,
such as the precision. Steps, optimizer (except rule and groups) and lr_schedule may change as long as the learning rate
of the next step does not.
"""

from __future__ import annotations

import difflib
import functools
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

import engine
from engine.checkpoint.format import Ancestor, Manifest
from engine.config.group_table import GroupConfig
from engine.config.schema import Config, LrScheduleConfig, OptimizerConfig
from engine.config.skips import ranges_below, read_ranges
from engine.data.samples.corpora import DECLARED_MIXTURE, USED_LENGTH, USED_MIXTURE
from engine.distributed.specs import ShardSpec
from engine.errors import CheckpointError, ConfigError, FieldError
from engine.optim.groups import group_of
from engine.optim.lr import learning_rate

_NOT_COMPARED = {"preset"}  # model.preset names values that are compared one by one
_TRAIN = ("seq_len", "seed")
_RULES = ("optimizer.rule", "optimizer.groups")
_NEW_STATE = "optimizer.state"  # the word that allows tensors without state in the checkpoint to start with zero state
_SKIPS = ("train.skip_steps", "data.skip_samples")  # may change for future steps and samples
# May change, but affects the results, so changes are reported.
_REPORTED = (
    *("train.steps", "train.global_batch_size", "train.precision", "train.fp8", *_SKIPS),
    *("train.dropout", "train.attention_dropout", "train.z_loss", "objective.kind"),
)
_REPORTED_SECTIONS = ("optimizer", "lr_schedule", "phase")
_RATE = "lr_schedule"  # the word that allows a jump of the learning rate
_MAX_RATE_CHANGE = 0.01  # relative to the larger of two learning rates; more is a jump
# Fields of the data metadata (made by engine.data.samples.corpora).
DATA_FIELDS = (
    "order",
    "num_documents",
    "num_tokens",
    "fingerprint",
    "tokenizer_digest",
    "source",
    "mixture",
    "mask_eod",
    "mask_tokens",
    "separate_documents",
    "fim",
)

# Not compared: the sample at which epoch 0 of this sample order began, in runs that changed to it.
ORDER_BEGIN = "order_begin"
_ORDER_CHANGED = """
data.order is the version of the sample order: after the samples read so far, this engine would continue at other
tokens. If you allow the change, the rest of the run reads in the new order, from the start of an epoch. To keep the
old order, resume with the engine version that wrote the checkpoint ({engine})."""

Differences = dict[str, tuple[Any, Any]]


@functools.cache
def code_versions() -> dict[str, str]:
    """Versions of engine, torch and Python, and the XXH3-128 digest of the engine's own Python source."""
    digest, root = xxhash.xxh3_128(), Path(engine.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return {
        "engine": engine.__version__,
        "code": digest.hexdigest(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def differences(manifest: Manifest, cfg: Config, data_metadata: Mapping[str, Any]) -> Differences:
    """Fields that must not change and differ: name -> (value in the checkpoint, value now).

    Only the past is compared: changes of a blend at this step or later, and skips of later steps and samples, may
    differ. A config field that is newer than the checkpoint is taken to have had its default value.
    """
    old, now = _configs(manifest, cfg)
    declared = _with_steps(manifest.data, old["train"]["global_batch_size"])
    data_then, data_now = (_past_fields(fields, manifest.step) for fields in (declared, data_metadata))
    if "fingerprint" not in data_then:  # the checkpoint is older than this field
        data_now.pop("fingerprint", None)
    if "order" in data_now:
        data_then.setdefault("order", 1)  # older checkpoints do not record it
    pairs = {f"model.{k}": (old["model"][k], v) for k, v in now["model"].items() if k not in _NOT_COMPARED}
    pairs |= {f"train.{k}": (old["train"][k], now["train"][k]) for k in _TRAIN}
    pairs |= {name: (then, new) for name, then, new in zip(_RULES, _rules(old), _rules(now))}
    ignored = ("prefix", ORDER_BEGIN)
    pairs |= _past_phases(manifest, cfg)
    pairs |= {f"data.{k}": (data_then.get(k), data_now.get(k)) for k in (data_then | data_now) if k not in ignored}
    rates = _next_rates(manifest, cfg)
    if manifest.step < cfg.train.steps and abs(rates[0] - rates[1]) > _MAX_RATE_CHANGE * max(rates):
        pairs[f"{_RATE} (learning rate of step {manifest.step + 1})"] = rates
    for name, done in zip(_SKIPS, (manifest.step + 1, manifest.consumed_samples)):
        section, key = name.split(".")
        before, after = (ranges_below(read_ranges(config[section][key]), done) for config in (old, now))
        pairs[name] = (before, after)
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _rules(config: Mapping[str, Any]) -> tuple[str, str]:
    """Update rule and parameter groups of a config as stored in the manifest, as text."""
    usual = GroupConfig().model_dump()
    rows = (
        ", ".join(f"{name} {value}" for name, value in row.items() if value != usual[name])
        for row in config["optimizer"]["groups"]
    )
    return config["optimizer"]["rule"], "; ".join(rows)


def old_optimizer(manifest: Manifest) -> OptimizerConfig:
    """The optimizer settings of the run that wrote a checkpoint."""
    return OptimizerConfig.model_validate(manifest.config.get("optimizer", {}))


def missing_states(manifest: Manifest, cfg: Config, specs: Sequence[ShardSpec]) -> Differences:
    """Tensors whose optimizer state is not in the checkpoint, because they were frozen or had another update rule.

    specs: of all parameters of the model.
    """
    old = old_optimizer(manifest)
    new = [spec for spec in specs if not set(group_of(spec, cfg.optimizer).states) <= set(group_of(spec, old).states)]
    names = [chunk.name for spec in new for chunk in spec.chunks]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return {f"{_NEW_STATE} of {', '.join(names[:3])}{more}": ("none", "zero")} if names else {}


def _past_phases(manifest: Manifest, cfg: Config) -> Differences:
    """Phases of the steps done, by first step, with the values that must not change: weights are in the data metadata.

    micro_batch_size only changes rounding, and another layout may need another one.
    """
    then, now = (
        {
            row["from_step"]: {
                k: v for k, v in row.items() if v is not None and k not in ("from_step", "micro_batch_size", "weights")
            }
            for row in config["phase"]
            if row["from_step"] <= manifest.step
        }
        for config in _configs(manifest, cfg)
    )
    rows = {step: (then.get(step) or None, now.get(step) or None) for step in sorted(then | now)}
    return {f"phase from step {step}": pair for step, pair in rows.items()}


def _next_rates(manifest: Manifest, cfg: Config) -> tuple[float, float]:
    """Learning rate of the step after the checkpoint: (by the checkpoint's config, by this config)."""
    old, _ = _configs(manifest, cfg)
    before = OptimizerConfig.model_construct(**old["optimizer"]), LrScheduleConfig.model_construct(**old["lr_schedule"])
    step = manifest.step + 1
    return (
        learning_rate(step, old["train"]["steps"], *before),
        learning_rate(step, cfg.train.steps, cfg.optimizer, cfg.lr_schedule),
    )


def _horizon_hint(manifest: Manifest, cfg: Config) -> str:
    """Hint for keeping the checkpoint's learning rates if only the end of the decay moved; otherwise empty."""
    old, _ = _configs(manifest, cfg)
    horizon = old["lr_schedule"]["horizon_steps"] or old["train"]["steps"]
    kept = cfg.model_copy(update={"lr_schedule": cfg.lr_schedule.model_copy(update={"horizon_steps": horizon})})
    then, now = _next_rates(manifest, kept)
    if cfg.lr_schedule.kind == "constant" or then != now:
        return ""
    return f" (--lr-schedule.horizon-steps {horizon} keeps the checkpoint's learning rates, which decay until then.)"


def changes(manifest: Manifest, cfg: Config) -> Differences:
    """Changed fields that may change but affect the results: name -> (value in the checkpoint, value now).

    Without update rules and groups, which `differences` compares.
    """
    old, now = (dict(flat_values(config)) for config in _configs(manifest, cfg))
    reported = [*_REPORTED, *(name for name in old | now if name.partition(".")[0] in _REPORTED_SECTIONS)]
    reported = [name for name in reported if not f"{name}.".startswith(tuple(f"{rule}." for rule in _RULES))]
    return {name: (old.get(name), now.get(name)) for name in reported if old.get(name) != now.get(name)}


def _configs(manifest: Manifest, cfg: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config of the checkpoint, config of this run), each as section -> name -> value, or a list of rows."""
    old = {
        name: values | manifest.config.get(name, {}) if isinstance(values, dict) else manifest.config.get(name, values)
        for name, values in Config().model_dump().items()
    }
    return old, cfg.model_dump()


def flat_values(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every value of a config as stored in the manifest; rows of tables count from 1."""
    if isinstance(values, list | tuple):
        values = {str(number): row for number, row in enumerate(values, 1)}
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from flat_values(value, f"{path}.{name}" if path else name)
    elif values is not None:  # a value of a row that is not given
        yield path, values


def _past_fields(fields: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Data fields without blend changes at later steps, and without the samples at which changes took effect."""
    return {
        name: value
        for name, value in fields.items()
        if not name.startswith((USED_MIXTURE, USED_LENGTH))
        and (not name.startswith(DECLARED_MIXTURE) or int(name.removeprefix(DECLARED_MIXTURE)) < max(1, step))
    }


def _with_steps(fields: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """A checkpoint's data fields with blend changes by step; older engines wrote samples, at a constant batch size."""
    if any(name.startswith(DECLARED_MIXTURE) for name in fields):
        return dict(fields)
    steps = {
        f"{DECLARED_MIXTURE}{int(name.removeprefix(USED_MIXTURE)) // batch}": value
        for name, value in fields.items()
        if name.startswith(USED_MIXTURE)
    }
    return {**fields, **steps}


def order_begin(manifest: Manifest, data_metadata: Mapping[str, Any]) -> int:
    """Number of the sample at which epoch 0 of the sample order begins, for a run resumed from this checkpoint."""
    if manifest.data.get("order", 1) == data_metadata.get("order", 1):
        return int(manifest.data.get(ORDER_BEGIN, 0))
    return manifest.consumed_samples


def field_of(name: str) -> str:
    """Name of the field to allow for a difference, such as data.source for `data.source 0, web`."""
    return name.partition(" ")[0]


def require_resumable(folder: Path, manifest: Manifest, found: Differences, cfg: Config) -> Differences:
    """Raise CheckpointError unless `checkpoint.allow` names the field of every difference in `found`; returns `found`.

    Raises ConfigError if checkpoint.allow names an unknown field, with the most similar known one.
    """
    allowed = cfg.checkpoint.allow.replace(",", " ").split()
    known = {f"model.{k}" for k in type(cfg.model).model_fields if k not in _NOT_COMPARED} | {
        f"train.{k}" for k in _TRAIN
    }
    known |= {f"data.{k}" for k in DATA_FIELDS} | {_RATE, _NEW_STATE, "phase", *_RULES, *_SKIPS}
    errors = [
        FieldError(
            "checkpoint.allow-unknown-field",
            "checkpoint.allow",
            word,
            "is not a field that is compared on resume",
            f"Did you mean {_nearest(word, known)}?",
        )
        for word in allowed
        if word not in known
    ]
    if errors:
        raise ConfigError(errors)
    rejected = {name: pair for name, pair in found.items() if field_of(name) not in allowed}
    if rejected:
        fields = list(dict.fromkeys(map(field_of, rejected)))
        reasons = {_RATE: "had another learning rate", "data.order": "was trained in another sample order"}
        raise CheckpointError(
            "checkpoint.of-another-run",
            f"{folder} {reasons.get(' '.join(fields), 'belongs to another run')}:\n"
            + "\n".join(
                f"  - {name}: checkpoint {_format_value(a)}, now {_format_value(b)}"
                for name, (a, b) in rejected.items()
            )
            + (_ORDER_CHANGED.format(engine=manifest.versions.get("engine")) if "data.order" in rejected else "")
            + "\nUse the old values, or choose another --run.dir for a new run."
            + (_horizon_hint(manifest, cfg) if _RATE in fields else "")
            + f' If the change is intended, allow these fields: --checkpoint.allow "{" ".join(fields)}"',
        )
    return found


def _format_value(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def _nearest(word: str, known: set[str]) -> str:
    return difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.0)[0]


def extend_lineage(
    folder: Path, manifest: Manifest, allowed: Differences, changed: Differences | None = None
) -> tuple[Ancestor, ...]:
    """Lineage of a run that resumes from `folder`: the lineage of that checkpoint plus the checkpoint itself."""
    parent = Ancestor(
        checkpoint=str(folder),
        step=manifest.step,
        consumed_samples=manifest.consumed_samples,
        layout=manifest.layout,
        versions=manifest.versions,
        config=config_digest(manifest.config),
        allowed={name: (_format_value(a), _format_value(b)) for name, (a, b) in allowed.items()},
        changed={name: (str(a), str(b)) for name, (a, b) in (changed or {}).items()},
    )
    return (*manifest.lineage, parent)


def config_digest(config: Mapping[str, Any]) -> str:
    """XXH3-64 digest of a config as stored in the manifest."""
    lines = (f"{path}={value!r}" for path, value in flat_values(config))
    return xxhash.xxh3_64("\n".join(sorted(lines)).encode()).hexdigest()


def format_lineage(lineage: Sequence[Ancestor]) -> list[str]:
    """The lineage as lines of text, oldest checkpoint first."""
    lines = []
    for parent in lineage:
        degrees = " x ".join(f"{axis} {n}" for axis, n in parent.layout.items() if n > 1) or "one process"
        code = f"engine {parent.versions.get('engine')}, code {parent.versions.get('code', 'unknown')[:12]}"
        lines.append(
            f"resumed from {parent.checkpoint} (step {parent.step}, {degrees}, {code}, torch "
            f"{parent.versions.get('torch')}, config {parent.config})"
        )
        lines += [f"  allowed: {name}: {a} -> {b}" for name, (a, b) in parent.allowed.items()]
        lines += [f"  changed: {name}: {a} -> {b}" for name, (a, b) in parent.changed.items()]
    return lines
