"""A config with the same options and tiny sizes: a model of a few thousand parameters, in float64, on few processes.

What stays: model type and its switches, schedule, uneven stages, sharing of KV heads among tensor ranks, padding of the
vocabulary, sliding windows, phases, parameter groups, data options, random draws. What shrinks: sizes, numbers of
layers, steps and micro-batches, and degrees whose product is above the number of processes. Needs no torch.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from engine.config.derived import degrees_of, layers_per_stage, position_ranks, sample_degrees
from engine.config.phases import Phase, phases_of
from engine.config.schema import Config, ModelConfig, ParallelConfig
from engine.model.build import parameter_specs
from engine.optim.groups import group_errors, group_of
from engine.pipeline.schedules import SCHEDULES, load_plan

_PHASE_STEPS = 2  # steps of a phase
_STEPS = 6  # of a run without phases
_SEQ_LEN, _SEQ_STEP = 16, 8
_VOCABULARY = 61  # a prime, so that every tensor degree pads it
_LETTERS = 260  # tokens of a tokenizer that can encode any text, and its end of document
_WINDOW = 5
_LAYER = re.compile(r"(?<=\blayers\.)\d+(?=\.)")
# options that float64 on CPUs does not have, and what replaces them
_REPLACED = {
    "train.fp8": ("none", "float64 matmuls"),
    "train.compile": (False, "no compiled functions"),
    "parallel.reduce_dtype": ("main", "float64 sums"),
    "checkpoint.init": ("", "initial weights are drawn from the seed"),
    "checkpoint.secret": ("", "checkpoints of the proof are not signed"),
}
_UNUSED: dict[str, dict[str, Any]] = {  # settings that do not matter here
    "model": {"preset": ""},
    "parallel": {"bucket_mib": 0.01, "timeout_s": 60.0},
    "train": {"precision": "fp64", "device": "cpu", "loss_scale": 65536.0, "loss_scale_window": 1000},
    "checkpoint": {"every": 0, "keep": 0, "keep_every": 0, "async_save": True, "encrypt": False, "allow": ""},
    "monitor": {"tensorboard": False, "timeline_step": 0},
}
_ATTENTION_HERE = ("auto", "sdpa")


@dataclass(frozen=True)
class Shrunk:
    """A shrunk config, resolved and valid for the ranks of its degrees. notes: what it does not keep, and why."""

    config: Config
    notes: list[str]


def shrink(cfg: Config, most: int = 8) -> Shrunk:
    """The config with the same options and tiny sizes, for at most `most` processes. cfg: resolved and valid.

    data.train, data.valid and data.tokenizer keep their paths; `engine.proof.small_data` makes small ones.
    """
    notes: list[str] = []
    values = cfg.model_dump()
    values["parallel"] |= _degrees(cfg, most, notes)
    counts, values["train"]["recompute_layers"] = _layer_counts(cfg, values["parallel"])
    sources = _represented(cfg, sum(counts))  # layer -> the layer of the config that it represents
    counts[counts.index(max(counts))] += len(sources) - sum(counts)
    uneven = cfg.parallel.layers or len(set(counts)) > 1
    values["parallel"]["layers"] = ",".join(map(str, counts)) if uneven else ""
    _shrink_steps(cfg, values, notes)
    _shrink_batches(cfg, values)
    _shrink_model(cfg, values, len(sources))
    _without_gpu(values, notes)
    for section, settings in _UNUSED.items():
        values[section] |= settings
    _shrink_groups(cfg, values, sources)
    found = Config.model_validate(values)
    return Shrunk(_with_groups_that_fit(found, notes), notes)


def _degrees(cfg: Config, most: int, notes: list[str]) -> dict[str, Any]:
    """Degrees, schedule and chunks: each degree above 1 stays above 1 if possible, and as many processes as allowed."""
    p = cfg.parallel
    old = degrees_of(p)
    found: dict[str, Any] = {"chunks": min(p.chunks, 3) if p.schedule in SCHEDULES else p.chunks}
    if math.prod(old.values()) > most:
        pool = [
            dict(zip(old, degrees))
            for degrees in itertools.product(*(range(1, min(most, degree) + 1) for degree in old.values()))
            if math.prod(degrees) <= most
        ]

        def key(new: Mapping[str, int]) -> tuple[Any, ...]:
            kept, divisors = (
                sum(test(axis) for axis in old)
                for test in (lambda axis: (new[axis] > 1) == (old[axis] > 1), lambda axis: old[axis] % new[axis] == 0)
            )
            plan = p.schedule in SCHEDULES or new["pipeline"] == p.pipeline
            return plan, kept, math.prod(new.values()), divisors, -max(new.values()), new["tensor"]

        new = max(pool, key=key)
        changed = [f"{axis} {old[axis]} -> {new[axis]}" for axis in old if old[axis] != new[axis]]
        notes.append(f"parallel: {', '.join(changed)}: {math.prod(old.values())} ranks, at most {most} processes")
        found |= new
    if p.schedule not in SCHEDULES and found.get("pipeline", p.pipeline) != p.pipeline:
        plan = load_plan(Path(p.schedule))
        v_shaped = plan.placement[-1] != p.pipeline - 1
        found["schedule"] = "zb-v" if v_shaped and p.chunks == 2 else "1f1b" if p.chunks == 1 else "interleaved"
        notes.append(
            f"parallel.schedule: {found['schedule']} instead of the plan file, which is for {p.pipeline} ranks"
        )
    if found.get("tensor", p.tensor) == 1 and p.keep_gathered:
        found["keep_gathered"] = False
        notes.append("parallel.keep_gathered: off, because one tensor rank has nothing to gather")
    return found


def _layer_counts(cfg: Config, parallel: Mapping[str, Any]) -> tuple[list[int], int]:
    """(number of blocks of each stage, recompute_layers): one or two blocks, none where the config has none."""
    old, some = layers_per_stage(cfg), cfg.train.recompute_layers
    stages = parallel["pipeline"] * parallel["chunks"]
    last = max(1, stages - 1)
    picked = [old[round(k * (len(old) - 1) / last)] for k in range(stages)] if stages > 1 else [sum(old)]
    base = 2 if some and some < max(old) else 1
    least = min((count for count in picked if count), default=0)
    counts = [min(count, base + (count > least)) for count in picked]
    counts[picked.index(max(picked))] += max(0, min(2, cfg.model.num_layers) - sum(counts))
    return counts, (1 if some < max(old) else max(counts)) if some else 0


def _represented(cfg: Config, count: int) -> list[int]:
    """For each layer of the shrunk model the layer of the config that it represents, ascending; at least `count`.

    Evenly spaced, and further ones until each row of optimizer.groups, and "no row", has parameters.
    """
    layers = cfg.model.num_layers
    found = {round(k * (layers - 1) / max(1, count - 1)) for k in range(count)}
    found |= set(itertools.islice((k for k in range(layers) if k not in found), max(0, count - len(found))))
    rows: dict[int, set[int]] = {}
    there: set[int] = set()
    for spec in parameter_specs(cfg.model) if cfg.optimizer.groups else ():
        layer, row = _LAYER.search(spec.chunks[0].name), group_of(spec, cfg.optimizer).row
        if layer is None:
            there.add(row)
        else:
            rows.setdefault(row, set()).add(int(layer[0]))
    for row, holders in rows.items():
        if row not in there and not holders & found:
            found.add(min(holders))
    return sorted(found)


def _shrink_steps(cfg: Config, values: dict[str, Any], notes: list[str]) -> None:
    """Steps, phases and learning rate: every phase that the run reaches has two steps."""
    t, lr = cfg.train, cfg.lr_schedule
    rows = [row for row in values["phase"] if row["from_step"] <= t.steps]
    if dropped := len(values["phase"]) - len(rows):
        notes.append(f"phase: without the last {dropped}, which the run of {t.steps} steps does not reach")
    step = 1
    for row in rows:
        step = 1 if row["from_step"] == 1 else step + _PHASE_STEPS
        row["from_step"] = step
    steps = max(_STEPS, step + _PHASE_STEPS - 1)
    warmup, decay = min(lr.warmup_steps, 2), min(lr.decay_steps, 2)
    horizon = lr.horizon_steps and steps + max(-1, min(4, lr.horizon_steps - t.steps))
    values["phase"] = rows
    values["train"] |= {"steps": steps, "skip_steps": "3" if t.skip_steps.strip() else ""}
    values["lr_schedule"] |= {"warmup_steps": warmup, "decay_steps": decay, "horizon_steps": horizon}
    values["data"]["skip_samples"] = "1 5-6" if cfg.data.skip_samples.strip() else ""
    values["eval"] |= {"every": 0, "batches": min(cfg.eval.batches, 2)}


def _shrink_batches(cfg: Config, values: dict[str, Any]) -> None:
    """Batch sizes and sequence lengths of [train] and the phases: values that differ stay different, in their order."""
    p, t, tables = ParallelConfig.model_validate(values["parallel"]), cfg.train, [values["train"], *values["phase"]]
    old_ways, ways = (math.prod(sample_degrees(parallel).values()) for parallel in (cfg.parallel, p))
    rows = [Phase(1, t.global_batch_size, t.micro_batch_size, t.seq_len), *phases_of(cfg).until(t.steps)]
    micro = sorted({row.micro_batch_size for row in rows})
    micro_of = {size: 2 ** min(2, k + (micro[0] > 1)) for k, size in enumerate(micro)}
    largest = max(micro_of.values())
    batch_of: dict[int, int] = {}
    share = 0
    for size in sorted({row.global_batch_size for row in rows}):
        row = next(row for row in rows if row.global_batch_size == size)
        count = row.microbatches(old_ways)
        if p.schedule not in SCHEDULES:  # a plan file, for this number of micro-batches
            share = count * micro_of[row.micro_batch_size]
        else:
            wanted = -(-min(count, 2 * p.pipeline) * micro_of[row.micro_batch_size] // largest)
            share = max(share + largest, largest * wanted)
        batch_of[size] = ways * share
    parts = position_ranks(p) * (p.tensor if p.sequence else 1)
    length_of: dict[int, int] = {}
    for size in sorted({row.seq_len for row in rows}):
        length = min(size, _SEQ_LEN + _SEQ_STEP * len(length_of))
        length = max(length, 2, *(n + 1 for n in length_of.values()))
        length_of[size] = -(-length // parts) * parts + (size % 2 if parts == 1 and size > _SEQ_LEN else 0)
    for table in tables:
        for name, sizes in (("global_batch_size", batch_of), ("micro_batch_size", micro_of), ("seq_len", length_of)):
            if table[name] is not None:
                table[name] = sizes[table[name]]


def _shrink_model(cfg: Config, values: dict[str, Any], layers: int) -> None:
    m, t = cfg.model, values["parallel"]["tensor"]
    longest = max(table["seq_len"] or 0 for table in (values["train"], *values["phase"]))
    most = max(row.seq_len for row in phases_of(cfg).until(cfg.train.steps))
    max_seq_len = longest * (2 if m.max_seq_len > most else 1)
    heads, kv = _heads(m, cfg.parallel.tensor, t)
    head_dim = next(n for n in (4, 8, 16, 32, m.head_dim) if _rotates_pairs(m, n) or n == m.head_dim)
    pattern = "".join(dict.fromkeys(m.window_layers))[:layers]
    needed = _LETTERS + len(f"{cfg.data.fim_tokens} {cfg.data.mask_tokens}".split()) + 3
    vocabulary = min(m.vocab_size, _VOCABULARY if m.vocab_size % cfg.parallel.tensor else -(-_VOCABULARY // t) * t)
    values["model"] |= {
        "vocab_size": max(vocabulary, needed if cfg.data.fim_rate or cfg.data.mask_tokens else 1),
        "hidden_size": heads * head_dim + (8 if m.num_heads * m.head_dim != m.hidden_size else 0),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv,
        "head_dim": head_dim,
        "ffn_size": -(-24 // t) * t,
        "max_seq_len": max_seq_len,
        "window": 0 if not m.window else min(m.window, _WINDOW) if m.window < most else min(m.window, longest),
        "window_layers": pattern,
    }
    scale = max_seq_len / m.max_seq_len
    for table in (values["model"], *values["phase"]):
        if length := table["rope_original_seq_len"]:
            table["rope_original_seq_len"] = max(1, round(length * scale))


def _heads(m: ModelConfig, old_tensor: int, tensor: int) -> tuple[int, int]:
    """(query heads, KV heads): grouped, shared by all or one each as in the config, divisible by the tensor ranks.

    KV heads that several tensor ranks share in the config are shared here, if there are ranks enough.
    """
    if m.num_kv_heads == m.num_heads:
        return (heads := tensor * min(2, m.num_heads // old_tensor)), heads
    shared = m.num_kv_heads < old_tensor
    divisors = [n for n in range(1, tensor) if tensor % n == 0]
    kv = 1 if m.num_kv_heads == 1 else (max(divisors, default=1) if shared else max(2, tensor))
    ratio = 3 if m.num_heads // m.num_kv_heads % 2 else 2
    return math.lcm(kv * ratio, tensor), kv


def _rotates_pairs(m: ModelConfig, head_dim: int) -> bool:
    rotated = int(head_dim * m.rotary_fraction)
    return m.positions != "rope" or (rotated > 0 and rotated % 2 == 0)


def _without_gpu(values: dict[str, Any], notes: list[str]) -> None:
    """Replace options that float64 on CPUs does not have."""
    for path, (value, why) in _REPLACED.items():
        section, name = path.split(".")
        if values[section][name] != value:
            notes.append(f"{path}: {why} instead of {'...' if name == 'secret' else values[section][name]}")
            values[section][name] = value
    train = values["train"]
    if train["attention"] not in _ATTENTION_HERE:
        notes.append(f"train.attention: sdpa instead of {train['attention']}, which does not run in float64 on CPUs")
        train["attention"] = "auto"


def _shrink_groups(cfg: Config, values: dict[str, Any], sources: Sequence[int]) -> None:
    """Let the rows of optimizer.groups select the tensors that represent those which they select in the config."""
    if not cfg.optimizer.groups:
        return
    specs = parameter_specs(ModelConfig.model_validate(values["model"]))
    names = [chunk.name for spec in specs for chunk in spec.chunks]
    for row in values["optimizer"]["groups"]:
        patterns = row["names"].split()
        wanted = [name for name in names if _matches(_LAYER.sub(lambda n: str(sources[int(n[0])]), name), patterns)]
        if wanted != [name for name in names if _matches(name, patterns)] or not all(
            _matches_any(names, pattern) for pattern in patterns
        ):
            row["names"] = " ".join(wanted)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _matches_any(names: Iterable[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _with_groups_that_fit(cfg: Config, notes: list[str]) -> Config:
    """The config without rows of optimizer.groups that have no effect on the small model."""
    while errors := list(group_errors(parameter_specs(cfg.model), cfg.optimizer) if cfg.optimizer.groups else ()):
        number = next((int(n[0]) for e in errors if (n := re.search(r"(?<=groups\.)\d+", e.path))), 1)
        rows = cfg.optimizer.groups
        notes.append(
            f"optimizer.groups: without {rows[number - 1].names or rows[number - 1].role}: {errors[0].problem}"
        )
        kept = rows[: number - 1] + rows[number:]
        cfg = cfg.model_copy(update={"optimizer": cfg.optimizer.model_copy(update={"groups": kept})})
    return cfg
