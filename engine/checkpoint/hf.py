"""Hugging Face folders: canonical names <-> theirs, config.json, and export of a checkpoint, tensor by tensor.

Canonical tensors are unfused and global already, so conversion is renaming. Memory: one shard of the output.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.format import MODEL, write_safetensors
from engine.checkpoint.load import Reader
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.files import write_synced

# canonical -> Hugging Face; {} is the layer number
LLAMA_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.attention.q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "layers.{}.attention.k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "layers.{}.attention.out.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.mlp_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.mlp.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.mlp.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.mlp.down.weight": "model.layers.{}.mlp.down_proj.weight",
}

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
)
_MAX_SHARD_BYTES = 4 << 30


def hf_name(canonical: str) -> str:
    """The Hugging Face name of a canonical tensor."""
    number = re.search(r"\.(\d+)\.", canonical)
    if number is None:
        return LLAMA_NAMES[canonical]
    return LLAMA_NAMES[canonical.replace(number[0], ".{}.", 1)].format(number[1])


def family(cfg: ModelConfig) -> tuple[str, str]:
    """(architecture, model_type) that computes exactly this model."""
    if cfg.qk_norm:
        return "Qwen3ForCausalLM", "qwen3"
    if cfg.preset.startswith("mistral"):
        return "MistralForCausalLM", "mistral"
    return "LlamaForCausalLM", "llama"


def hf_config(cfg: ModelConfig, dtype: torch.dtype, eod: int | None) -> dict[str, Any]:
    """config.json of the model; `eod` is the id of the end-of-document token."""
    architecture, model_type = family(cfg)
    facts: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.ffn_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_seq_len,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "tie_word_embeddings": cfg.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": cfg.init_std,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }
    if model_type == "llama":
        facts["mlp_bias"] = False
    if model_type != "llama":
        facts["sliding_window"] = None
    return facts


def export(folder: Path, out: Path, *, dtype: torch.dtype, tokenizer: Path | None, eod: int | None) -> int:
    """Write a checkpoint as a Hugging Face folder; returns the bytes of the weights.

    Writes model-*.safetensors with model.safetensors.index.json, config.json, generation_config.json, and copies the
    tokenizer's files. Refuses a folder that holds a config.json already.
    """
    if (out / "config.json").exists():
        raise CheckpointError(f"{out}: holds a model already; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    with Reader(folder) as reader:
        cfg = ModelConfig.model_validate(reader.manifest.config["model"])
        shards = list(_shards(reader, dtype))
        weight_map: dict[str, str] = {}
        total = 0
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors: dict[str, Tensor] = {hf_name(n): reader.whole(MODEL, n).to(dtype) for n in names}
            write_safetensors(out / file, tensors, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            total += sum(x.numel() * x.element_size() for x in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    generation = {"bos_token_id": eod, "eos_token_id": eod, "do_sample": True}
    for name in _TOKENIZER_FILES:
        if tokenizer is not None and (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, out / name)
    for name, facts in (
        ("model.safetensors.index.json", index),
        ("generation_config.json", generation),
        ("config.json", hf_config(cfg, dtype, eod)),
    ):
        write_synced(out / name, json.dumps(facts, indent=2).encode() + b"\n")
    return total


def _shards(reader: Reader, dtype: torch.dtype) -> Iterator[list[str]]:
    """Canonical names cut in runs of at most _MAX_SHARD_BYTES."""
    run: list[str] = []
    size = 0
    for name, shape in reader.names(MODEL).items():
        each = math.prod(shape) * dtype.itemsize
        if run and size + each > _MAX_SHARD_BYTES:
            yield run
            run, size = [], 0
        run.append(name)
        size += each
    yield run
