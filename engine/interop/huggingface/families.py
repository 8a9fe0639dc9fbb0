"""Tables of Hugging Face model families: config.json keys <-> model.* fields, and names of tensors. No torch.

config.json is data that describes a model. A key that the family's class in transformers reads is either a field of
`ModelConfig`, or must have the value that the engine's model implements; a test compares the tables with the source of
transformers. A key that the class does not read has no effect and is kept, unless its name asks for an unsupported
feature (`UNSUPPORTED`). Reading and writing (config_json.py) use the same table. A model is exported only as a family
whose config.json reads back as exactly its fields, so nothing that a family cannot express is lost silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

REJECT_NULL = object()


@dataclass(frozen=True)
class ConfigKey:
    """A key of config.json. model_fields: the model.* fields that it sets. default: value if the key is absent.

    values: Hugging Face's values -> ours, if they differ; of several with the same meaning the first is written. null:
    meaning of null if it is not the default; REJECT_NULL if transformers accepts no null and a guess could be wrong.
    """

    model_fields: tuple[str, ...]
    default: Any = None
    values: Mapping[str, str] = field(default_factory=dict)
    null: Any = None


@dataclass(frozen=True)
class Family:
    """One architecture; see the module docstring.

    model_fields: values shared by all its models that differ from ModelConfig's defaults. config_keys: keys of
    config.json. fixed: keys -> the values that the engine supports, None if the key may be null; the first is written
    (FIXED: the same for all families). aliases: other names that transformers accepts for a key. harmless: keys without
    effect on the model. names: canonical tensors without ".weight"/".bias" -> Hugging Face names, {} the layer; tensors
    with the same Hugging Face name are fused in it, concatenated along dim 0, or within each head's rows if the
    name is in `by_head`. transposed: matrices stored as [in, out]. prefix: absent in models saved without a head.
    windowed: `sliding_window` is read. window: its default. window_switch: the key that enables it; then `layer_types`
    and `max_window_layers` are read too. preset: prefix of preset names.
    """

    architecture: str
    model_type: str
    preset: str
    config_keys: Mapping[str, ConfigKey]
    names: Mapping[str, str]
    model_fields: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    harmless: tuple[str, ...] = ()
    rope_keys: Mapping[str, str] = field(default_factory=lambda: {"rope_theta": "rope_theta"})
    rope_defaults: Mapping[str, float] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ("none", "linear", "llama3", "yarn")
    by_head: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    prefix: str = "model."
    dropouts: tuple[str, ...] = ("attention_dropout",)
    windowed: bool = False
    window: int | None = None
    window_switch: str = ""


_GELU = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", **_GELU}
_COMMON: dict[str, ConfigKey] = {
    "vocab_size": ConfigKey(("vocab_size",)),
    "hidden_size": ConfigKey(("hidden_size",)),
    "intermediate_size": ConfigKey(("ffn_size",)),
    "num_hidden_layers": ConfigKey(("num_layers",)),
    "num_attention_heads": ConfigKey(("num_heads",)),
    "num_key_value_heads": ConfigKey(("num_kv_heads",), 0),
    "head_dim": ConfigKey(("head_dim",), 0),
    "hidden_act": ConfigKey(("activation",), "silu", _ACTIVATIONS),
    "max_position_embeddings": ConfigKey(("max_seq_len",), 2048),
    "initializer_range": ConfigKey(("init_std",), 0.02),
    "rms_norm_eps": ConfigKey(("norm_eps",), 1e-6),
    "tie_word_embeddings": ConfigKey(("tie_embeddings",), False),
}
_KV_32 = {"num_key_value_heads": ConfigKey(("num_kv_heads",), 32, null=0)}
_ATTENTION_BIAS = {"attention_bias": ConfigKey(("qkv_bias", "attention_out_bias"), False)}
_LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "layers.{}.attention_norm": "model.layers.{}.input_layernorm",
    "layers.{}.attention.q": "model.layers.{}.self_attn.q_proj",
    "layers.{}.attention.k": "model.layers.{}.self_attn.k_proj",
    "layers.{}.attention.v": "model.layers.{}.self_attn.v_proj",
    "layers.{}.attention.out": "model.layers.{}.self_attn.o_proj",
    "layers.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
    "layers.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
    "layers.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
    "layers.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "layers.{}.mlp.up": "model.layers.{}.mlp.up_proj",
    "layers.{}.mlp.down": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
_QKV_OF_PHI3 = dict.fromkeys(
    ("layers.{}.attention.q", "layers.{}.attention.k", "layers.{}.attention.v"), "model.layers.{}.self_attn.qkv_proj"
)
_GPT2_QKV = dict.fromkeys(_QKV_OF_PHI3, "transformer.h.{}.attn.c_attn")
_NEOX_QKV = dict.fromkeys(_QKV_OF_PHI3, "gpt_neox.layers.{}.attention.query_key_value")
_ALL_BIASES = {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}

_TABLE = (
    Family(
        "LlamaForCausalLM",
        "llama",
        "llama-",
        config_keys=_COMMON | _ATTENTION_BIAS | {"mlp_bias": ConfigKey(("mlp_bias",), False)},
        names=_LLAMA_NAMES,
        fixed={"rope_interleaved": (None, False), "is_llama_config": (None, True)},
        harmless=("pretraining_tp",),  # changes the order of sums: rounding only
    ),
    Family(
        "MistralForCausalLM",
        "mistral",
        "mistral-",
        config_keys=_COMMON
        | {
            "num_key_value_heads": ConfigKey(("num_kv_heads",), 8, null=REJECT_NULL),
            "max_position_embeddings": ConfigKey(("max_seq_len",), 131072),
        },
        names=_LLAMA_NAMES,
        windowed=True,
        window=4096,
    ),
    Family(
        "Qwen2ForCausalLM",
        "qwen2",
        "qwen2",
        model_fields={"qkv_bias": True},
        config_keys=_COMMON | _KV_32 | {"max_position_embeddings": ConfigKey(("max_seq_len",), 32768)},
        names=_LLAMA_NAMES,
        fixed={"use_mrope": (None, False)},
        harmless=("max_window_layers",),
        windowed=True,
        window=4096,
        window_switch="use_sliding_window",
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        "qwen3",
        model_fields={"qk_norm": True},
        config_keys=_COMMON
        | _KV_32
        | _ATTENTION_BIAS
        | {
            "head_dim": ConfigKey(("head_dim",), 128, null=REJECT_NULL),
            "max_position_embeddings": ConfigKey(("max_seq_len",), 32768),
        },
        names=_LLAMA_NAMES,
        harmless=("max_window_layers",),
        windowed=True,
        window=4096,
        window_switch="use_sliding_window",
    ),
    Family(
        "GemmaForCausalLM",
        "gemma",
        "gemma-",
        model_fields={"norm_offset": True, "scale_embeddings": True},
        config_keys=_COMMON
        | _ATTENTION_BIAS
        | {
            "num_key_value_heads": ConfigKey(("num_kv_heads",), 16, null=REJECT_NULL),
            "head_dim": ConfigKey(("head_dim",), 256, null=REJECT_NULL),
            # "gelu" in the first releases means the tanh formula, in transformers too
            "hidden_act": ConfigKey(
                ("activation",), "gelu_tanh", {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh", "silu": "silu"}
            ),
            "max_position_embeddings": ConfigKey(("max_seq_len",), 8192),
            "tie_word_embeddings": ConfigKey(("tie_embeddings",), True),
        },
        names=_LLAMA_NAMES,
        fixed={
            "hidden_activation": (None, "gelu_pytorch_tanh"),
            "use_bidirectional_attention": (None, False),
        },
    ),
    Family(
        "Olmo2ForCausalLM",
        "olmo2",
        "olmo-2",
        model_fields={"norm_position": "post", "qk_norm": True, "qk_norm_span": "projection"},
        config_keys=_COMMON | _ATTENTION_BIAS | {"rms_norm_eps": ConfigKey(("norm_eps",), 1e-5)},
        names=_LLAMA_NAMES
        | {
            "layers.{}.attention_norm": "model.layers.{}.post_attention_layernorm",
            "layers.{}.mlp_norm": "model.layers.{}.post_feedforward_layernorm",
        },
    ),
    Family(
        "Phi3ForCausalLM",
        "phi3",
        "phi-",
        config_keys=_COMMON
        | {
            "rms_norm_eps": ConfigKey(("norm_eps",), 1e-5),
            "max_position_embeddings": ConfigKey(("max_seq_len",), 4096),
        },
        names=_LLAMA_NAMES
        | _QKV_OF_PHI3
        | dict.fromkeys(("layers.{}.mlp.gate", "layers.{}.mlp.up"), "model.layers.{}.mlp.gate_up_proj"),
        harmless=("original_max_position_embeddings",),
        rope_keys={"rope_theta": "rope_theta", "partial_rotary_factor": "rotary_fraction"},
        fixed={"attention_bias": (None, False), "mlp_bias": (None, False)},
        dropouts=("attention_dropout", "embd_pdrop", "resid_pdrop"),
        rope_types=("none",),  # here transformers treats yarn as longrope
        windowed=True,
    ),
    Family(
        "GPT2LMHeadModel",
        "gpt2",
        "gpt2",
        model_fields={"norm": "layernorm", "positions": "learned", "gated_mlp": False, **_ALL_BIASES},
        config_keys={
            "vocab_size": ConfigKey(("vocab_size",), 50257),
            "n_embd": ConfigKey(("hidden_size",), 768),
            "n_layer": ConfigKey(("num_layers",), 12),
            "n_head": ConfigKey(("num_heads",), 12),
            "n_inner": ConfigKey(("ffn_size",), lambda fields: 4 * fields["hidden_size"]),
            "n_positions": ConfigKey(("max_seq_len",), 1024),
            "activation_function": ConfigKey(("activation",), "gelu_tanh", {"gelu_new": "gelu_tanh", **_ACTIVATIONS}),
            "layer_norm_epsilon": ConfigKey(("norm_eps",), 1e-5),
            "initializer_range": ConfigKey(("init_std",), 0.02),
            "tie_word_embeddings": ConfigKey(("tie_embeddings",), True),
        },
        names={
            "embed": "transformer.wte",
            "positions": "transformer.wpe",
            "layers.{}.attention_norm": "transformer.h.{}.ln_1",
            **_GPT2_QKV,
            "layers.{}.attention.out": "transformer.h.{}.attn.c_proj",
            "layers.{}.mlp_norm": "transformer.h.{}.ln_2",
            "layers.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
            "layers.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
            "norm": "transformer.ln_f",
            "head": "lm_head",
        },
        fixed={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False, None),
            "reorder_and_upcast_attn": (False, None),
            "add_cross_attention": (False, None),
        },
        aliases={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
        harmless=(
            "n_ctx",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
        ),
        rope_keys={},
        dropouts=("attn_pdrop", "embd_pdrop", "resid_pdrop"),
        rope_types=("none",),
        transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        buffers=("attn.bias", "attn.masked_bias"),
        prefix="transformer.",
    ),
    Family(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        "pythia-",
        model_fields={"norm": "layernorm", "gated_mlp": False, "mlp_bias": True},
        config_keys={
            name: _COMMON[name] for name in _COMMON if name not in ("num_key_value_heads", "head_dim", "rms_norm_eps")
        }
        | {
            "attention_bias": ConfigKey(("qkv_bias", "attention_out_bias"), True),
            "hidden_act": ConfigKey(("activation",), "gelu", _ACTIVATIONS),
            "layer_norm_eps": ConfigKey(("norm_eps",), 1e-5),
            "use_parallel_residual": ConfigKey(("parallel_residual",), True),
        },
        names={
            "embed": "gpt_neox.embed_in",
            "layers.{}.attention_norm": "gpt_neox.layers.{}.input_layernorm",
            **_NEOX_QKV,
            "layers.{}.attention.out": "gpt_neox.layers.{}.attention.dense",
            "layers.{}.mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm",
            "layers.{}.mlp.up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
            "layers.{}.mlp.down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
            "norm": "gpt_neox.final_layer_norm",
            "head": "embed_out",
        },
        rope_keys={"rotary_emb_base": "rope_theta", "rotary_pct": "rotary_fraction"},
        rope_defaults={"rotary_fraction": 0.25},
        dropouts=("attention_dropout", "hidden_dropout"),
        by_head=("attention.query_key_value",),
        buffers=("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"),
        prefix="gpt_neox.",
    ),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _TABLE}

# Keys that transformers reads for any family -> the values that do not change the model
FIXED: dict[str, tuple[Any, ...]] = {
    "is_causal": (None, True),
    "attention_chunk_size": (None,),
    "per_layer_config": (None, {}),
    **dict.fromkeys(
        ("text_config", "text_encoder", "decoder", "generator"), (None,)
    ),  # a nested config would be used instead
}
# Keys of any family without effect on the model
HARMLESS = (
    *("architectures", "auto_map", "bos_token_id", "classifier_dropout", "dtype", "eos_token_id", "id2label"),
    *("gradient_checkpointing", "is_decoder", "is_encoder_decoder", "label2id", "max_sequence_length", "model_type"),
    *("num_labels", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict"),
    *("task_specific_params", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "unk_token_id"),
    *("unsloth_fixed", "unsloth_version", "use_cache", "_attn_implementation", "_attn_implementation_autoset"),
    "_name_or_path",
)
# Keys found in published files -> the unsupported feature that they ask for
UNSUPPORTED = {
    "quantization_config": "quantised weights",
    "attn_logit_softcapping": "softcapping",
    "final_logit_softcapping": "softcapping",
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "num_nextn_predict_layers": "multi-token prediction",
    "alibi": "ALiBi positions",
    "clip_qkv": "clipped queries, keys and values",
    "logit_scale": "scaled logits",
    "transformers_weights": "weights in a file of another name",
    "query_pre_attn_scalar": "another softmax scale",
}
# Entries of rope_scaling that transformers reads and the engine does not support -> values without effect
ROPE_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "yarn": {"truncate": (True,), "mscale": (), "mscale_all_dim": ()},
}
# Entries of rope_scaling <-> model fields, by model.rope_scaling
ROPE_SCALING: dict[str, dict[str, str]] = {
    "none": {},
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor",
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
        "original_max_position_embeddings": "rope_original_seq_len",
    },
    "yarn": {
        "factor": "rope_factor",
        "original_max_position_embeddings": "rope_original_seq_len",
        "beta_fast": "rope_beta_fast",
        "beta_slow": "rope_beta_slow",
        "attention_factor": "rope_attention_factor",
    },
}
