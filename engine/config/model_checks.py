"""Checks between the values of a model, and between these and the tensor degree. Each error says how to fix it."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.derived import position_ranks, with_heads
from engine.config.phases import ROPE_SCALES
from engine.config.schema import Config, ModelConfig
from engine.errors import FieldError
from engine.model.build import MODELS


def multiples_near(value: int, divisor: int) -> str:
    """The multiples of `divisor` around `value`, as text for a fix."""
    low = value // divisor * divisor
    return f"{low} or {low + divisor}" if low else f"{divisor}"


def model_errors(cfg: Config) -> Iterator[FieldError]:
    """All errors between the values of a model, and between these and parallel.tensor."""
    m = with_heads(cfg.model)
    kv = m.num_kv_heads
    if m.type not in MODELS:
        problem = "is not a model type"
        yield FieldError("config.model-type-unknown", "model.type", m.type, problem, f"Use {' or '.join(MODELS)}.")
    if m.num_heads % kv:
        nearest = max(d for d in range(1, m.num_heads + 1) if m.num_heads % d == 0 and d <= kv)
        yield FieldError(
            "config.kv-heads-do-not-divide",
            "model.num_kv_heads",
            kv,
            f"does not divide model.num_heads = {m.num_heads}",
            f"Nearest that does: {nearest}.",
        )
    if not cfg.model.head_dim and m.hidden_size % m.num_heads:
        yield FieldError(
            "config.hidden-size-not-a-multiple",
            "model.hidden_size",
            m.hidden_size,
            f"is not a multiple of model.num_heads = {m.num_heads}",
            f"Use {multiples_near(m.hidden_size, m.num_heads)}, or set model.head_dim.",
        )
    yield from position_errors(m)
    yield from _window_errors(m)
    if m.norm_offset and m.norm == "layernorm":
        yield FieldError(
            "config.without-effect",
            "model.norm_offset",
            True,
            "has no effect for model.norm layernorm",
            "Leave it out.",
        )
    if m.qk_norm_span != "head" and not m.qk_norm:
        fix = "Leave it out, or set model.qk_norm true."
        yield FieldError(
            "config.without-effect",
            "model.qk_norm_span",
            m.qk_norm_span,
            "has no effect without model.qk_norm",
            fix,
        )
    yield from _tensor_errors(m, cfg.parallel.tensor)


def _tensor_errors(m: ModelConfig, t: int) -> Iterator[FieldError]:
    kv = m.num_kv_heads
    if m.num_heads % t:
        yield FieldError(
            "config.tensor-does-not-divide",
            "parallel.tensor",
            t,
            f"does not divide model.num_heads = {m.num_heads}",
            f"Nearest degree that fits the model: {_nearest_tensor(m, t)}.",
        )
    if kv % t and t % kv:
        yield FieldError(
            "config.tensor-does-not-divide",
            "parallel.tensor",
            t,
            f"neither divides model.num_kv_heads = {kv} nor is a multiple of it",
            f"Nearest degree that fits the model: {_nearest_tensor(m, t)}.",
        )
    if m.ffn_size % t:
        yield FieldError(
            "config.tensor-does-not-divide",
            "parallel.tensor",
            t,
            f"does not divide model.ffn_size = {m.ffn_size}",
            f"Use model.ffn_size {multiples_near(m.ffn_size, t)}, or tensor {_nearest_tensor(m, t)}.",
        )


def position_errors(m: ModelConfig) -> Iterator[FieldError]:
    """Errors between the position settings of a model whose heads are filled in."""
    head_dim = m.head_dim
    if m.positions == "learned":
        for name, of_rope in (("rope_scaling", m.rope_scaling != "none"), ("rotary_fraction", m.rotary_fraction != 1)):
            if of_rope:
                problem = "is for rotary positions, but model.positions is learned"
                yield FieldError("config.without-effect", f"model.{name}", getattr(m, name), problem, "Leave it out.")
    elif m.rotary_fraction == 1 and head_dim % 2:
        yield FieldError(
            "config.rotation-odd", "model.head_dim", head_dim, "is odd, but RoPE rotates pairs", f"Use {head_dim + 1}."
        )
    elif not (rotated := int(head_dim * m.rotary_fraction)) or rotated % 2:
        problem = f"of head_dim {head_dim} rotates {rotated} values, but RoPE rotates pairs"
        near = max(2, rotated + rotated % 2) / head_dim
        yield FieldError("config.rotation-odd", "model.rotary_fraction", m.rotary_fraction, problem, f"Use {near:g}.")
    for name, kinds in ROPE_SCALES.items():
        if m.rope_scaling not in kinds and getattr(m, name) != ModelConfig.model_fields[name].default:
            problem = f"has no effect for model.rope_scaling {m.rope_scaling}"
            yield FieldError(
                "config.without-effect",
                f"model.{name}",
                getattr(m, name),
                problem,
                f"Leave it out, or use {' or '.join(kinds)}.",
            )
    if m.rope_scaling == "llama3" and m.rope_low_freq_factor >= m.rope_high_freq_factor:
        problem = f"is not below model.rope_high_freq_factor = {m.rope_high_freq_factor:g}"
        yield FieldError(
            "config.rope-bounds-crossed",
            "model.rope_low_freq_factor",
            m.rope_low_freq_factor,
            problem,
            "Llama 3 has 1 and 4.",
        )
    if m.rope_scaling == "yarn" and m.rope_beta_slow >= m.rope_beta_fast:
        problem = f"is not below model.rope_beta_fast = {m.rope_beta_fast:g}"
        yield FieldError(
            "config.rope-bounds-crossed",
            "model.rope_beta_slow",
            m.rope_beta_slow,
            problem,
            "The usual values are 1 and 32.",
        )


def _window_errors(m: ModelConfig) -> Iterator[FieldError]:
    path, pattern = "model.window_layers", m.window_layers
    if m.window >= m.max_seq_len:
        problem = f"covers all of model.max_seq_len = {m.max_seq_len}, so it has no effect"
        yield FieldError("config.without-effect", "model.window", m.window, problem, "Leave it out.")
    if not pattern:
        return
    if not m.window:
        fix = "Set model.window, or leave it out."
        yield FieldError("config.without-effect", path, pattern, "has no effect without model.window", fix)
    elif set(pattern) - set("wf"):
        fix = "Write w for a layer with the window and f for full attention, such as wwwwwf."
        yield FieldError("config.window-pattern-not-valid", path, pattern, "has other letters than w and f", fix)
    elif "w" not in pattern[: m.num_layers]:
        problem = f"gives none of the {m.num_layers} layers the window of model.window = {m.window}"
        yield FieldError("config.without-effect", path, pattern, problem, "Leave both out for full attention.")
    elif len(pattern) > m.num_layers:
        problem = f"is longer than model.num_layers = {m.num_layers}"
        yield FieldError("config.window-pattern-too-long", path, pattern, problem, f"Use {pattern[: m.num_layers]}.")


def _nearest_tensor(m: ModelConfig, to: int) -> int:
    """The tensor degree nearest to `to` that divides the model. m: with its head_shape filled in."""
    kv = m.num_kv_heads
    degrees = (d for d in range(1, m.num_heads + 1) if not m.num_heads % d and not m.ffn_size % d)
    return min((d for d in degrees if not kv % d or not d % kv), key=lambda d: (abs(d - to), d))


def seq_len_errors(cfg: Config) -> Iterator[FieldError]:
    """Errors of train.seq_len with the model, and with the ranks that split positions or shard the sequence."""
    t, p = cfg.train, cfg.parallel
    if t.seq_len % (runs := position_ranks(p)):
        problem = f"is not a multiple of the {runs} ranks that split the positions of a sample"
        fix = f"Use {multiples_near(t.seq_len, runs)}."
        yield FieldError("config.seq-len-not-a-multiple", "train.seq_len", t.seq_len, problem, fix)
    elif p.sequence and t.seq_len // runs % p.tensor and not cfg.model.num_heads % p.tensor:
        yield FieldError(
            "config.seq-len-not-a-multiple",
            "train.seq_len",
            t.seq_len,
            f"is not a multiple of parallel.tensor = {p.tensor}, whose ranks shard the sequence",
            f"Use {multiples_near(t.seq_len, runs * p.tensor)}, or parallel.sequence false.",
        )
    if t.seq_len > cfg.model.max_seq_len:
        yield FieldError(
            "config.seq-len-too-long",
            "train.seq_len",
            t.seq_len,
            f"is longer than model.max_seq_len = {cfg.model.max_seq_len}",
            f"Set model.max_seq_len to {t.seq_len} or more.",
        )


def fp8_errors(cfg: Config) -> Iterator[FieldError]:
    """Errors of other values that train.fp8 does not support."""
    t, m = cfg.train, with_heads(cfg.model)
    if t.fp8 == "none":
        return
    if t.precision != "bf16":
        yield FieldError(
            "config.setting-missing",
            "train.fp8",
            t.fp8,
            f"needs train.precision bf16, not {t.precision}",
            "Set it, or leave fp8 out.",
        )
    tensor, head_dim = cfg.parallel.tensor, m.head_dim
    qkv = (m.num_heads // tensor + 2 * max(1, m.num_kv_heads // tensor)) * head_dim
    up = (2 if m.gated_mlp else 1) * m.ffn_size // tensor
    for name, value, size, unit in (
        ("model.hidden_size", m.hidden_size, m.hidden_size, "columns of matrices"),
        ("model.head_dim", head_dim, qkv, "rows of q, k and v on a rank"),
        ("model.head_dim", head_dim, m.num_heads // tensor * head_dim, "rows of q on a rank"),
        ("model.ffn_size", m.ffn_size, m.ffn_size // tensor, "columns of down on a rank"),
        ("model.ffn_size", m.ffn_size, up, "rows of up on a rank"),
        ("train.seq_len", t.seq_len, t.micro_batch_size * t.seq_len, "tokens of a micro-batch"),
    ):
        if size % 16:
            problem = f"gives {size} {unit}, not a multiple of 16 as train.fp8 needs"
            yield FieldError(
                "config.fp8-size-not-a-multiple", name, value, problem, "Change it, or use train.fp8 none."
            )
