"""Floating-point operations of a training step, from the config alone."""

from __future__ import annotations

from engine.config import ModelConfig


def matmul_parameters(cfg: ModelConfig) -> int:
    """Weights that every token is multiplied with: all matrices, the output head included, the embedding not."""
    heads = cfg.num_heads + 2 * cfg.num_kv_heads
    attention = cfg.hidden_size * cfg.head_dim * (heads + cfg.num_heads)
    mlp = (3 if cfg.gated_mlp else 2) * cfg.hidden_size * cfg.ffn_size
    return cfg.num_layers * (attention + mlp) + cfg.vocab_size * cfg.hidden_size


def flops_per_token(cfg: ModelConfig, seq_len: int) -> int:
    """Model FLOPs of forward and backward for one token: 6 a matmul weight, plus causal attention.

    Attention (scores and values): 2 matmuls of 2 * seq * width FLOPs forward, twice that backward, 12 * seq * width;
    half of it, because a token sees only the tokens before it (Megatron-LM counts the same way since 2024). Nothing
    is added for recomputation.
    """
    attention = cfg.num_layers * 12 * seq_len * cfg.num_heads * cfg.head_dim // 2
    return 6 * matmul_parameters(cfg) + attention
