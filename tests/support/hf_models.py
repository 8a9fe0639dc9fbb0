"""Tiny random transformers models of every family, for the tests of import and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 64}
LLAMA |= {"pad_token_id": None}  # transformers does not train the embedding of a padding token
BIASED = {"attention_bias": True, "mlp_bias": True}
ROPE3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE3 |= {"original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 61}
NEOX = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}

# name -> (config class, its arguments)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "llama-tied-biased": ("Llama", LLAMA | BIASED | {"tie_word_embeddings": True, "head_dim": 16}),
    "llama3-rope": ("Llama", LLAMA | {"rope_parameters": ROPE3}),
    "llama-linear": ("Llama", LLAMA | {"rope_parameters": LINEAR}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("Qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2", LLAMA | {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 16}),
    "gemma": ("Gemma", LLAMA | {"head_dim": 12, "num_key_value_heads": 1}),
    "olmo2": ("Olmo2", LLAMA),
    "phi3": ("Phi3", LLAMA | {"eos_token_id": 2, "sliding_window": None}),
    "phi3-partial": ("Phi3", LLAMA | {"tie_word_embeddings": True, "partial_rotary_factor": 0.5}),
    "gpt2": ("GPT2", GPT2 | {"n_inner": 40}),
    "gpt2-untied": ("GPT2", GPT2 | {"tie_word_embeddings": False}),
    "neox": ("GPTNeoX", NEOX | {"rotary_pct": 0.5}),
    "neox-serial": (
        "GPTNeoX",
        NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_new", "attention_bias": False},
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose weights, biases and norms differ from their initial values."""
    kind, words = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**words)
    config._attn_implementation = "eager"
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "40KB") -> Any:
    """Build and save; returns the model."""
    model = build(name, dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model
