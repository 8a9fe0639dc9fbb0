"""Exported folders: transformers' own models give the engine's logits, for Llama, Mistral and Qwen3 shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import config, layout_of, random_batches
from harness import run_ranks

from engine.checkpoint.hf import export, hf_name
from engine.data.tokenizer import Tokenizer
from engine.errors import CheckpointError
from engine.inference import compare_with_transformers
from engine.train import save_state, setup, train_step

FACTS: dict[str, Any] = {"prefix": "x", "num_documents": 1, "num_tokens": 1, "tokenizer_digest": None}
FAMILIES = {
    "llama-mha": ({"model_num_kv_heads": 8}, "LlamaForCausalLM"),
    "llama-gqa-tied": ({"model_tie_embeddings": True}, "LlamaForCausalLM"),
    "mistral": ({"model_preset": "mistral-7b", "model_rope_theta": 1e6}, "MistralForCausalLM"),
    "qwen3": ({"model_qk_norm": True, "model_head_dim": 8, "model_rope_theta": 1e6}, "Qwen3ForCausalLM"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tmp_path: Path, family: str) -> None:
    """Trained for two steps as tensor 2 x pipeline 2, so that no weight is at its symmetric start."""
    overrides, architecture = FAMILIES[family]
    cfg = config(
        4, train_precision="fp32", parallel_tensor=2, parallel_pipeline=2, run_dir=tmp_path / "run", **overrides
    )

    def job(ctx: Any) -> None:
        state = setup(cfg, ctx)
        for step in range(2):
            train_step(state, random_batches(cfg, ctx, step))
        save_state(state, tmp_path / "run/checkpoints", FACTS)

    run_ranks(layout_of(cfg), job, num_kv_heads=cfg.model.num_kv_heads, dtype=torch.float32)
    tokenizer = Tokenizer.train(iter(["some text to learn from"]), 300)
    tokenizer.save(tmp_path / "tokenizer")
    folder = tmp_path / "run/checkpoints/step_00000002"
    export(folder, tmp_path / "hf", dtype=torch.float32, tokenizer=tmp_path / "tokenizer", eod=tokenizer.eod)
    difference, largest = compare_with_transformers(tmp_path / "run", tmp_path / "hf", num_tokens=64)
    assert difference < 1e-5 and largest > 0.1
    facts = json.loads((tmp_path / "hf/config.json").read_text())
    assert facts["architectures"] == [architecture] and facts["vocab_size"] == cfg.model.vocab_size
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert (hf_name("head.weight") in index["weight_map"]) is not cfg.model.tie_embeddings
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.decode(tokenizer.encode("some <|endoftext|> text")) == "some <|endoftext|> text"
    assert theirs.eos_token_id == tokenizer.eod
    with pytest.raises(CheckpointError, match="holds a model already"):
        export(folder, tmp_path / "hf", dtype=torch.float32, tokenizer=None, eod=None)
