"""Model fields of small models with the shape of each family, and of combinations that no family has."""

from __future__ import annotations

from typing import Any

BIASES = {"model_qkv_bias": True, "model_attention_out_bias": True, "model_mlp_bias": True}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_num_kv_heads": 8,
        "model_norm": "layernorm",
        "model_positions": "learned",
        "model_activation": "gelu_tanh",
        "model_gated_mlp": False,
        "model_tie_embeddings": True,
        **BIASES,
    },
    "neox": {
        "model_num_kv_heads": 8,
        "model_norm": "layernorm",
        "model_activation": "gelu",
        "model_gated_mlp": False,
        "model_rotary_fraction": 0.5,
        "model_parallel_residual": True,
        **BIASES,
    },
    "olmo2": {"model_norm_position": "post", "model_qk_norm": True, "model_qk_norm_span": "projection"},
    "qwen2": {"model_qkv_bias": True, "model_tie_embeddings": True},
    "gemma": {
        "model_num_kv_heads": 1,
        "model_head_dim": 6,
        "model_norm_offset": True,
        "model_scale_embeddings": True,
        "model_activation": "gelu_tanh",
        "model_tie_embeddings": True,
    },
    "llama3": {"model_rope_scaling": "llama3", "model_rope_factor": 8, "model_rope_original_seq_len": 8},
    "gemma2": {"model_norm_position": "sandwich", "model_norm_offset": True, "model_tie_embeddings": True},
    # options that no family combines
    "all": {
        "model_norm": "layernorm",
        "model_norm_position": "post",
        "model_parallel_residual": True,
        "model_qk_norm": True,
        "model_activation": "gelu",
        "model_rope_scaling": "yarn",
        "model_rope_factor": 4,
        "model_rope_original_seq_len": 8,
        **BIASES,
    },
    "sandwich": {
        "model_norm": "layernorm",
        "model_norm_position": "sandwich",
        "model_parallel_residual": True,
        **BIASES,
    },
}
