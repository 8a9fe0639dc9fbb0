"""What must hold between the values of a config, for a number of ranks: each fault with the repair."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator

from engine.config.derived import BALANCED, chunks_of, data_degree, microbatches, model_ranks, with_heads
from engine.config.schema import CheckpointConfig, Config, ModelConfig
from engine.config.skips import read_ranges
from engine.errors import Fault, PlanError
from engine.pipeline.actions import Plan
from engine.pipeline.schedules import SCHEDULES


def _divisors_near(value: int, divisor: int) -> str:
    """The multiples of `divisor` around `value`, for a repair text."""
    low = value // divisor * divisor
    return f"{low} or {low + divisor}" if low else f"{divisor}"


def relations(cfg: Config, world: int, plan: Plan | PlanError | None = None) -> list[Fault]:
    """Everything that must hold between values, for this many ranks. plan: what `read_plan` found."""
    return [
        *_model_relations(cfg),
        *_parallel_relations(cfg, world, plan),
        *_train_relations(cfg),
        *_checkpoint_relations(cfg.checkpoint),
        *_skip_relations(cfg),
    ]


def _skip_relations(cfg: Config) -> Iterator[Fault]:
    for path, value in (("train.skip_steps", cfg.train.skip_steps), ("data.skip_samples", cfg.data.skip_samples)):
        try:
            read_ranges(value)
        except ValueError as error:
            yield Fault("", path, value, f"{error}", 'Write numbers and ranges with spaces, such as "7 10-12".')


def _model_relations(cfg: Config) -> Iterator[Fault]:
    m = with_heads(cfg.model)
    kv = m.num_kv_heads
    if m.num_heads % kv:
        nearest = max(d for d in range(1, m.num_heads + 1) if m.num_heads % d == 0 and d <= kv)
        yield Fault(
            "",
            "model.num_kv_heads",
            kv,
            f"does not divide model.num_heads = {m.num_heads}",
            f"Nearest that does: {nearest}.",
        )
    if not cfg.model.head_dim and m.hidden_size % m.num_heads:
        yield Fault(
            "",
            "model.hidden_size",
            m.hidden_size,
            f"is not a multiple of model.num_heads = {m.num_heads}",
            f"Use {_divisors_near(m.hidden_size, m.num_heads)}, or set model.head_dim.",
        )
    yield from _position_relations(m)
    if m.norm_offset and m.norm == "layernorm":
        yield Fault("", "model.norm_offset", True, "has no meaning for model.norm layernorm", "Leave it out.")
    if m.qk_norm_span != "head" and not m.qk_norm:
        repair = "Leave it out, or set model.qk_norm true."
        yield Fault("", "model.qk_norm_span", m.qk_norm_span, "has no meaning without model.qk_norm", repair)
    t = cfg.parallel.tensor
    if m.num_heads % t:
        yield Fault(
            "",
            "parallel.tensor",
            t,
            f"does not divide model.num_heads = {m.num_heads}",
            f"Nearest degree that fits the model: {_nearest_tensor(m, t)}.",
        )
    if kv % t and t % kv:
        yield Fault(
            "",
            "parallel.tensor",
            t,
            f"neither divides model.num_kv_heads = {kv} nor is a multiple of it",
            f"Nearest degree that fits the model: {_nearest_tensor(m, t)}.",
        )
    if m.ffn_size % t:
        yield Fault(
            "",
            "parallel.tensor",
            t,
            f"does not divide model.ffn_size = {m.ffn_size}",
            f"Use model.ffn_size {_divisors_near(m.ffn_size, t)}, or tensor {_nearest_tensor(m, t)}.",
        )


ROPE_SCALES = {  # what each fact of rope_scaling belongs to
    "rope_factor": ("linear", "llama3", "yarn"),
    "rope_original_seq_len": ("llama3", "yarn"),
    "rope_low_freq_factor": ("llama3",),
    "rope_high_freq_factor": ("llama3",),
    "rope_beta_fast": ("yarn",),
    "rope_beta_slow": ("yarn",),
    "rope_attention_factor": ("yarn",),
}


def _position_relations(m: ModelConfig) -> Iterator[Fault]:
    head_dim = m.head_dim
    if m.positions == "learned":
        for name, of_rope in (("rope_scaling", m.rope_scaling != "none"), ("rotary_fraction", m.rotary_fraction != 1)):
            if of_rope:
                relation = "belongs to rotary positions, but model.positions is learned"
                yield Fault("", f"model.{name}", getattr(m, name), relation, "Leave it out.")
    elif m.rotary_fraction == 1 and head_dim % 2:
        yield Fault("", "model.head_dim", head_dim, "is odd, but RoPE rotates pairs", f"Use {head_dim + 1}.")
    elif not (rotated := int(head_dim * m.rotary_fraction)) or rotated % 2:
        relation = f"of head_dim {head_dim} rotates {rotated} values, but RoPE rotates pairs"
        near = max(2, rotated + rotated % 2) / head_dim
        yield Fault("", "model.rotary_fraction", m.rotary_fraction, relation, f"Use {near:g}.")
    for name, kinds in ROPE_SCALES.items():
        if m.rope_scaling not in kinds and getattr(m, name) != ModelConfig.model_fields[name].default:
            relation = f"has no meaning for model.rope_scaling {m.rope_scaling}"
            yield Fault("", f"model.{name}", getattr(m, name), relation, f"Leave it out, or use {' or '.join(kinds)}.")
    if m.rope_scaling == "llama3" and m.rope_low_freq_factor >= m.rope_high_freq_factor:
        relation = f"is not below model.rope_high_freq_factor = {m.rope_high_freq_factor:g}"
        yield Fault("", "model.rope_low_freq_factor", m.rope_low_freq_factor, relation, "Llama 3 has 1 and 4.")
    if m.rope_scaling == "yarn" and m.rope_beta_slow >= m.rope_beta_fast:
        relation = f"is not below model.rope_beta_fast = {m.rope_beta_fast:g}"
        yield Fault("", "model.rope_beta_slow", m.rope_beta_slow, relation, "The usual values are 1 and 32.")


def _nearest_tensor(m: ModelConfig, to: int) -> int:
    """The tensor degree nearest to `to` that all three relations of a model with its heads filled in allow."""
    kv = m.num_kv_heads
    degrees = (d for d in range(1, m.num_heads + 1) if not m.num_heads % d and not m.ffn_size % d)
    return min((d for d in degrees if not kv % d or not d % kv), key=lambda d: (abs(d - to), d))


def _parallel_relations(cfg: Config, world: int, plan: Plan | PlanError | None) -> Iterator[Fault]:
    p = cfg.parallel
    for name in ("context", "expert"):
        degree = getattr(p, name)
        if degree > 1:
            yield Fault("", f"parallel.{name}", degree, f"{name} parallelism is not built yet", "Use 1.")
    p = p.model_copy(update={"context": 1})  # refused; what follows speaks of the others
    shards = model_ranks(p)
    wanted = shards * (p.data or 1)
    if p.data and wanted != world:
        yield Fault(
            "",
            "parallel",
            f"tensor {p.tensor} x pipeline {p.pipeline} x data {p.data}",
            f"needs {wanted} processes, but there {'is 1' if world == 1 else f'are {world}'}",
            f"Start `torchrun --nproc-per-node {wanted} -m engine train ...`, or change the degrees.",
        )
    elif not p.data and world % shards:
        yield Fault(
            "",
            "parallel",
            f"tensor {p.tensor} x pipeline {p.pipeline}",
            f"= {shards} does not divide the {world} processes",
            f"Start `torchrun --nproc-per-node {shards * -(-world // shards)} -m engine train ...`.",
        )
    yield from _schedule_relations(cfg, world, plan)
    data = data_degree(p, world)
    slice_ = data * cfg.train.micro_batch_size
    if cfg.train.global_batch_size % slice_:
        yield Fault(
            "",
            "train.global_batch_size",
            cfg.train.global_batch_size,
            f"is not a multiple of data {data} x train.micro_batch_size {cfg.train.micro_batch_size}",
            f"Use {_divisors_near(cfg.train.global_batch_size, slice_)}.",
        )


def _schedule_relations(cfg: Config, world: int, plan: Plan | PlanError | None) -> Iterator[Fault]:
    p, m = cfg.parallel, cfg.model
    name = "parallel.schedule"
    if plan is None and p.schedule not in SCHEDULES:
        near = difflib.get_close_matches(p.schedule, SCHEDULES, n=1, cutoff=0.0)[0]
        known = ", ".join(SCHEDULES)
        yield Fault("", name, p.schedule, f"is none of {known}, and no file", f"Did you mean {near}?")
        return
    if isinstance(plan, PlanError):
        yield Fault("", name, p.schedule, str(plan), "Save it again with `engine schedule --save`.")
        return
    if plan is not None:
        wanted = microbatches(cfg, data_degree(p, world))
        if (plan.num_ranks, plan.microbatches) != (p.pipeline, wanted):
            have = f"is a plan for {plan.num_ranks} ranks and {plan.microbatches} microbatches"
            want = f"--ranks {p.pipeline} --microbatches {wanted}"
            yield Fault("", name, p.schedule, have, f"This run needs `engine schedule ... {want} --save FILE`.")
            return
    chunks = chunks_of(p, plan)
    fixed = SCHEDULES[p.schedule].chunks if plan is None else chunks
    if fixed is not None and chunks != fixed:
        yield Fault(
            "",
            "parallel.chunks",
            chunks,
            f"does not fit {name} {p.schedule}, which places {fixed} on a rank",
            f"Use {fixed}, or {name} interleaved.",
        )
        return
    stages = p.pipeline * chunks
    if p.layers == BALANCED:
        return
    if p.layers:
        yield from _layer_list_relations(p.layers, stages, m.num_layers)
    elif m.num_layers % stages:
        fits = [d for d in range(1, m.num_layers + 1) if m.num_layers % (d * chunks) == 0]
        near_degree = f", or pipeline {min(fits, key=lambda d: (abs(d - p.pipeline), d))}" if fits else ""
        uneven = ",".join(str(m.num_layers // stages + (i < m.num_layers % stages)) for i in range(stages))
        yield Fault(
            "",
            "parallel.pipeline",
            p.pipeline,
            (f"x {chunks} chunks = {stages} stages " if chunks > 1 else "")
            + f"does not divide model.num_layers = {m.num_layers}",
            f"Use {_divisors_near(m.num_layers, stages)} layers{near_degree}, or parallel.layers {uneven}.",
        )


def _layer_list_relations(text: str, stages: int, num_layers: int) -> Iterator[Fault]:
    counts = text.split(",")
    even = ",".join(str(num_layers // stages + (i < num_layers % stages)) for i in range(stages))
    if not all(count.isdecimal() for count in counts):
        repair = f"Give one for each stage, such as {even}, or {BALANCED}."
        yield Fault("", "parallel.layers", text, "is not a list of numbers", repair)
    elif len(counts) != stages or sum(map(int, counts)) != num_layers:
        found = f"is {sum(map(int, counts))} layers in {len(counts)} stages, not {num_layers} in {stages}"
        yield Fault("", "parallel.layers", text, found, f"Such as {even}.")


def _train_relations(cfg: Config) -> Iterator[Fault]:
    t, s = cfg.train, cfg.lr_schedule
    p = cfg.parallel
    if p.sequence and t.seq_len % p.tensor and not cfg.model.num_heads % p.tensor:
        yield Fault(
            "",
            "train.seq_len",
            t.seq_len,
            f"is not a multiple of parallel.tensor = {p.tensor}, which cut the sequence",
            f"Use {_divisors_near(t.seq_len, p.tensor)}, or parallel.sequence false.",
        )
    if p.keep_gathered and not (p.sequence and p.tensor > 1):
        repair = "Leave it out, or use parallel.tensor 2 or more with parallel.sequence true."
        yield Fault("", "parallel.keep_gathered", True, "has no meaning where the sequence is not cut", repair)
    if p.keep_gathered and t.recompute == "selective":
        relation = "keeps what train.recompute selective computes again"
        yield Fault("", "parallel.keep_gathered", True, relation, "Set one of the two back.")
    if t.recompute == "none" and t.recompute_layers:
        repair = "Set train.recompute to selective or full."
        yield Fault("", "train.recompute_layers", t.recompute_layers, "has no meaning without recompute", repair)
    if t.precision == "fp64" and p.reduce_dtype == "bf16":
        yield Fault("", "parallel.reduce_dtype", "bf16", "would spoil train.precision fp64", "Use main.")
    yield from _fp8_relations(cfg)
    if math.log2(t.loss_scale) % 1:
        relation, near = "is not a power of two, so that scaling would round", 2 ** round(math.log2(t.loss_scale))
        yield Fault("", "train.loss_scale", t.loss_scale, relation, f"Nearest: {near}.")
    if t.seq_len > cfg.model.max_seq_len:
        yield Fault(
            "",
            "train.seq_len",
            t.seq_len,
            f"is longer than model.max_seq_len = {cfg.model.max_seq_len}",
            f"Set model.max_seq_len to {t.seq_len} or more.",
        )
    horizon = s.horizon_steps or t.steps
    if s.horizon_steps and s.kind == "constant":
        yield Fault("", "lr_schedule.horizon_steps", horizon, "has no meaning for constant", "Leave it out.")
    elif s.horizon_steps and horizon <= s.warmup_steps:
        relation = f"ends the decay before the warm-up of lr_schedule.warmup_steps = {s.warmup_steps} is over"
        yield Fault("", "lr_schedule.horizon_steps", horizon, relation, f"Such as {max(t.steps, 2 * s.warmup_steps)}.")
    elif s.kind == "wsd" and not 0 < s.decay_steps <= horizon - s.warmup_steps:
        yield Fault(
            "",
            "lr_schedule.decay_steps",
            s.decay_steps,
            f"must be at least 1 and fit in the {horizon - s.warmup_steps} steps after the warm-up for wsd",
            f"A tenth of the run is usual: {max(1, horizon // 10)}.",
        )
    if s.kind != "wsd" and s.decay_steps:
        yield Fault(
            "", "lr_schedule.decay_steps", s.decay_steps, f"has no meaning for {s.kind}", "Leave it out, or use wsd."
        )


def _fp8_relations(cfg: Config) -> Iterator[Fault]:
    t, m = cfg.train, with_heads(cfg.model)
    if t.fp8 == "none":
        return
    if t.precision != "bf16":
        yield Fault(
            "", "train.fp8", t.fp8, f"needs train.precision bf16, not {t.precision}", "Set it, or leave fp8 out."
        )
    tensor, head_dim = cfg.parallel.tensor, m.head_dim
    qkv = (m.num_heads // tensor + 2 * max(1, m.num_kv_heads // tensor)) * head_dim
    up = (2 if m.gated_mlp else 1) * m.ffn_size // tensor
    for name, value, size, what in (
        ("model.hidden_size", m.hidden_size, m.hidden_size, "columns of matrices"),
        ("model.head_dim", head_dim, qkv, "rows of q, k and v on a rank"),
        ("model.head_dim", head_dim, m.num_heads // tensor * head_dim, "rows of q on a rank"),
        ("model.ffn_size", m.ffn_size, m.ffn_size // tensor, "columns of down on a rank"),
        ("model.ffn_size", m.ffn_size, up, "rows of up on a rank"),
        ("train.seq_len", t.seq_len, t.micro_batch_size * t.seq_len, "tokens of a microbatch"),
    ):
        if size % 16:
            relation = f"gives {size} {what}, no multiple of 16, which train.fp8 needs"
            yield Fault("", name, value, relation, "Change it, or use train.fp8 none.")


def _checkpoint_relations(c: CheckpointConfig) -> Iterator[Fault]:
    if c.encrypt and not c.secret:
        yield Fault("", "checkpoint.encrypt", True, "needs checkpoint.secret", "Such as file:/home/me/run.key.")
    if c.secret and not c.secret.startswith(("file:", "env:")):
        relation, repair = "is neither file:PATH nor env:NAME", "Give where the secret is, never the secret itself."
        yield Fault("", "checkpoint.secret", "...", relation, repair)
    if c.keep_every and not c.keep:
        yield Fault(
            "", "checkpoint.keep_every", c.keep_every, "checkpoint.keep is 0, so all are kept", "Set keep as well."
        )
    if c.keep_every and c.every and c.keep_every % c.every:
        near = max(1, round(c.keep_every / c.every)) * c.every
        relation = f"is no multiple of checkpoint.every {c.every}, so few such steps are saved"
        yield Fault("", "checkpoint.keep_every", c.keep_every, relation, f"Nearest: {near}.")
