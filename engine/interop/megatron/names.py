"""Maps Megatron's args to ModelConfig fields, and canonical tensor names to Megatron's.

Megatron-core stores q, k and v of one key/value head together (a "group": its query heads, then k, then v), and gate
above up in one fc1. The norm before a matrix is named after the block (`input_layernorm`) or after the matrix that it
is fused with (`linear_qkv.layer_norm_weight`, Transformer Engine; `torch_dist` always uses these names).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.config.schema import ModelConfig
from engine.errors import CheckpointError
from engine.interop.megatron.symbolic import shown

Values = dict[str, Any]
MAX_COUNT = 1 << 31
MAX_LAYERS = MAX_HEADS = 4096

# args that change the model -> the values for which it is the same as this engine's
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_experts": (None, 0),
    "multi_latent_attention": (None, False),
    "mtp_num_layers": (None, 0),
    "rotary_interleaved": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
    "squared_relu": (None, False),
    "quick_geglu": (None, False),
    "glu_linear_offset": (None, 0.0),
    "activation_func_clamp_value": (None,),
    "qk_l2_norm": (None, False),
    "attention_output_gate": (None, False),
    "softmax_type": (None, "vanilla"),
    "softmax_scale": (None,),
    "window_size": (None,),
    "no_rope_freq": (None,),
    "linear_attention_freq": (None,),
    "experimental_attention_variant": (None,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "hybrid_override_pattern": (None,),
    "hybrid_layer_pattern": (None,),
    "is_hybrid_model": (None, False),
    "spec": (None,),
    "use_mup": (None, False),
    "use_legacy_models": (None, False),
}


@dataclass(frozen=True)
class RowPattern:
    """Rows of a fused matrix: runs of `each` rows, one every `period` rows, starting at row `first`."""

    each: int
    period: int = 0
    first: int = 0


@dataclass(frozen=True)
class TensorMapping:
    """A canonical tensor and its location: possible Megatron names of the fused matrix, its shape, and the rows."""

    canonical: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    fused: tuple[int, ...]
    rows: RowPattern


class _Args:
    """Typed access to args that collects errors instead of raising at the first."""

    def __init__(self, values: Values):
        self.values, self.errors = values, list[str]()

    def count(self, name: str, limit: int = MAX_COUNT) -> int:
        value = self.values.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= limit:
            return value
        self.errors.append(f"{name} = {shown(value)} is not a number from 1 to {limit}")
        return 1

    def number(self, name: str, default: float) -> float:
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
            return float(value)
        self.errors.append(f"{name} = {shown(value)} is not a number")
        return default

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name, default)
        if value is None or isinstance(value, bool):
            return bool(value)
        self.errors.append(f"{name} = {shown(value)} is neither true nor false")
        return default

    def choice(self, name: str, default: str, known: dict[str, str]) -> str:
        value = self.values.get(name, default)
        if isinstance(value, str) and value in known:
            return known[value]
        self.errors.append(f"{name} = {shown(value)} is not supported, only {', '.join(known)}")
        return known[default]


def model_fields_from_args(values: Values, where: str) -> Values:
    """ModelConfig fields from Megatron's args; vocab_size is 0 if args do not have it. Raises CheckpointError."""
    a = _Args(values)
    for name, neutral in _NEUTRAL.items():
        value = values.get(name)
        if not any(value is x or (type(value) is type(x) and value == x) for x in neutral):
            a.errors.append(f"{name} = {shown(value)}: not supported by this engine's model")
    heads, hidden = a.count("num_attention_heads", MAX_HEADS), a.count("hidden_size")
    kv_heads = a.count("num_query_groups", MAX_HEADS) if a.flag("group_query_attention") else heads
    if heads % kv_heads:
        a.errors.append(f"num_attention_heads = {heads} is not a multiple of num_query_groups = {kv_heads}")
    fields: Values = {
        "vocab_size": a.count("vocab_size") if values.get("vocab_size") is not None else 0,
        "hidden_size": hidden,
        "num_layers": a.count("num_layers", MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": a.count("kv_channels") if values.get("kv_channels") is not None else max(1, hidden // heads),
        "ffn_size": a.count("ffn_hidden_size"),
        "norm": a.choice("normalization", "LayerNorm", {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}),
        "norm_eps": a.number("norm_epsilon", a.number("layernorm_epsilon", 1e-5)),
        "norm_offset": a.flag("apply_layernorm_1p"),
        "qk_norm": a.flag("qk_layernorm"),
        "tie_embeddings": not a.flag("untie_embeddings_and_output_weights"),
        "init_std": a.number("init_method_std", 0.02),
        "max_seq_len": a.count("max_position_embeddings"),
        **_biases_and_activation(a),
        **_positions(a),
    }
    if fields["norm_offset"] and fields["norm"] == "layernorm":
        a.errors.append("apply_layernorm_1p = True with LayerNorm: not supported by this engine's model")
    if a.errors:
        raise CheckpointError(
            "interop.megatron-args-not-supported",
            f"{where}: cannot be imported because of its args:\n" + "\n".join(f"  - {x}" for x in a.errors),
        )
    return fields


def _biases_and_activation(a: _Args) -> Values:
    biases, gated = a.flag("add_bias_linear", True), a.flag("swiglu")
    tanh = a.flag("openai_gelu") or (
        biases and a.flag("bias_gelu_fusion", True)
    )  # the fused kernel uses the tanh formula
    return {
        "gated_mlp": gated,
        "activation": "silu" if gated else "gelu_tanh" if tanh else "gelu",
        "qkv_bias": biases or a.flag("add_qkv_bias"),
        "attention_out_bias": biases,
        "mlp_bias": biases,
    }


def _positions(a: _Args) -> Values:
    kind = a.choice("position_embedding_type", "learned_absolute", {"learned_absolute": "learned", "rope": "rope"})
    if kind == "learned":
        return {"positions": kind}
    fields: Values = {
        "positions": kind,
        "rope_theta": a.number("rotary_base", 10000.0),
        "rotary_fraction": a.number("rotary_percent", 1.0),
    }
    interpolated = a.values.get("rotary_seq_len_interpolation_factor") is not None
    if a.flag("use_rope_scaling"):
        if interpolated:
            a.errors.append("use_rope_scaling and rotary_seq_len_interpolation_factor cannot both be set")
        factor = a.number("rope_scaling_factor", 8.0)
        fields |= {"rope_scaling": "llama3", "rope_factor": factor, "rope_original_seq_len": 8192}
    elif interpolated:
        fields |= {"rope_scaling": "linear", "rope_factor": a.number("rotary_seq_len_interpolation_factor", 1.0)}
    return fields


def map_tensors(m: ModelConfig, padded_vocab_size: int) -> Iterator[TensorMapping]:
    """All canonical tensors of a model with their locations in Megatron's checkpoints."""
    h, d, kv, f = m.hidden_size, m.head_dim, m.num_kv_heads, m.ffn_size
    group = m.num_heads // kv * d  # rows of q in one group
    period = group + 2 * d
    yield _plain("embed.weight", ("embedding.word_embeddings.weight",), (m.vocab_size, h), (padded_vocab_size, h))
    if m.positions == "learned":
        yield _plain("positions.weight", ("embedding.position_embeddings.weight",), (m.max_seq_len, h))
    for layer in range(m.num_layers):
        ours, block = f"layers.{layer}", f"decoder.layers.{layer}"
        attention, mlp = f"{block}.self_attention", f"{block}.mlp"
        yield from _norm(
            m, f"{ours}.attention_norm", h, f"{attention}.linear_qkv.layer_norm_", f"{block}.input_layernorm."
        )
        qkv = (
            ("q", m.num_heads * d, RowPattern(group, period)),
            ("k", kv * d, RowPattern(d, period, group)),
            ("v", kv * d, RowPattern(d, period, group + d)),
        )
        yield from _fused(f"{ours}.attention", qkv, f"{attention}.linear_qkv", kv * period, h, m.qkv_bias)
        if m.qk_norm:
            for part in "qk":
                yield from _norm(m, f"{ours}.attention.{part}_norm", d, f"{attention}.{part}_layernorm.")
        yield from _row(f"{ours}.attention.out", f"{attention}.linear_proj", h, m.num_heads * d, m.attention_out_bias)
        yield from _norm(m, f"{ours}.mlp_norm", h, f"{mlp}.linear_fc1.layer_norm_", f"{block}.pre_mlp_layernorm.")
        halves = (
            (("gate", f, RowPattern(f)), ("up", f, RowPattern(f, first=f)))
            if m.gated_mlp
            else (("up", f, RowPattern(f)),)
        )
        yield from _fused(f"{ours}.mlp", halves, f"{mlp}.linear_fc1", len(halves) * f, h, m.mlp_bias)
        yield from _row(f"{ours}.mlp.down", f"{mlp}.linear_fc2", h, f, m.mlp_bias)
    yield from _norm(m, "norm", h, "decoder.final_layernorm.")
    if not m.tie_embeddings:
        yield _plain("head.weight", ("output_layer.weight",), (m.vocab_size, h), (padded_vocab_size, h))


def _plain(
    canonical: str, names: tuple[str, ...], shape: tuple[int, ...], fused: tuple[int, ...] | None = None
) -> TensorMapping:
    return TensorMapping(canonical, shape, names, fused or shape, RowPattern(shape[0]))


def _norm(m: ModelConfig, canonical: str, size: int, *prefixes: str) -> Iterator[TensorMapping]:
    for part in ("weight", "bias") if m.norm == "layernorm" else ("weight",):
        yield _plain(f"{canonical}.{part}", tuple(prefix + part for prefix in prefixes), (size,))


def _fused(
    canonical: str, parts: tuple[tuple[str, int, RowPattern], ...], name: str, rows: int, width: int, bias: bool
) -> Iterator[TensorMapping]:
    for part, size, which in parts:
        yield TensorMapping(f"{canonical}.{part}.weight", (size, width), (f"{name}.weight",), (rows, width), which)
        if bias:
            yield TensorMapping(f"{canonical}.{part}.bias", (size,), (f"{name}.bias",), (rows,), which)


def _row(canonical: str, name: str, rows: int, width: int, bias: bool) -> Iterator[TensorMapping]:
    yield _plain(f"{canonical}.weight", (f"{name}.weight",), (rows, width))
    if bias:
        yield _plain(f"{canonical}.bias", (f"{name}.bias",), (rows,))
