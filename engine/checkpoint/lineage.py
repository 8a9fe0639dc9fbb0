"""Which run a checkpoint belongs to, and where it came from.

Going on from a checkpoint with another model, corpus, tokenizer, blend, sequence length or seed would go on from
somewhere else without a word. So every such difference is refused with old and new value, unless its very field is
named in `checkpoint.allow`; what was allowed then stands in the lineage of every later checkpoint. So does what may
change freely, such as the precision. Steps, optimizer and lr_schedule are free as long as the next step's learning rate
stays what it would have been.
"""

from __future__ import annotations

import difflib
import functools
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

import engine
from engine.checkpoint.format import Ancestor, Manifest
from engine.config.schema import Config, LrScheduleConfig, OptimizerConfig
from engine.config.skips import ranges_below, read_ranges
from engine.data.samples.corpora import DECLARED_MIXTURE, USED_MIXTURE
from engine.errors import CheckpointError, ConfigError, FieldError
from engine.optim.lr import learning_rate

_FREE = {"preset"}  # of the model: a name for values that are compared themselves
_TRAIN = ("seq_len", "seed")
_SKIPS = ("train.skip_steps", "data.skip_samples")  # free where they speak of what is still to come
# Free, and shows in the numbers.
_TOLD = ("train.steps", "train.global_batch_size", "train.precision", "train.fp8", *_SKIPS)
_TOLD_SECTIONS = ("optimizer", "lr_schedule")
_RATE = "lr_schedule"  # allows a learning rate that jumps
_JUMP = 0.01  # of the larger of two rates: more is one
# Facts of the data by their field (engine.data.samples.corpora makes them).
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

# A fact of the place, not of the data: the sample at which epoch 0 of this order began, in runs that went over to it.
ORDER_BEGIN = "order_begin"
_ORDER_CHANGED = """
data.order is the version of the sample order: at the number of samples read so far, this engine's order stands at other
tokens. Allowed, the rest of the run reads in the new order, from the start of an epoch; to stay in the old one, go on
with the engine that wrote the checkpoint ({engine})."""

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
    """Facts of the run that differ: name -> (checkpoint, now). What may change freely is not among them.

    A blend's changes at this step and later may be changed, and so may what is left out of the steps and samples to
    come: they say nothing about the past. A field that the engine got after the checkpoint was written had its default
    then.
    """
    old, now = _configs(manifest, cfg)
    declared = _declared(manifest.data, old["train"]["global_batch_size"])
    then, here = _past(declared, manifest.step), _past(data_metadata, manifest.step)
    if "fingerprint" not in then:  # written before there was one
        here.pop("fingerprint", None)
    if "order" in here:
        then.setdefault("order", 1)  # likewise
    pairs = {f"model.{k}": (old["model"][k], v) for k, v in now["model"].items() if k not in _FREE}
    pairs |= {f"train.{k}": (old["train"][k], now["train"][k]) for k in _TRAIN}
    pairs |= {f"data.{k}": (then.get(k), here.get(k)) for k in (then | here) if k not in ("prefix", ORDER_BEGIN)}
    rates = _next_rates(manifest, cfg)
    if manifest.step < cfg.train.steps and abs(rates[0] - rates[1]) > _JUMP * max(rates):
        pairs[f"{_RATE} (learning rate of step {manifest.step + 1})"] = rates
    for name, done in zip(_SKIPS, (manifest.step + 1, manifest.consumed_samples)):
        section, key = name.split(".")
        before, after = (ranges_below(read_ranges(config[section][key]), done) for config in (old, now))
        pairs[name] = (before, after)
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _next_rates(manifest: Manifest, cfg: Config) -> tuple[float, float]:
    """The learning rate of the step after the checkpoint: as its run would have had it, and as this one has it."""
    old, _ = _configs(manifest, cfg)
    before = OptimizerConfig.model_construct(**old["optimizer"]), LrScheduleConfig.model_construct(**old["lr_schedule"])
    step = manifest.step + 1
    return (
        learning_rate(step, old["train"]["steps"], *before),
        learning_rate(step, cfg.train.steps, cfg.optimizer, cfg.lr_schedule),
    )


def _same_curve(manifest: Manifest, cfg: Config) -> str:
    """How to keep the checkpoint's learning rates, where only another end of the decay changes them; else empty."""
    old, _ = _configs(manifest, cfg)
    horizon = old["lr_schedule"]["horizon_steps"] or old["train"]["steps"]
    kept = cfg.model_copy(update={"lr_schedule": cfg.lr_schedule.model_copy(update={"horizon_steps": horizon})})
    then, now = _next_rates(manifest, kept)
    if cfg.lr_schedule.kind == "constant" or then != now:
        return ""
    return f" (--lr-schedule.horizon-steps {horizon} keeps the checkpoint's learning rates, whose decay ends there.)"


def changes(manifest: Manifest, cfg: Config) -> Differences:
    """What may change freely, shows in the numbers and did change: name -> (checkpoint, now)."""
    old, now = (
        {f"{section}.{k}": v for section, values in config.items() for k, v in values.items()}
        for config in _configs(manifest, cfg)
    )
    told = [*_TOLD, *(name for name in now if name.partition(".")[0] in _TOLD_SECTIONS)]
    return {name: (old[name], now[name]) for name in told if old[name] != now[name]}


def _configs(manifest: Manifest, cfg: Config) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The values of the checkpoint's config, by section and name, and those of this run."""
    old = {name: section | manifest.config.get(name, {}) for name, section in Config().model_dump().items()}
    return old, cfg.model_dump()


def _past(facts: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Facts without what data.train says of later steps, and without where its changes fell among the samples."""
    return {
        name: value
        for name, value in facts.items()
        if not name.startswith(USED_MIXTURE)
        and (not name.startswith(DECLARED_MIXTURE) or int(name.removeprefix(DECLARED_MIXTURE)) < max(1, step))
    }


def _declared(facts: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """A checkpoint's facts, a blend by its steps: engines that wrote no steps had one batch size for all of them."""
    if any(name.startswith(DECLARED_MIXTURE) for name in facts):
        return dict(facts)
    steps = {
        f"{DECLARED_MIXTURE}{int(name.removeprefix(USED_MIXTURE)) // batch}": value
        for name, value in facts.items()
        if name.startswith(USED_MIXTURE)
    }
    return {**facts, **steps}


def order_begin(manifest: Manifest, data_metadata: Mapping[str, Any]) -> int:
    """The sample number at which a run that goes on from this checkpoint began with epoch 0 of its order."""
    if manifest.data.get("order", 1) == data_metadata.get("order", 1):
        return int(manifest.data.get(ORDER_BEGIN, 0))
    return manifest.consumed_samples


def field_of(name: str) -> str:
    """The word that allows a difference: `data.source 0, web` is field `data.source`."""
    return name.partition(" ")[0]


def refuse(folder: Path, manifest: Manifest, found: Differences, cfg: Config) -> Differences:
    """The differences to the checkpoint that `checkpoint.allow` names. Raises CheckpointError if there are others.

    Raises ConfigError for a word of checkpoint.allow that is no field of a run, with the nearest that is.
    """
    allowed = cfg.checkpoint.allow.replace(",", " ").split()
    known = {f"model.{k}" for k in type(cfg.model).model_fields if k not in _FREE} | {f"train.{k}" for k in _TRAIN}
    known |= {f"data.{k}" for k in DATA_FIELDS} | {_RATE, *_SKIPS}
    errors = [
        FieldError(
            "checkpoint.allow-unknown-field",
            "checkpoint.allow",
            word,
            "is no field that resuming compares",
            f"Did you mean {_nearest(word, known)}?",
        )
        for word in allowed
        if word not in known
    ]
    if errors:
        raise ConfigError(errors)
    refused = {name: pair for name, pair in found.items() if field_of(name) not in allowed}
    if refused:
        fields = list(dict.fromkeys(map(field_of, refused)))
        what = {_RATE: "had another learning rate", "data.order": "was read in another sample order"}
        raise CheckpointError(
            "checkpoint.of-another-run",
            f"{folder} {what.get(' '.join(fields), 'belongs to another run')}:\n"
            + "\n".join(f"  - {name}: checkpoint {_shown(a)}, now {_shown(b)}" for name, (a, b) in refused.items())
            + (_ORDER_CHANGED.format(engine=manifest.versions.get("engine")) if "data.order" in refused else "")
            + "\nUse the old values, or another --run.dir for a new run."
            + (_same_curve(manifest, cfg) if _RATE in fields else "")
            + f' If the change is meant, allow these very fields: --checkpoint.allow "{" ".join(fields)}"',
        )
    return found


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def _nearest(word: str, known: set[str]) -> str:
    return difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.0)[0]


def extend_lineage(
    folder: Path, manifest: Manifest, allowed: Differences, changed: Differences | None = None
) -> tuple[Ancestor, ...]:
    """The lineage of a run that goes on from `folder`: that of its checkpoint, and the checkpoint itself."""
    parent = Ancestor(
        checkpoint=str(folder),
        step=manifest.step,
        consumed_samples=manifest.consumed_samples,
        layout=manifest.layout,
        versions=manifest.versions,
        config=config_digest(manifest.config),
        allowed={name: (_shown(a), _shown(b)) for name, (a, b) in allowed.items()},
        changed={name: (str(a), str(b)) for name, (a, b) in (changed or {}).items()},
    )
    return (*manifest.lineage, parent)


def config_digest(config: Mapping[str, Any]) -> str:
    """XXH3-64 of a config as the manifest holds it, to tell configs apart."""
    lines = (f"{section}.{k}={v!r}" for section, values in config.items() for k, v in values.items())
    return xxhash.xxh3_64("\n".join(sorted(lines)).encode()).hexdigest()


def tell(lineage: Sequence[Ancestor]) -> list[str]:
    """The lineage in lines for people, oldest first."""
    lines = []
    for parent in lineage:
        degrees = " x ".join(f"{axis} {n}" for axis, n in parent.layout.items() if n > 1) or "one process"
        code = f"engine {parent.versions.get('engine')}, code {parent.versions.get('code', 'unknown')[:12]}"
        lines.append(
            f"went on from {parent.checkpoint} (step {parent.step}, {degrees}, {code}, torch "
            f"{parent.versions.get('torch')}, config {parent.config})"
        )
        lines += [f"  allowed: {name}: {a} -> {b}" for name, (a, b) in parent.allowed.items()]
        lines += [f"  changed: {name}: {a} -> {b}" for name, (a, b) in parent.changed.items()]
    return lines
